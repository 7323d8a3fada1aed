"""Self-speculative decoding of every family and stateful rope type says what transformers' greedy search says."""

import pytest
import tiny_models
import torch

from layerskip_kernels.decode.decoder import SelfSpeculativeDecoder

PROMPT, NEW = 40, 24
CROSSED = PROMPT + 5  # trained length, passed in the middle of a window of drafted tokens
LONG = [3.0 + i for i in range(8)]
SHORT = [1.0 + 0.1 * i for i in range(8)]


def rope(rope_type, limit, **parameters):
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **parameters}
    return {"rope_parameters": parameters, "max_position_embeddings": limit}


CASES = {family: (family, {}) for family in tiny_models.FAMILIES} | {
    "dynamic": ("llama2", rope("dynamic", CROSSED)),
    "longrope": (
        "llama2",
        rope("longrope", 4 * CROSSED, original_max_position_embeddings=CROSSED, short_factor=SHORT, long_factor=LONG),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_as_transformers(case):
    family, overrides = CASES[case]
    model = tiny_models.tiny_model(family, **overrides)
    ids = torch.randint(6, tiny_models.VOCAB_SIZE, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, PROMPT:].tolist()
    decoder = SelfSpeculativeDecoder.from_model(model, exit_layer=2, num_speculations=3, backend="reference")
    result = decoder.generate([ids[0, :7].tolist(), ids[0].tolist()], max_new_tokens=NEW)
    assert result.sequences[1] == expected
    assert 0 < result.stats.accepted < result.stats.drafted
