from __future__ import annotations

from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address
from layerskip_kernels.native.cuda.verify_tokens import round_fields
from layerskip_kernels.ops.verify_tokens import Verified


def verify_rejection(
    draft: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    num_draft: Tensor,
    *,
    method: str = "standard",
    eos_ids: Tensor,
    remaining: Tensor,
    finished: Tensor,
    out: Verified | None = None,
) -> Verified:
    """See layerskip_kernels.ops.verify_rejection."""
    fields, out = round_fields(draft, num_draft, eos_ids, remaining, finished, out)
    launch.run(
        "verify_rejection",
        _cuda.verify_rejection,
        (draft, target_probs),
        fields,
        address(draft_probs, "draft_probs"),
        draft_probs.stride()[:2],
        address(target_probs, "target_probs"),
        target_probs.stride()[:2],
        address(uniforms, "uniforms"),
        uniforms.stride()[:2],
        target_probs.shape[2],
        method == "block",
    )
    return out
