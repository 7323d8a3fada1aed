"""`attn_implementation="layerskip"` against transformers' sdpa, and when the kernel serves."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import StaticCache

import layerskip_kernels as lk
from layerskip_kernels.integrations import transformers_attention

IDS = torch.randint(6, 262, (2, 90), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["llama3", "mistral", "qwen2"])
def model(request):
    lk.register_attention()
    lk.register_attention()
    return tiny_model(request.param)


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def spy(q, *args, **kwargs):
        seen.append(q.shape[1])
        return lk.ops.verify_attention(q, *args, **kwargs)

    monkeypatch.setattr(transformers_attention, "verify_attention", spy)
    return seen


def compared(model, run):
    """Results of `run()` with sdpa and with ours."""
    results = []
    for name in ("sdpa", "layerskip"):
        model.set_attn_implementation(name)
        results.append(run())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("windows", [(5, 1, 1, 4, 20, 1), (70, 1, 3, 16), (30, 40, 7)])
def test_equals_sdpa_on_a_dynamic_cache(model, calls, windows):
    @torch.no_grad()
    def run():
        cache, start, logits = None, 0, []
        for width in windows:
            output = model(IDS[:, start : start + width], past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, start + width
            logits.append(output.logits)
        return torch.cat(logits, 1)

    compared(model, run)
    assert calls == [width for width in windows if width <= 64 for _ in range(4)]


def test_padded_batches_go_through_sdpa(model, calls):
    mask = torch.ones_like(IDS)
    mask[0, :20] = 0
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    compared(model, lambda: model.generate(IDS, attention_mask=mask, **options))
    assert calls == []
    compared(model, lambda: model.generate(IDS, **options))
    assert calls == [1] * 4 * 11  # of the prompt's 90 tokens sdpa took care


def test_static_caches_go_through_sdpa(model, calls):
    @torch.no_grad()
    def run():
        cache = StaticCache(config=model.config, max_cache_len=40)
        first = model(IDS[:, :20], past_key_values=cache).logits
        return torch.cat([first, model(IDS[:, 20:23], past_key_values=cache).logits], 1)

    compared(model, run)


def test_training_goes_through_sdpa(model, calls):
    def run():
        model.zero_grad()
        model(IDS[:, :30], labels=IDS[:, :30]).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    compared(model, run)
    assert calls == []


def test_attends_to_all_without_a_causal_module(model, calls):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    q = torch.randn(1, 4, 6, 16)
    module = model.model.layers[0].self_attn
    mine, _ = transformers_attention.attention(module, q, q[:, :2], q[:, :2], None)
    everything = torch.nn.functional.scaled_dot_product_attention(q, q[:, :2], q[:, :2], enable_gqa=True)
    torch.testing.assert_close(mine, everything.transpose(1, 2))
    assert calls == []
