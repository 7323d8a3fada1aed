"""What a training run leaves behind while it runs: a progress bar, a JSON log, a picture of the losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from layerskip_kernels.files import write_whole

LOG, PICTURE = "log.jsonl", "loss.png"


class TrainingLog(TrainerCallback):
    """Writes `log.jsonl` (one object per log) and `loss.png`, and shows the loss of every exit beside the progress.

    Started on a checkpoint, the log continues after the checkpoint's last entry.
    """

    def __init__(self, folder: Path):
        self.folder, self.bar = folder, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
        write_whole(self.folder / LOG, lines.encode())
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        if self.bar is None or ("loss" not in (logs or {}) and "eval_loss" not in (logs or {})):
            return
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(state.log_history[-1]) + "\n")
        if "loss" in logs:
            exits = {name[5:-5]: value for name, value in logs.items() if name.startswith("exit_")}
            self.bar.set_postfix_str(" ".join(f"{layer}:{loss:.2f}" for layer, loss in exits.items()))

    def on_save(self, args, state, control, **kwargs):
        if self.bar is not None:
            draw_losses(state.log_history, self.folder / PICTURE)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            draw_losses(state.log_history, self.folder / PICTURE)


def draw_losses(history: list[dict[str, Any]], path: Path) -> None:
    """The loss after every exit, and on held-out text, over the steps. Nothing without two points to join."""
    from io import BytesIO

    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "eval_loss" or name.startswith("exit_"):
                curves.setdefault(name, []).append((entry["step"], value))
    if not any(len(points) > 1 for points in curves.values()):
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    exits = sorted((int(name[5:-5]), name) for name in curves if name.startswith("exit_"))
    for place, (layer, name) in enumerate(exits):
        axes.plot(*zip(*curves[name]), color=f"C{place % 10}", linewidth=1, label=f"after layer {layer}")
    if "eval_loss" in curves:
        axes.plot(*zip(*curves["eval_loss"]), "k.-", label="held out, last layer")
    axes.set(xlabel="step", ylabel="cross entropy (nats per token)")
    axes.legend(fontsize="x-small", ncols=2)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=120)
    write_whole(path, data.getvalue())
