"""How well a model's exits draft: agreement by layer, acceptance by (E, K), and which (E, K) pays best."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layerskip_kernels.files import write_whole
from layerskip_kernels.models.checkpoint import read_json
from layerskip_kernels.training.parts import model_parts

MAX_SPECULATIONS = 12  # K is looked for in 1..12


@dataclass(frozen=True)
class LayerReport:
    """One exit on held-out text: leaving after `layer` layers."""

    layer: int
    loss: float  # cross entropy in nats per token, teacher forced
    agreement: float  # share of positions where its greedy token is the last layer's, teacher forced


@dataclass(frozen=True)
class Setting:
    """(E, K), what it accepts on the model's own greedy text, and what that is worth."""

    exit_layer: int
    num_speculations: int
    acceptance_rate: float  # accepted / drafted
    position_acceptance: float  # accepted / positions decided: alpha
    tokens_per_round: float
    ceiling: float  # expected speed-up over autoregressive decoding when time is bytes of weights read


@torch.inference_mode()
def exit_tokens(model: nn.Module, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Greedy next tokens after every layer: [L, T] for `ids` [1, T]; and sums of cross entropy [L] to `targets` [T].

    Rows are exits: the last one is the whole model.
    """
    parts = model_parts(model)
    states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    tokens, losses = [], []
    for layer, hidden in enumerate(states[1:], 1):
        normed = hidden if layer == len(parts.layers) else parts.norm(hidden)  # transformers normed the last one
        logits = parts.lm_head(normed)[0].float()
        tokens.append(logits.argmax(-1))
        if targets is not None:
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return torch.stack(tokens), torch.stack(losses) if losses else None


def layer_reports(model: nn.Module, rows: Iterable[Sequence[int]]) -> list[LayerReport]:
    """Loss and agreement of every exit over rows of token ids, each read teacher forced."""
    agreed = losses = 0
    count = 0
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        tokens, loss = exit_tokens(model, ids[:, :-1], ids[0, 1:])
        agreed = agreed + (tokens == tokens[-1]).sum(1)
        losses, count = losses + loss, count + tokens.shape[1]
    if not count:
        raise ValueError("there is no held-out text to measure on")
    return [
        LayerReport(layer, loss / count, same / count)
        for layer, (loss, same) in enumerate(zip(losses.tolist(), agreed.tolist()), 1)
    ]


def agreements(model: nn.Module, prompt: Sequence[int], continuation: Sequence[int]) -> list[list[bool]]:
    """[L, N]: whether each exit predicts token n of the model's own greedy `continuation` of `prompt`.

    One pass decides all drafts: a draft is only looked at where every token before it was right.
    """
    ids = torch.tensor([[*prompt, *continuation]], device=model.device)
    tokens, _ = exit_tokens(model, ids[:, :-1])
    first = len(prompt) - 1
    return (tokens[:, first:] == ids[0, first + 1 :]).tolist()


def simulate(agreed: Sequence[bool], num_speculations: int) -> tuple[int, int, int, int]:
    """Self-speculative rounds over a text of which `agreed[n]` tells whether the exit drafts token n right.

    Returns (rounds, drafted, accepted, decided): `decided` counts accepted drafts and first wrong ones.
    """
    rounds = drafted = accepted = decided = 0
    position = 1  # prefill gives the first token
    while position < len(agreed):
        # the last token of a text is never drafted: verification gives it anyway
        window = agreed[position : min(position + num_speculations, len(agreed) - 1)]
        right = next((n for n, same in enumerate(window) if not same), len(window))
        rounds, drafted, accepted = rounds + 1, drafted + len(window), accepted + right
        decided += min(right + 1, len(window))
        position += right + 1
    return rounds, drafted, accepted, decided


def settings(model: nn.Module, agreed: Sequence[list[list[bool]]]) -> list[Setting]:
    """Every (E, K) over the texts' `agreements`, the highest ceiling first.

    The ceiling is tokens per round over 1 + K d, where d is the share of the model's weights that a draft step reads:
    exit layers and head.
    """
    parts = model_parts(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in parts.layers]
    head = parts.lm_head.weight.numel()
    found = []
    for exit_layer in range(1, len(sizes)):
        draft = (sum(sizes[:exit_layer]) + head) / (sum(sizes) + head)
        for num_speculations in range(1, MAX_SPECULATIONS + 1):
            counts = [simulate(text[exit_layer - 1], num_speculations) for text in agreed]
            rounds, drafted, accepted, decided = (sum(column) for column in zip(*counts))
            if not rounds or not drafted:
                continue
            per_round = (rounds + accepted) / rounds
            found.append(
                Setting(
                    exit_layer,
                    num_speculations,
                    accepted / drafted,
                    accepted / max(decided, 1),
                    per_round,
                    per_round / (1 + num_speculations * draft),
                )
            )
    return sorted(found, key=lambda s: -s.ceiling)


def fastest(
    decoder, prompts: Sequence[Sequence[int]], choices: Sequence[Setting], *, max_new_tokens: int, repeats: int
):
    """(setting, tokens per second) of every choice and of autoregressive decoding (None), on this machine, best first.

    The choices are interleaved; each figure is a median over `repeats`.
    """
    speeds: dict[Setting | None, list[float]] = {choice: [] for choice in (None, *choices)}
    for repeat in range(repeats + 1):
        for choice, speed in speeds.items():
            options = {"generation_strategy": "autoregressive"}
            if choice:
                options = dict(exit_layer=choice.exit_layer, num_speculations=choice.num_speculations)
            tokens = seconds = 0
            for prompt in prompts:
                stats = decoder.generate([prompt], max_new_tokens=max_new_tokens, **options).stats
                tokens, seconds = tokens + stats.tokens, seconds + stats.decode_seconds
            if repeat:  # the first one warms up
                speed.append(tokens / seconds)
    medians = [(choice, statistics.median(speed)) for choice, speed in speeds.items()]
    return sorted(medians, key=lambda pair: -pair[1])


def record(folder: Path, setting: Setting, layers: Sequence[LayerReport], **more) -> None:
    """Writes (E, K) into the checkpoint's config.json, where decoding finds it, and all figures into exits.json."""
    config = read_json(folder / "config.json")
    config["layerskip"] = {"exit_layer": setting.exit_layer, "num_speculations": setting.num_speculations}
    write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    report = {"setting": asdict(setting), "layers": [asdict(layer) for layer in layers], **more}
    write_whole(folder / "exits.json", (json.dumps(report, indent=2) + "\n").encode())
