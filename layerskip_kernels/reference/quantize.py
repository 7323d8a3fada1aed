import torch

from layerskip_kernels.ops.quantized import BLOCK, not_finite, stored, unset

_ROWS_AT_ONCE = 4096
_LIMITS = {8: (-127, 127), 4: (-8, 7)}


def quantize(weight, bits, group=BLOCK, *, error=None, norm=None):
    """See layerskip_kernels.ops.quantize."""
    result = unset(weight, bits, group)
    rows, width = weight.shape
    groups = result.scale.shape[1]
    for first in range(0, rows, _ROWS_AT_ONCE):
        some = slice(first, min(first + _ROWS_AT_ONCE, rows))
        w = weight[some].float()
        if not w.isfinite().all():
            raise not_finite(first + int(w.isfinite().all(1).logical_not().nonzero()[0, 0]))
        w = torch.nn.functional.pad(w, (0, groups * group - width)).view(len(w), groups, group)
        if bits == 8:
            step = w.abs().amax(2) / 127
        else:
            step = w.gather(2, w.abs().argmax(2, keepdim=True))[..., 0] / -8
        step = step.to(torch.bfloat16).float()
        # The smallest numbers have a step so coarse that more than a rounding lies beyond the limits.
        q = (w / torch.where(step == 0, 1, step)[..., None]).round_().clamp_(*_LIMITS[bits])
        if error is not None:
            error[some] = _norms(w - q * step[..., None])
        if norm is not None:
            norm[some] = _norms(w)
        q = q.view(len(w), -1)[:, :width].to(torch.int8)
        result.values[some] = stored(q, bits)
        result.scale[some] = step
    return result


def _norms(w):
    return torch.linalg.vector_norm(w.flatten(1), dim=1, dtype=torch.float64)
