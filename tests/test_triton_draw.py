"""Which token a draw falls on, where sums are not what the CPU's scans make them: a GPU, or Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from layerskip_kernels import registry
from layerskip_kernels.triton.verify_rejection import first_past

BACKEND = "triton"
INTERPRETED = registry.why_not("triton", "swiglu", torch.device("cpu"), torch.float32) is None
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@triton.jit
def draw_kernel(ends_ptr, weights_ptr, goal_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr, first_past(tl.load(goal_ptr), tl.load(ends_ptr + i), tl.load(weights_ptr + i), i))


@pytest.mark.parametrize(
    ("weights", "goal", "chosen"),
    [
        ([0.0, 0.5, 0.0, 0.5], 0.0, 1),
        ([0.5, 0.0, 0.0, 0.5], 0.5, 3),  # the end of index 1 is a rounding past the goal, but nothing is there to draw
        ([0.5, 0.5, 0.0, 0.0], 1.0, 1),  # past the goal only where the weight is zero: the last that can be drawn
    ],
)
def test_a_token_of_weight_zero_is_never_drawn(weights, goal, chosen):
    """The ends rise by a rounding at every zero after the first weight, as those of a scan in a tree's order may."""
    weights = torch.tensor(weights, dtype=torch.float64)
    ends = weights.cumsum(0)
    ends = torch.where((weights == 0) & (ends > 0), ends * (1 + 2**-52), ends)
    goal, out = torch.tensor(goal, dtype=torch.float64), torch.empty(1, dtype=torch.int32, device=DEVICE)
    draw_kernel[(1,)](*(t.to(DEVICE) for t in (ends, weights, goal)), out, N=len(weights))
    assert out.item() == chosen
