from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cpu
from layerskip_kernels.native.cpu.quantized import quantization, stored
from layerskip_kernels.native.tensor import address, dtype_code
from layerskip_kernels.ops.exit_head import ExitHead, RepetitionPenalty, Sampling, Screen
from layerskip_kernels.ops.quantized import QuantizedWeight


def exit_head(
    hidden: Tensor,
    norm_weight: Tensor,
    lm_head: Tensor | QuantizedWeight,
    *,
    eps: float,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    penalty: RepetitionPenalty | None = None,
    sampling: Sampling | None = None,
    logits_out: Tensor | None = None,
    screen: Screen | None = None,
    out: ExitHead | None = None,
) -> ExitHead:
    """See layerskip_kernels.ops.exit_head."""
    n, c = hidden.shape
    elements = stored(lm_head)
    if out is None:
        out = ExitHead(
            torch.empty(n, dtype=torch.int64),
            torch.empty(n, dtype=torch.float32),
            torch.empty(n, dtype=torch.float32),
        )
    repetition = ()
    if penalty is not None:
        factor, first_seen, position = penalty
        repetition = (
            address(factor, "penalty.factor", "cpu"),
            address(first_seen, "penalty.first_seen", "cpu"),
            first_seen.stride(0),
            address(position, "penalty.position", "cpu"),
            penalty.share(n),
        )
    fields = ()
    if sampling is not None:
        fields = tuple([0 if t is None else address(t, "sampling", "cpu") for t in sampling])
    screened: tuple = ((), ())
    if screen is not None:
        weight, error = screen
        where = (
            address(weight.values, "screen.weight.values", "cpu"),
            weight.values.stride(0),
            0 if error is None else address(error, "screen.error", "cpu"),
        )
        screened = (where, quantization(weight, "screen.weight"))
    _cpu.exit_head(
        address(hidden, "hidden", "cpu"),
        hidden.stride(0),
        address(norm_weight, "norm_weight", "cpu"),
        eps,
        address(elements, "lm_head", "cpu"),
        elements.stride(0),
        0 if bias is None else address(bias, "bias", "cpu"),
        logit_scale,
        softcap or 0.0,
        repetition,
        fields,
        0 if logits_out is None else address(logits_out, "logits_out", "cpu"),
        0 if logits_out is None else logits_out.stride(0),
        address(out.token, "out.token", "cpu"),
        address(out.logprob, "out.logprob", "cpu"),
        address(out.confidence, "out.confidence", "cpu"),
        n,
        c,
        elements.shape[0],
        dtype_code(hidden, "hidden"),
        torch.get_num_threads(),
        quantization(lm_head, "lm_head"),
        *screened,
    )
    return out
