"""What only the native CPU kernel promises: nothing but the row itself decides its bits, in every variant."""

import json
import os
import subprocess
import sys

import pytest
import torch
from op_inputs import FLOATS, Inputs, dtype_name, num_threads, same_bits

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.cpu.exit_head import exit_head
from layerskip_kernels.ops import Sampling
from layerskip_kernels.reference.exit_head import exit_head as reference
from layerskip_kernels.reference.gumbel import gumbel_noise

CHUNK = 192  # kHeadChunk of csrc/cpu/exit_head.h


def problem(rows, vocab, width, dtype, **filters):
    inputs = Inputs("cpu", dtype, seed=vocab)
    sampling = Sampling(
        temperature=torch.tensor([0.0, 0.7, 1.3] * rows)[:rows],
        seed=torch.arange(rows) * 2**33 - 5,
        position=torch.arange(rows) + 2**32,
        stream=torch.arange(rows),
        **{name: torch.full((rows,), value) for name, value in filters.items()},
    )
    hidden, norm_weight, lm_head = inputs.randn(rows, width), inputs.norm(width), inputs.weight(vocab, width)
    arguments = dict(hidden=hidden, norm_weight=norm_weight, lm_head=lm_head)
    return arguments, dict(eps=1e-5, sampling=sampling)


FILTERS = [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "plain")
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_rows_and_threads(dtype, filters):
    """Every number of rows up to two passes over the weights, one and more threads."""
    arguments, options = problem(70, 1000, 83, dtype, **filters)
    whole = exit_head(**arguments, **options)
    for rows in (1, 2, 3, 4, 5, 16, 64, 65):
        part = {**arguments, "hidden": arguments["hidden"][-rows:]}
        sampling = Sampling(*(None if t is None else t[-rows:] for t in options["sampling"]))
        for threads in (1, 2, 3):
            with num_threads(threads):
                result = exit_head(**part, **{**options, "sampling": sampling})
            assert all(same_bits(a, b[-rows:]) for a, b in zip(result, whole))


@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f) or "plain")
def test_logits_in_memory_change_nothing(filters):
    arguments, options = problem(7, 1000, 83, torch.bfloat16, **filters)
    logits = torch.empty(7, 1000)
    with_memory = exit_head(**arguments, **options, logits_out=logits)
    assert all(same_bits(a, b) for a, b in zip(with_memory, exit_head(**arguments, **options)))
    for row in range(7):
        single = torch.empty(1, 1000)
        exit_head(**{**arguments, "hidden": arguments["hidden"][row : row + 1]}, eps=1e-5, logits_out=single)
        assert same_bits(single[0], logits[row])


def test_filters_that_keep_everything_change_nothing():
    arguments, options = problem(9, 1000, 40, torch.float32)
    plain = exit_head(**arguments, **options)
    for name, value in (("top_k", 1000), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("min_p", 1e-30)):
        sampling = options["sampling"]._replace(**{name: torch.full((9,), value)})
        assert all(same_bits(a, b) for a, b in zip(exit_head(**arguments, **{**options, "sampling": sampling}), plain))


@pytest.mark.parametrize("vocab", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_a_logit_does_not_depend_on_the_vocabulary_behind_it(vocab):
    arguments, _ = problem(3, 5 * CHUNK, 83, torch.bfloat16)
    whole, part = torch.empty(3, 5 * CHUNK), torch.empty(3, vocab)
    exit_head(**arguments, eps=1e-5, logits_out=whole)
    exit_head(**{**arguments, "lm_head": arguments["lm_head"][:vocab]}, eps=1e-5, logits_out=part)
    assert same_bits(part, whole[:, :vocab])


def test_noise_is_the_references():
    """Zero weights leave the noise alone to decide, over every chunk and its edges."""
    rows, vocab = 64, 3 * CHUNK + 7
    row = torch.arange(rows)
    sampling = Sampling(torch.ones(rows), seed=row - 9, position=row * 2**31, stream=row * 2**34)
    hidden, norm_weight, lm_head = torch.ones(rows, 8), torch.ones(8), torch.zeros(vocab, 8)
    token = exit_head(hidden, norm_weight, lm_head, eps=1e-5, sampling=sampling).token
    noise = gumbel_noise(sampling.seed, sampling.stream, sampling.position, vocab)
    assert torch.equal(token, noise.argmax(-1))


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0])
def test_softcap_near_and_far(softcap):
    arguments, _ = problem(3, 500, 64, torch.float32)
    logits, expected = torch.empty(3, 500), torch.empty(3, 500)
    exit_head(**arguments, eps=1e-5, softcap=softcap, logits_out=logits)
    reference(**arguments, eps=1e-5, softcap=softcap, logits_out=expected)
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-6 * max(1, softcap))


def test_thresholds_on_ties_signed_zeros_and_infinities():
    """One weight column, so that the logits are the weights."""
    weights = torch.tensor([0.0, -0.0, 3.0, 3.0, -2.0, 1.0, 1.0, 1.0, float("-inf"), float("nan"), -2.0, 3.0])
    rows = 400
    hidden, norm_weight, lm_head = torch.ones(rows, 1), torch.ones(1), weights[:, None]
    row = torch.arange(rows)
    base = dict(temperature=torch.full((rows,), 0.5), seed=row, position=row * 0)
    cases = [dict(top_k=torch.full((rows,), k)) for k in range(13)]
    cases += [dict(top_p=torch.full((rows,), p)) for p in (0.0, 1e-9, 0.2, 0.5, 0.9, 0.97, 0.999, 0.99999)]
    cases += [dict(min_p=torch.full((rows,), p)) for p in (1e-5, 0.001, 0.01, 0.5, 1.0, 1.5)]
    cases += [dict(top_k=torch.full((rows,), k), top_p=torch.full((rows,), 0.95)) for k in (1, 4, 7, 9)]
    for filters in cases:
        sampling = Sampling(**base, **filters)
        result = exit_head(hidden, norm_weight, lm_head, eps=1e-12, sampling=sampling)
        expected = reference(hidden, norm_weight, lm_head, eps=1e-12, sampling=sampling)
        assert torch.equal(result.token, expected.token), filters
        assert result.logprob.isnan().all() and result.confidence.isnan().all()


SCRIPT = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_cpu_exit_head import FILTERS, _cpu, exit_head, problem, test_rows_and_threads
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    test_rows_and_threads(dtype, FILTERS[-1])
arguments, options = problem(9, 1000, 83, torch.float32)
result = exit_head(**arguments, **options)
print(json.dumps([_cpu.active_variant(), *(t.tolist() for t in result)]))
"""


OTHERS = [
    variant
    for variant in _cpu.build_info()["variants"]
    if variant != _cpu.active_variant() and not _cpu.why_variant_unsupported(variant)
]


@pytest.mark.parametrize("variant", OTHERS)
def test_other_variants(variant):
    """In a process of its own: the same promises, and the same answer up to rounding."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)],
        env={**os.environ, "LAYERSKIP_CPU_VARIANT": variant},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    active, token, logprob, confidence = json.loads(run.stdout)
    arguments, options = problem(9, 1000, 83, torch.float32)
    expected = reference(**arguments, **options)
    assert active == variant and token == expected.token.tolist()
    torch.testing.assert_close(torch.tensor(logprob), expected.logprob, rtol=2e-5, atol=5e-5)
    torch.testing.assert_close(torch.tensor(confidence), expected.confidence, rtol=2e-5, atol=5e-5)
