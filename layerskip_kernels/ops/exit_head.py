from __future__ import annotations

from typing import NamedTuple

import torch

from layerskip_kernels.ops import _check, _library
from layerskip_kernels.ops.quantized import QuantizedWeight, check_weight, quantize, refuse_tracing
from layerskip_kernels.registry import resolve


class Sampling(NamedTuple):
    """How each row draws its token. Every field is a tensor [N] on the device, so that graphs replay fresh noise.

    The noise at (seed, stream, position, token) is a fixed function of these four (see `reference/gumbel.py`), so two
    calls that agree on them agree on the noise, whatever else they differ in.
    """

    temperature: torch.Tensor  # float32; 0: the row is greedy
    seed: torch.Tensor  # int64
    position: torch.Tensor  # int64: position in the sequence of the token being drawn
    stream: torch.Tensor | None = None  # int64: request number; None: 0
    top_k: torch.Tensor | None = None  # int64; 0: off
    top_p: torch.Tensor | None = None  # float32; 1: off
    min_p: torch.Tensor | None = None  # float32; 0: off


class RepetitionPenalty(NamedTuple):
    """Makes the tokens that a row has seen less likely (CTRL, arXiv 1909.05858; as transformers defines it).

    N / R rows in a row, the window of a sequence, share what was seen; those at later positions have seen more of it.
    """

    factor: torch.Tensor  # [N] float32, above 0; 1: off
    first_seen: torch.Tensor  # [R, V] uint8: window position from which on a token is seen; 255: never
    position: torch.Tensor  # [N] uint8, below 255: the row's window position

    def share(self, rows: int) -> int:
        """N / R."""
        return rows // max(len(self.first_seen), 1)


class Screen(NamedTuple):
    """A quantized copy of the LM head that is read in its place, and names the few rows of it that are read as well.

    With `error` the token is to the bit the one of the LM head alone: all rows that could hold the largest score are
    looked at again, and the whole head where these would be too many, where rows filter (top-k, top-p, min-p), or where
    `logits_out` is asked for. `logprob` and `confidence` may be the copy's, up to the token's own logit; whether they
    are may depend on the other rows.

    Without, the `RESCORED` largest scores are: with filters, the largest logits. The token is the best of these, or is
    drawn from what the filters keep after these have their own logits; `logits_out` has these and else the copy's.
    """

    weight: QuantizedWeight  # [V, C]
    error: torch.Tensor | None = None  # [V] float32: see `head_screen`

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.error is None else self.error.nbytes)


RESCORED = 16


def head_screen(lm_head: torch.Tensor, bits: int, *, exact: bool = False) -> Screen:
    """A screen of an LM head [V, C] in 8 or 4 bits, groups of 64 columns.

    exact: with the error that makes it exact. It takes 8 bits: in 4 nearly every token could be the largest. For a
    row x after the norm, ``|x · lm_head[v] - x · copy[v]| <= error[v] · |x|`` holds for the products as any backend
    computes them, by Cauchy and Schwarz: ``error[v] = |lm_head[v] - copy[v]| + |lm_head[v]| · rounding``. Activations
    beside quantized weights are rounded to 15 bits in blocks of 64, |δx| <= 2^-11 |x|; a sum of C products in float32,
    in any order, is off by C · 2^-24 of |x| |lm_head[v]| at most, and there are two.

    Raises:
        TypeError, ValueError: as `quantize`; or exact with 4 bits.
    """
    if exact and bits != 8:
        raise ValueError(f"bits={bits}: an exact screen has 8")
    if not exact:
        return Screen(quantize(lm_head, bits))
    rows, width = lm_head.shape
    error, norm = (lm_head.new_empty(rows, dtype=torch.float32) for _ in range(2))
    weight = quantize(lm_head, bits, error=error, norm=norm)
    rounding = 2.0**-11 + (2 * width + 64) * 2.0**-24
    return Screen(weight, error.mul_(1.01).add_(norm, alpha=1.02 * rounding))


class ExitHead(NamedTuple):
    token: torch.Tensor  # [N] int64
    logprob: torch.Tensor  # [N] float32, of the token, after the penalty, before temperature and filters
    confidence: torch.Tensor  # [N] float32, the largest probability, at the same point


_SAMPLING_DTYPES = Sampling(
    torch.float32, torch.int64, torch.int64, torch.int64, torch.int64, torch.float32, torch.float32
)


