"""The pictures of the measuring commands, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from layerskip_kernels.measure.lens import LayerReport, Lens
from layerskip_kernels.measure.sweep import Cell, rank

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


def draw_sweep(cells: Sequence[Cell]) -> Figure:
    """Speed-up over (E, K) as a heat map and as contours; the best cell has a star, predictions are in italics."""
    layers = sorted({cell.exit_layer for cell in cells})
    speculations = sorted({cell.num_speculations for cell in cells})
    grid = np.full((len(layers), len(speculations)), np.nan)
    for cell in cells:
        grid[layers.index(cell.exit_layer), speculations.index(cell.num_speculations)] = cell.best_known or np.nan
    # a contour needs two points each way, and no hole
    contours = min(grid.shape) > 1 and not np.isnan(grid).any()
    height = 2 + 0.32 * len(layers)
    figure = Figure(figsize=((2.2 if contours else 1.2) * (3 + 0.5 * len(speculations)), max(4, height)))
    figure.set_layout_engine("constrained")
    all_axes = figure.subplots(1, 2 if contours else 1, squeeze=False)[0]
    reach = max(abs(np.nanmax(grid) - 1), abs(1 - np.nanmin(grid)), 0.05)
    scale = dict(cmap="RdBu", vmin=1 - reach, vmax=1 + reach)  # white: neither faster nor slower
    image = all_axes[0].imshow(grid, aspect="auto", origin="lower", **scale)
    best = min(cells, key=rank)
    for cell in cells:
        place = speculations.index(cell.num_speculations), layers.index(cell.exit_layer)
        value = cell.best_known
        if value is None:
            continue
        text = f"{value:.2f}" + (" \u2605" if cell is best else "")
        style = "italic" if cell.speedup is None else "normal"
        color = "white" if abs(value - 1) > 0.65 * reach else "black"
        all_axes[0].text(*place, text, ha="center", va="center", fontsize=7, style=style, color=color)
    all_axes[0].set_xticks(range(len(speculations)), speculations)
    all_axes[0].set_yticks(range(len(layers)), layers)
    if contours:
        lines = all_axes[1].contourf(speculations, layers, grid, levels=12, **scale)
        all_axes[1].contour(lines, colors="0.3", linewidths=0.5)
        all_axes[1].plot(best.num_speculations, best.exit_layer, "k*", markersize=14, clip_on=False)
        for axis in (all_axes[1].xaxis, all_axes[1].yaxis):
            axis.get_major_locator().set_params(integer=True)
    for axes in all_axes:
        axes.set(xlabel="drafts per round, K", ylabel="exit layer, E")
    predicted = any(cell.speedup is None for cell in cells)
    figure.suptitle("speed-up over autoregressive decoding" + (" (italics: predicted)" if predicted else ""))
    figure.colorbar(image, ax=list(all_axes), label="speed-up")
    return figure
