"""Draws docs/schedules.png, the schedules of docs/training.md: python docs/plot_schedules.py [output.png]"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from layerskip_kernels.training.curriculum import gradual, rotational
from layerskip_kernels.training.early_exit_loss import normalised_weights
from layerskip_kernels.training.layer_dropout import dropout_rate

LAYERS, STEPS = 32, 1000


def draw(path: str | Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), constrained_layout=True)
    layers = range(LAYERS)

    axis = axes[0, 0]
    axis.plot(layers, [dropout_rate(layer, LAYERS, 0.1) for layer in layers], "k", label="constant, every step")
    for step in (250, 500, 750):
        rates = [dropout_rate(layer, LAYERS, 0.1, step, STEPS, "exponential") for layer in layers]
        axis.plot(layers, rates, label=f"exponential, t/T = {step / STEPS:g}")
    axis.set(title="layer dropout p(l, t), p_max = 0.1", xlabel="layer l", ylabel="rate")

    axis = axes[0, 1]
    for e_scale in (0.1, 0.2, 1.0):
        weights = normalised_weights(layers, LAYERS, e_scale)
        axis.semilogy(list(weights), list(weights.values()), ".-", label=f"e_scale = {e_scale:g}")
    axis.set(title="weight of an exit, all enabled", xlabel="layer l", ylabel="normalised e(l)")

    rounds = range(24)
    enabled = {step: rotational(step, LAYERS, 8) for step in rounds}
    points = [(step, layer) for step in rounds for layer in enabled[step]]
    axes[1, 0].plot(*zip(*points), "s", markersize=3.5)
    axes[1, 0].set(title="rotational curriculum, R = 8", xlabel="step", ylabel="layer l")

    steps = range(0, STEPS, 2)
    axes[1, 1].fill_between(steps, [gradual(t, LAYERS, STEPS)[0] for t in steps], LAYERS - 1, step="post", alpha=0.6)
    axes[1, 1].set(title=f"gradual curriculum, T = {STEPS}", xlabel="step", ylabel="enabled layers")

    for axis in axes[0]:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("schedules.png"))
