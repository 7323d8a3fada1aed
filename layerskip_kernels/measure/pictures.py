"""The pictures of the measuring commands, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from layerskip_kernels.measure.lens import LayerReport, Lens

TOKENS_SHOWN = 24  # in the logit lens: more would not be legible


def draw_lens(rows: Sequence[LayerReport], known: Sequence[int], lens: Lens, tokenizer: Any) -> Figure:
    """Agreement and entropy by layer, where tokens become known, and the last tokens of a text layer by layer.

    Args:
        rows: one per layer.
        known: tokens whose first stable layer is 1..L.
        lens: the text whose tokens are shown.
        tokenizer: turns ids into text.
    """
    layers = [row.layer for row in rows]
    shown = min(TOKENS_SHOWN, len(lens.text))
    figure = Figure(figsize=(max(9.0, 2 + 0.62 * shown), 4 + 0.3 * len(rows)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 0.5 + 0.3 * len(rows)))
    agreement, entropy, histogram = top.subplots(1, 3)
    total = sum(known)
    agreement.plot(layers, [row.agreement for row in rows], ".-")
    agreement.set(title="agrees with the last layer", ylim=(0, 1.03))
    agreement.yaxis.set_major_formatter("{x:.0%}")
    entropy.plot(layers, [row.entropy for row in rows], ".-", color="C1")
    entropy.set(title="entropy (nats)", ylim=(0, 1.05 * max(row.entropy for row in rows)))
    histogram.bar(layers, [count / total for count in known], color="C2")
    histogram.set(title="tokens known from this layer on")
    histogram.yaxis.set_major_formatter("{x:.0%}")
    for axes in (agreement, entropy, histogram):
        axes.set_xlabel("after layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _draw_tokens(bottom, lens, shown, tokenizer)
    return figure


def _draw_tokens(figure: Any, lens: Lens, shown: int, tokenizer: Any) -> None:
    axes = figure.subplots()
    tokens, entropy = lens.tokens[:, -shown:], lens.entropy[:, -shown:]
    image = axes.imshow(entropy.numpy(), aspect="auto", cmap="YlGnBu_r", vmin=0)
    dark = entropy.max().item() * 0.45
    agrees = (tokens == tokens[-1]).tolist()
    for layer, row in enumerate(tokens.tolist()):
        for place, token in enumerate(row):
            axes.text(
                place,
                layer,
                _visible(tokenizer, token),
                ha="center",
                va="center",
                fontsize=6,
                parse_math=False,
                clip_on=True,
                fontweight="bold" if agrees[layer][place] else "normal",
                color="white" if entropy[layer, place] < dark else "0.2",
            )
    axes.set(title="what each layer would say (bold: as the last layer); below, the token that came")
    axes.set_yticks(range(len(tokens)), range(1, len(tokens) + 1))
    axes.set_ylabel("after layer")
    truth = [_visible(tokenizer, token) for token in lens.text[-shown:].tolist()]
    axes.set_xticks(range(shown), truth, fontsize=7, rotation=60, parse_math=False)
    figure.colorbar(image, label="entropy (nats)", pad=0.01)


def _visible(tokenizer: Any, token: int) -> str:
    """A token's text with its line ends and tabs shown, cut to fit a cell."""
    text = tokenizer.decode([token]).replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u00b7")
    text = "".join(c if c.isprintable() and c != "\ufffd" else "?" for c in text)
    return text if len(text) <= 9 else text[:8] + "…"