def exit_head(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    lm_head: torch.Tensor | QuantizedWeight,
    *,
    eps: float,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    penalty: RepetitionPenalty | None = None,
    sampling: Sampling | None = None,
    logits_out: torch.Tensor | None = None,
    screen: Screen | None = None,
    out: ExitHead | None = None,
) -> ExitHead:
    """Final norm, LM head and choice of the token, for the draft's exit and for the last layer alike.

    ``logits = softcap · tanh(logit_scale · (rms_norm(hidden) @ lm_headᵀ + bias) / softcap)`` in float32, never rounded.
    With a penalty, logits of seen tokens are then divided by its factor where positive and multiplied where negative.
    Greedy: arg-max, the lowest index wins ties. Sampling: ``argmax(filtered(logits / temperature) + Gumbel noise)``,
    which draws exactly from ``softmax(filtered(logits / temperature))``; filters are top-k, top-p, min-p in this order,
    as transformers defines them. NaN counts as minus infinity in the choice.

    Args:
        hidden: [N, C] float32, float16 or bfloat16, before the final norm.
        norm_weight: [C]; lm_head: [V, C], or a `QuantizedWeight` of that shape; bias: [V]; dtype of hidden.
        eps: of the norm, > 0.
        logit_scale, softcap: see above, both > 0; softcap=None: no cap.
        penalty: `RepetitionPenalty`; None: none.
        sampling: `Sampling`; None: greedy.
        logits_out: [N, V] float32, receives the logits, penalty included.
        screen: `Screen`, read in place of lm_head; None: none.
        out: `ExitHead` of tensors to write the result to.

    Returns:
        `ExitHead` (token [N] int64, logprob [N] float32, confidence [N] float32).

    Raises:
        TypeError, ValueError: an argument of wrong dtype, shape, device or range.
    """
    _check.tensor("hidden", hidden, (None, None), dtype=_check.FLOATS)
    rows, width = hidden.shape
    _check.tensor("norm_weight", norm_weight, (width,), dtype=hidden.dtype, like=hidden)
    check_weight("lm_head", lm_head, (None, width), dtype=hidden.dtype, like=hidden)
    quantized = isinstance(lm_head, QuantizedWeight)
    vocab = lm_head.shape[0]
    if not vocab:
        raise ValueError("lm_head: an empty vocabulary, expected at least one row")
    _check.positive("eps", eps)
    _check.optional("bias", bias, (vocab,), dtype=hidden.dtype, like=hidden)
    if softcap is not None:
        _check.positive("softcap", softcap)
    _check.positive("logit_scale", logit_scale)
    if penalty is not None:
        if not isinstance(penalty, RepetitionPenalty):
            raise TypeError(f"penalty: expected a RepetitionPenalty, got {type(penalty).__name__}")
        _check.tensor("penalty.factor", penalty.factor, (rows,), dtype=torch.float32, like=hidden)
        _check.tensor("penalty.first_seen", penalty.first_seen, (None, vocab), dtype=torch.uint8, like=hidden)
        if penalty.share(rows) * len(penalty.first_seen) != rows:
            raise ValueError(f"penalty.first_seen: {len(penalty.first_seen)} rows, expected a divisor of N = {rows}")
        _check.tensor("penalty.position", penalty.position, (rows,), dtype=torch.uint8, like=hidden)
    if sampling is not None:
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling: expected a Sampling, got {type(sampling).__name__}")
        for name, value, dtype in zip(Sampling._fields, sampling, _SAMPLING_DTYPES):
            required = name in ("temperature", "seed", "position")
            (_check.tensor if required else _check.optional)(
                f"sampling.{name}", value, (rows,), dtype=dtype, like=hidden
            )
    _check.optional("logits_out", logits_out, (rows, vocab), dtype=torch.float32, like=hidden)
    if screen is not None:
        if not isinstance(screen, Screen) or not isinstance(screen.weight, QuantizedWeight):
            raise TypeError("screen: expected a Screen of a QuantizedWeight")
        check_weight("screen.weight", screen.weight, (vocab, width), like=hidden)
        _check.optional("screen.error", screen.error, (vocab,), dtype=torch.float32, like=hidden)
        if screen.error is not None and (screen.weight.bits != 8 or screen.weight.offset is not None):
            raise ValueError("screen.weight: with an error it has 8 bits and no offset")
        refuse_tracing("screen")
    if out is not None:
        if not isinstance(out, ExitHead):
            raise TypeError(f"out: expected an ExitHead, got {type(out).__name__}")
        for name, value, dtype in zip(ExitHead._fields, out, (torch.int64, torch.float32, torch.float32)):
            _check.tensor(f"out.{name}", value, (rows,), dtype=dtype, like=hidden)
    if quantized:
        refuse_tracing("lm_head")
    if torch.compiler.is_compiling():
        result = torch.ops.layerskip_kernels.exit_head(
            hidden,
            norm_weight,
            lm_head,
            eps,
            bias,
            logit_scale,
            softcap,
            *(sampling or (None,) * 7),
            logits_out,
            *(penalty or (None,) * 3),
        )
        return ExitHead(*_library.into(out, result))
    return resolve("exit_head", hidden.device, hidden.dtype, quantized=quantized or screen is not None)(
        hidden,
        norm_weight,
        lm_head,
        eps=eps,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        penalty=penalty,
        sampling=sampling,
        logits_out=logits_out,
        **({} if screen is None else {"screen": screen}),  # other backends have none
        out=out,
    )


def _kernel(
    hidden,
    norm_weight,
    lm_head,
    eps,
    bias=None,
    logit_scale=1.0,
    softcap=None,
    temperature=None,
    seed=None,
    position=None,
    stream=None,
    top_k=None,
    top_p=None,
    min_p=None,
    logits_out=None,
    factor=None,
    first_seen=None,
    position_in_window=None,
):
    sampling = Sampling(temperature, seed, position, stream, top_k, top_p, min_p)
    return tuple(
        exit_head(
            hidden,
            norm_weight,
            lm_head,
            eps=eps,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            penalty=None if factor is None else RepetitionPenalty(factor, first_seen, position_in_window),
            sampling=None if temperature is None else sampling,
            logits_out=logits_out,
        )
    )


def _fake(hidden, *args, **kwargs):
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.float32),
    )


_library.register(
    "exit_head(Tensor hidden, Tensor norm_weight, Tensor lm_head, float eps, Tensor? bias=None, "
    "float logit_scale=1.0, float? softcap=None, Tensor? temperature=None, Tensor? seed=None, "
    "Tensor? position=None, Tensor? stream=None, Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None, "
    "Tensor(a!)? logits_out=None, Tensor? factor=None, Tensor? first_seen=None, Tensor? position_in_window=None) "
    "-> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)
