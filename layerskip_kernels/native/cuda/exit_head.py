from __future__ import annotations

import torch
from torch import Tensor

from layerskip_kernels.native import _cuda
from layerskip_kernels.native.cuda import launch
from layerskip_kernels.native.cuda.launch import address, optional
from layerskip_kernels.native.cuda.rms_norm import rms_norm
from layerskip_kernels.native.tensor import dtype_code
from layerskip_kernels.ops.exit_head import ExitHead, RepetitionPenalty, Sampling

_GREEDY = Sampling(*(None,) * len(Sampling._fields))


def exit_head(
    hidden: Tensor,
    norm_weight: Tensor,
    lm_head: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    penalty: RepetitionPenalty | None = None,
    sampling: Sampling | None = None,
    logits_out: Tensor | None = None,
    out: ExitHead | None = None,
) -> ExitHead:
    """See layerskip_kernels.ops.exit_head."""
    (n, c), vocab = hidden.shape, lm_head.shape[0]
    new = hidden.new_empty
    if out is None:
        floats = (new(n, dtype=torch.float32) for _ in range(2))
        out = ExitHead(new(n, dtype=torch.int64), *floats)
    settings = sampling or _GREEDY
    repetition = [0] * 5
    if penalty is not None:
        factor, first_seen, position = penalty
        repetition = [
            address(factor, "penalty.factor"),
            address(first_seen, "penalty.first_seen"),
            first_seen.stride(0),
            address(position, "penalty.position"),
            penalty.share(n),
        ]
    logits = logits_out
    if logits is None and any(f is not None for f in (settings.top_k, settings.top_p, settings.min_p)):
        logits = new(n, vocab, dtype=torch.float32)
    partials = new(n * -(-vocab // _cuda.TILE_ROWS) * _cuda.PARTIAL_BYTES, dtype=torch.uint8)
    norm = address(norm_weight, "norm_weight")
    x = hidden
    if n > _cuda.FUSED_NORM_ROWS:
        x, norm = rms_norm(hidden, norm_weight, eps), 0
    launch.run(
        "exit_head",
        _cuda.exit_head,
        (hidden, lm_head),
        address(x, "hidden"),
        x.stride(0),
        norm,
        eps,
        address(lm_head, "lm_head"),
        lm_head.stride(0),
        optional(bias, "bias"),
        logit_scale,
        softcap or 0.0,
        repetition,
        [optional(value, f"sampling.{name}") for name, value in settings._asdict().items()],
        optional(logits, "logits_out"),
        0 if logits is None else logits.stride(0),
        logits_out is not None,
        address(partials, "partials"),
        address(out.token, "out.token"),
        address(out.logprob, "out.logprob"),
        address(out.confidence, "out.confidence"),
        n,
        c,
        vocab,
        dtype_code(hidden, "hidden"),
    )
    return out
