"""Decoding with weights in 8 and 4 bits: speculation changes nothing, in Python and on the command line."""

import pytest
import torch
from click.testing import CliRunner
from tiny_models import tiny_checkpoint, tiny_model

import layerskip_kernels as lk
from layerskip_kernels import registry
from layerskip_kernels.cli import app
from layerskip_kernels.models.quantization import QUANTIZATIONS

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14, [30, 20]]
NEW = 20
BACKENDS = [
    name
    for name in ("reference", "cpu")
    if registry.why_not(name, "decoder_stack", torch.device("cpu"), torch.float32, quantized=True) is None
    or name == "reference"
]


@pytest.mark.parametrize(
    ("family", "dtype", "sampled"),
    [("llama3", torch.bfloat16, False), ("qwen2", torch.float32, True), ("smollm2", torch.float16, False)],
    ids=["llama3-bfloat16-greedy", "qwen2-float32-sampled", "smollm2-float16-greedy"],
)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_speculation_changes_nothing(backend_name, quantization, family, dtype, sampled):
    model = tiny_model(family, dtype=dtype, late_scale=0.05)
    decoder = lk.SelfSpeculativeDecoder.from_model(
        model, backend=backend_name, quantization=quantization, max_batch_size=3
    )
    assert set(decoder.ops.backends.values()) <= {backend_name, "composed"}
    options = dict(max_new_tokens=NEW, eos_token_id=[], output_logits=True)
    seeds = [{"seed": [n]} if sampled else {} for n in range(len(PROMPTS))]
    if sampled:
        options |= dict(sample=True, temperature=0.9, top_p=0.95)
    expected = [
        decoder.generate([prompt], generation_strategy="autoregressive", **options, **seed)
        for prompt, seed in zip(PROMPTS, seeds)
    ]
    together = {"seed": [seed["seed"][0] for seed in seeds]} if sampled else {}
    for exit_layer, drafts in ((1, 1), (3, 5)):
        result = decoder.generate(PROMPTS, exit_layer=exit_layer, num_speculations=drafts, **options, **together)
        assert result.sequences == [alone.sequences[0] for alone in expected]
        if backend_name != "reference":  # whose bits depend on how many rows there are
            assert all(map(torch.equal, result.logits, [alone.logits[0] for alone in expected]))
    assert result.stats.accepted > 0


def test_8_bits_say_nearly_what_the_model_says():
    model = tiny_model("llama3", torch.bfloat16)
    plain, quantized = (
        lk.SelfSpeculativeDecoder.from_model(model, backend="reference", quantization=q) for q in (None, "int8")
    )
    prompt = PROMPTS[2]
    for deterministic in (False, True):  # the prompt by chunks, and by the decoding kernels
        options = dict(max_new_tokens=1, output_logits=True, deterministic_prefill=deterministic)
        ours, theirs = quantized.generate(prompt, **options).logits[0], plain.generate(prompt, **options).logits[0]
        assert 0 < (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_its_bytes_are_counted():
    model = tiny_model("llama2", torch.bfloat16)
    plain, quantized = (lk.SelfSpeculativeDecoder.from_model(model, quantization=q) for q in (None, "int4"))
    assert quantized.model.layer_bytes(0, 4) < 0.35 * plain.model.layer_bytes(0, 4)
    assert quantized.model.draft_share(1) == pytest.approx(
        (quantized.model.layer_bytes(0, 1) + quantized.model.weights.lm_head.nbytes)
        / (quantized.model.layer_bytes(0, 4) + quantized.model.weights.lm_head.nbytes)
    )
    assert "quantized on cpu" in repr(quantized) and "quantized" not in repr(plain)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama3", late_scale=0.05)


def run(checkpoint, *arguments):
    fixed = ["generate", "--model", checkpoint, "--prompt", "Hello", "--max_steps", 8, "--backend", "reference"]
    return CliRunner().invoke(app, list(map(str, [*fixed, *arguments])), prog_name="layerskip")


def test_on_the_command_line(checkpoint):
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint, backend="reference", quantization="int4")
    expected = decoder.generate("Hello", max_new_tokens=8).text[0] + "\n"
    for more in (["--quantization", "int4", "--draft_head", "int8"], ["--model_args", "quantization=int4"]):
        result = run(checkpoint, *more)
        assert result.exit_code == 0 and result.stdout == expected, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "int3"], "'--quantization': 'int3' is not one of 'int8', 'int4'"),
        (["--draft_head", "int2"], "'--draft_head': 'int2' is not one of 'auto', 'shared', 'int8', 'int4'"),
        (["--model_args", "quantization=8"], "quantization=8: choose int8 or int4, or None"),
        (["--quantization", "int8", "--model_args", "quantization=int4"], "are both given, leave one out"),
    ],
)
def test_bad_values_on_the_command_line(checkpoint, arguments, message):
    result = run(checkpoint, *arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
