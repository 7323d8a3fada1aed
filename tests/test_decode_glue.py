"""What a round does between its ops: a backend's own kernels against torch."""

import pytest
import torch
from op_inputs import FLOATS, dtype_name
from tiny_models import tiny_model

import layerskip_kernels as lk
from layerskip_kernels.decode import glue
from layerskip_kernels.decode.batch import Batch
from layerskip_kernels.decode.buffers import Buffers

OP = "small_linear"  # whose backend decides
TENSORS = "tokens positions step_lengths num_draft next_positions remaining pending".split()


@pytest.fixture
def make(kernels):
    """(rows, drafts) -> its model and a round in the middle of decoding, the same each time."""

    def round_of(rows, drafts, dtype=torch.float32):
        model = lk.SelfSpeculativeDecoder.from_model(
            tiny_model("smollm2", dtype=dtype).to(kernels.device), exit_layer=1, backend=kernels.name
        ).model
        batch = Batch(rows + 2, model.device, model.config.vocab_size)
        batch.requests = [None] * rows
        generator = torch.Generator().manual_seed(rows)
        for value in vars(batch).values():
            if isinstance(value, torch.Tensor) and value.dtype not in (torch.bool, torch.uint8):
                value.copy_(torch.randint(0, 40, value.shape, generator=generator))
        r = Buffers(model, batch, rows + 1, drafts + 1, sampled=True, penalized=False, logits=False).round(drafts)
        r.remaining[: rows // 2] = torch.arange(rows // 2, dtype=torch.int32)  # few or none
        r.verified.tokens.copy_(torch.randint(-1, 60, r.tokens.shape, generator=generator))
        r.verified.num_emitted.copy_(torch.randint(0, drafts + 2, (rows,), generator=generator))
        r.tokens.copy_(torch.randint(0, 60, r.tokens.shape, generator=generator))
        return model, r

    return round_of


@pytest.mark.parametrize(("rows", "drafts"), [(1, 0), (1, 4), (7, 3), (50, 6)])
def test_equals_torch(make, rows, drafts):
    model, r = make(rows, drafts)
    _, expected = make(rows, drafts)
    for step in ("begin_round", "end_round", "begin_round"):
        getattr(model.glue, step)(r)
        getattr(glue, step)(expected)
        for name in TENSORS:
            assert torch.equal(getattr(r, name), getattr(expected, name)), f"{name} after {step}"
        for (_, found), (_, wanted) in zip(r.repeated, expected.repeated, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_embeds_into_strided_rows(make, dtype):
    model, r = make(5, 3, dtype)
    for t in range(4):
        model.glue.embed(model.weights.embedding, r.step_tokens[t], r.step_rows[t])
    assert torch.equal(r.exit_hidden, model.weights.embedding[r.tokens])


def test_a_backend_with_kernels_of_its_own_has_every_function(make):
    own = {name for name in vars(make(1, 1)[0].glue) if not name.startswith("_")}
    assert {"embed", "begin_round", "end_round"} <= own
