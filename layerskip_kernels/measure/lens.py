"""The logit lens: what a model would say after each of its layers (arXiv 2404.16710, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerskip_kernels.decode.batch import SamplingOptions
from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.model import Model
from layerskip_kernels.measure.teacher import heads, pieces


@dataclass(frozen=True)
class Lens:
    """Every exit's prediction of N tokens of a text, each given all true tokens before it."""

    text: Tensor  # [N] int64: the tokens that came
    tokens: Tensor  # [L, N] int64: what the model would have said, leaving after layer l + 1
    entropy: Tensor  # [L, N] float32: of that prediction, in nats
    logprob: Tensor  # [L, N] float32: of the token that came

    def agreement(self) -> Tensor:
        """[L, N] bool: the exit says what the last layer says."""
        return self.tokens == self.tokens[-1]

    def first_stable_layer(self) -> Tensor:
        """[N] int64, 1..L: the earliest exit from which on all say what the last layer says."""
        return len(self.tokens) + 1 - self.agreement().flip(0).long().cumprod(0).sum(0)

    def drafts(self) -> list[list[bool]]:
        """[L][N]: whether the exit drafts the token that came."""
        return (self.tokens == self.text).tolist()


@dataclass(frozen=True)
class LayerReport:
    """One exit on a text: leaving after `layer` layers."""

    layer: int
    loss: float  # cross entropy in nats per token, teacher forced
    agreement: float  # share of positions where its token is the last layer's, teacher forced
    entropy: float  # of its predictions, mean in nats


def layer_reports(lenses: Sequence[Lens]) -> list[LayerReport]:
    """Loss, agreement and entropy of every exit over several texts. Raises ValueError when they hold no token."""
    count = sum(len(lens.text) for lens in lenses)
    if not count:
        raise ValueError("there is no text of two tokens or more to measure on")
    loss, agreed, entropy = (
        (sum(part.double().sum(1) for part in parts) / count).tolist()
        for parts in zip(*((-lens.logprob, lens.agreement(), lens.entropy) for lens in lenses))
    )
    return [LayerReport(layer, *values) for layer, values in enumerate(zip(loss, agreed, entropy), 1)]


@torch.inference_mode()
def read(
    decoder,
    prompt: Sequence[int],
    continuation: Sequence[int] = (),
    sampling: SamplingOptions | None = None,
    *,
    drafting: bool = False,
) -> Lens:
    """Looks at the `continuation` of a prompt, or without one at the prompt itself, from its second token on.

    The continuation runs through the kernels that decode, in their numbers: on a text that `decoder` generated, the
    last exit says exactly its tokens, and every other exit exactly what it would have drafted there. With `sampling`
    the exits draw their tokens, with the noise that decoding has at the same positions. `drafting`: the exits speak
    through the layers and the head that draft where `max_batch_size` sequences decode together, which may be quantized
    copies; the last layer never does. Copies of layers see their own K/V in the window they run over, up to 64 tokens,
    in decoding only in a draft.
    """
    model: Model = decoder.model
    ids = torch.tensor([*prompt, *continuation], dtype=torch.int64, device=model.device)
    prompt_length, first = (len(prompt), len(prompt) - 1) if continuation else (len(prompt) - 1, 0)
    cache = KVCache(model.config, 1, len(ids), model.dtype, model.device)
    found = []
    for piece in pieces(model, cache, ids[:-1], prompt_length):
        start = piece.start + min(max(first - piece.start, 0), piece.stop - piece.start)
        rows = []
        copies = piece.hidden.clone() if drafting and model.copies_draft(decoder.max_batch_size) else None
        for layer in range(model.config.num_layers):
            drafts = drafting and layer + 1 < model.config.num_layers
            said = piece.hidden
            if drafts and copies is not None:
                piece.run_draft_layers(layer, layer + 1, copies)
                said = copies
            piece.run_layers(layer, layer + 1)
            hidden, targets = said[0, start - piece.start :], ids[start + 1 : piece.stop + 1]
            rows.append(_predict(model, hidden, targets, start + 1, sampling, drafts))
        found.append([torch.stack(part) for part in zip(*rows)])
    return Lens(ids[first + 1 :].cpu(), *(torch.cat(part, 1) for part in zip(*found)))


def read_all(decoder, rows: Iterable[Sequence[int]]) -> list[Lens]:
    """Every row of token ids that has something to predict, read as it is."""
    return [read(decoder, row) for row in rows if len(row) > 1]


def _predict(
    model: Model, hidden: Tensor, targets: Tensor, position: int, sampling: SamplingOptions | None, drafts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, entropies and the targets' log-probabilities, [N] each on the CPU, for hidden [N, C]."""
    tokens = torch.empty(len(hidden), dtype=torch.int64)
    entropy, logprob = torch.empty(len(hidden)), torch.empty(len(hidden))
    for part, token, logits in heads(model, hidden, position, sampling, drafts=drafts):
        logp = logits.log_softmax(-1)
        tokens[part] = token.cpu()
        entropy[part] = -(logp.exp() * logp).nan_to_num(0.0).sum(-1).cpu()
        logprob[part] = logp.gather(1, targets[part, None])[:, 0].cpu()
    return tokens, entropy, logprob
