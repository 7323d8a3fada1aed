import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from op_inputs import FLOATS, Inputs, assert_rejects, assert_rejects_tensor, bad_tensors, dtype_name, strided
from tolerances import assert_close
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import layerskip_kernels as lk
from layerskip_kernels.ops import early_exit_cross_entropy

OP = "early_exit_cross_entropy"
OPTIONS = {
    "plain": {},
    "capped": dict(logit_scale=1.7, softcap=3.0),
    "distilled": dict(distill_weight=0.6, distill_temperature=2.5),
    "all": dict(logit_scale=0.8, softcap=4.0, distill_weight=0.6, distill_temperature=0.7, num_items=31),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arguments(backend, dtype=torch.float32, exits=3, tokens=13, width=24, vocab=83, ignored=(0, 5, 12)):
    i = Inputs(backend.device, dtype)
    hiddens = [i.randn(tokens, width).requires_grad_() for _ in range(exits)]
    targets = i.ids(vocab, tokens)
    targets[list(ignored)] = -100
    weights = [0.2, 0.0, 0.7, 0.1][-exits:]
    return dict(hiddens=hiddens, lm_head=i.weight(vocab, width).requires_grad_(), targets=targets, weights=weights)


def plain(hiddens, lm_head, targets, weights, logit_scale=1.0, softcap=None, num_items=None, **distill):
    """The loss by torch's own functions and autograd."""
    logits = [h.double() @ lm_head.double().T * logit_scale for h in hiddens]
    if softcap:
        logits = [softcap * torch.tanh(z / softcap) for z in logits]
    counted = targets != -100
    items = num_items or counted.sum()
    losses = torch.stack([cross_entropy(z, targets, reduction="sum") / items for z in logits])
    loss = (losses.new_tensor(weights) * losses).sum()
    if weight := distill.get("distill_weight"):
        t = distill.get("distill_temperature", 1.0)
        teacher = (logits[-1].detach()[counted] / t).log_softmax(-1)
        for w, z in zip(weights[:-1], logits[:-1]):
            student = (z[counted] / t).log_softmax(-1)
            loss = loss + w * weight * t**2 * kl_div(student, teacher, log_target=True, reduction="sum") / items
    return loss, losses


def gradients(loss, arguments):
    return torch.autograd.grad(loss, [*arguments["hiddens"], arguments["lm_head"]])


@every_option
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_matches_torchs_own_loss(backend, dtype, options):
    case = arguments(backend, dtype)
    expected, expected_losses = plain(**case, **options)
    loss, losses = early_exit_cross_entropy(**case, **options)
    assert loss.dtype == losses.dtype == torch.float32
    assert loss.requires_grad and not losses.requires_grad
    assert_close(loss, expected.float())
    assert_close(losses, expected_losses.detach().float())
    for actual, wanted in zip(gradients(loss, case), gradients(expected, case), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted)


@every_option
@pytest.mark.parametrize("chunk_size", [1, 7, 12, 1000])
def test_chunks_change_nothing_but_the_order_of_sums(kernels, chunk_size, options):
    case = arguments(kernels)
    with lk.use_backend("reference"):
        expected = early_exit_cross_entropy(**case, **options)
    loss, losses = early_exit_cross_entropy(**case, **options, chunk_size=chunk_size)
    assert_close(loss, expected.loss)
    assert_close(losses, expected.exit_losses)
    for actual, wanted in zip(gradients(loss, case), gradients(expected.loss, case), strict=True):
        assert_close(actual, wanted)


def test_half_precision_head_wider_than_a_slab(kernels):
    case = arguments(kernels, torch.bfloat16, exits=2, tokens=3, width=8, vocab=8192 * 2 + 5, ignored=())
    expected, _ = plain(**case)
    loss, _ = early_exit_cross_entropy(**case)
    assert_close(loss, expected.float())
    for actual, wanted in zip(gradients(loss, case), gradients(expected, case), strict=True):
        assert_close(actual, wanted)


@pytest.mark.long_interpreted
@every_option
def test_gradcheck(backend, options):
    case = arguments(backend, torch.float64, exits=2, tokens=4, width=3, vocab=5, ignored=(1,))
    # The last exit as teacher gets no gradient, which finite differences cannot know: it is held fixed there.
    inputs = case["hiddens"][:1] if "distill_weight" in options else [*case["hiddens"], case["lm_head"]]

    def loss(*values):
        hiddens = [*values[:2]] if len(values) == 3 else [values[0], case["hiddens"][1].detach()]
        head = values[2] if len(values) == 3 else case["lm_head"].detach()
        return early_exit_cross_entropy(hiddens, head, case["targets"], [0.3, 0.7], chunk_size=3, **options).loss

    assert torch.autograd.gradcheck(loss, inputs)


def test_only_what_needs_a_gradient_gets_one(backend):
    case = arguments(backend)
    expected = gradients(early_exit_cross_entropy(**case).loss, case)
    frozen = {**case, "lm_head": case["lm_head"].detach()}
    loss = early_exit_cross_entropy(**frozen).loss
    for actual, wanted in zip(torch.autograd.grad(loss, case["hiddens"]), expected):
        assert torch.equal(actual, wanted)
    loss = early_exit_cross_entropy(**{**case, "hiddens": [h.detach() for h in case["hiddens"]]}).loss
    assert torch.equal(torch.autograd.grad(loss, case["lm_head"])[0], expected[-1])
    with torch.no_grad():
        assert not early_exit_cross_entropy(**case).loss.requires_grad


def test_gradients_scale_with_what_comes_after(backend):
    case = arguments(backend)
    loss = early_exit_cross_entropy(**case).loss
    for actual, wanted in zip(gradients(loss * 3, case), gradients(early_exit_cross_entropy(**case).loss, case)):
        torch.testing.assert_close(actual, wanted * 3)


def test_parts_of_a_batch_add_up(backend):
    """num_items as gradient accumulation uses it: the parts' losses sum to the loss of the whole."""
    case = arguments(backend)
    whole = early_exit_cross_entropy(**case)
    items = (case["targets"] != -100).sum()
    parts = [
        early_exit_cross_entropy(
            [h[part] for h in case["hiddens"]], case["lm_head"], case["targets"][part], case["weights"], num_items=items
        )
        for part in (slice(0, 4), slice(4, 13))
    ]
    assert_close(sum(p.loss for p in parts), whole.loss)
    assert_close(sum(p.exit_losses for p in parts), whole.exit_losses)


def test_nothing_to_count_gives_zero(backend):
    case = arguments(backend, ignored=range(13))
    loss, losses = early_exit_cross_entropy(**case, distill_weight=1.0)
    assert loss == 0 and not losses.any()
    assert not any(g.any() for g in gradients(loss, case))


def test_views_and_autocast(backend):
    case = arguments(backend)
    expected = early_exit_cross_entropy(**case)
    views = {**case, "hiddens": [strided(h.detach()) for h in case["hiddens"]], "lm_head": strided(case["lm_head"])}
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert_close(early_exit_cross_entropy(**views).loss, expected.loss)


def test_gradients_under_compile(backend):
    case = arguments(backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **k: early_exit_cross_entropy(**k).loss * 2, fullgraph=True, backend="aot_eager")
    expected = gradients(early_exit_cross_entropy(**case).loss * 2, case)
    for actual, wanted in zip(gradients(compiled(**case), case), expected, strict=True):
        assert_close(actual, wanted)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation returned, forward and backward."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@every_option
def test_the_logits_of_all_exits_never_exist_at_once(kernels, options):
    exits, tokens, vocab, rows = 4, 256, 512, 64
    case = arguments(kernels, exits=exits, tokens=tokens, width=8, vocab=vocab)
    largest = {}
    for name, loss in (("chunked", early_exit_cross_entropy), ("plain", lambda **k: plain(**k, **options)[0])):
        with LargestTensor() as seen:
            if name == "chunked":
                loss(**case, **options, chunk_size=rows).loss.backward()
            else:
                loss(**case).backward()
        largest[name] = seen.bytes
    assert largest["plain"] >= 4 * tokens * vocab  # the measure sees logits
    assert largest["chunked"] == 4 * rows * vocab


def test_default_chunks_are_bounded(kernels):
    module = {"cpu": "native.cpu", "triton": "triton"}[kernels.name]
    limit = import_module(f"layerskip_kernels.{module}.early_exit_cross_entropy").CHUNK_BYTES
    limit = limit if kernels.name == "cpu" else limit[kernels.device]
    case = arguments(kernels, exits=2, tokens=5 * limit // (4 * 2 * 2 * 60000), width=2, vocab=60000)
    with LargestTensor() as seen:
        early_exit_cross_entropy(**case).loss.backward()
    assert seen.bytes <= limit


# Bad arguments


@bad_tensors("hiddens[0]", "hiddens[1]", "lm_head", "targets", free_size=("hiddens[0]",))
def test_rejects_bad_tensors(backend, path, defect):
    case = arguments(backend, exits=2)
    case = {**case, "hiddens": [h.detach() for h in case["hiddens"]], "lm_head": case["lm_head"].detach()}
    if (path, defect) == ("hiddens[0]", "device"):
        hiddens = [case["hiddens"][0].to("meta"), case["hiddens"][1]]
        assert_rejects(early_exit_cross_entropy, {**case, "hiddens": hiddens}, ValueError, r"hiddens\[1\]: on ")
    elif defect == "dtype" and path != "targets":
        # float64, the usual wrong dtype, is one that this op takes
        if path == "lm_head":
            case["lm_head"] = case["lm_head"].int()
        else:
            case["hiddens"][int(path[-2])] = case["hiddens"][int(path[-2])].int()
        assert_rejects(early_exit_cross_entropy, case, TypeError, re.escape(path) + ": dtype int32, choose ")
    else:
        assert_rejects_tensor(early_exit_cross_entropy, case, path, defect)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hiddens=[]), "hiddens: no exit given, expected at least one tensor$"),
        (dict(weights=[1.0]), "weights: 1 of them for 3 hiddens, expected one each$"),
        (dict(weights=[1.0, -0.5, 1.0]), r"weights\[1\]=-0.5: must be >= 0$"),
        (dict(logit_scale=0), "logit_scale=0: must be > 0$"),
        (dict(softcap=-1.0), "softcap=-1.0: must be > 0$"),
        (dict(distill_weight=-1), "distill_weight=-1: must be >= 0$"),
        (dict(distill_temperature=0.0), "distill_temperature=0.0: must be > 0$"),
        (dict(chunk_size=0), "chunk_size=0: must be > 0$"),
        (dict(num_items=0), "num_items=0: must be > 0$"),
        (dict(num_items=torch.ones(2)), r"num_items: shape \[2\], expected one element$"),
        (dict(lm_head=torch.zeros(0, 24)), "lm_head: an empty vocabulary, expected at least one row$"),
    ],
)
def test_rejects_bad_values(backend, changes, message):
    changes = tree_map_only(torch.Tensor, lambda tensor: tensor.to(backend.device), changes)
    assert_rejects(early_exit_cross_entropy, {**arguments(backend), **changes}, ValueError, message)


def test_rejects_targets_beyond_the_vocabulary():
    """On the CPU, whatever GPU there is: elsewhere the op does not look at them."""
    case = {**arguments(SimpleNamespace(device="cpu")), "targets": torch.full((13,), 83)}
    message = r"targets\[0\]=83: choose 0..82 or ignore_index=-100$"
    assert_rejects(early_exit_cross_entropy, case, ValueError, message)


def test_hiddens_must_be_a_list(backend):
    case = arguments(backend)
    with pytest.raises(TypeError, match=r"^hiddens: expected a list of tensors, got Tensor$"):
        early_exit_cross_entropy(**{**case, "hiddens": torch.stack(case["hiddens"])})
