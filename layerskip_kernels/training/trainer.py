"""The recipe as a `transformers.Trainer`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from layerskip_kernels.training.curriculum import CURRICULA, enabled_exits
from layerskip_kernels.training.early_exit_loss import early_exit_loss, exit_weights
from layerskip_kernels.training.layer_dropout import TIME_SCHEDULES, LayerDropout
from layerskip_kernels.training.parts import model_parts


@dataclass
class LayerSkipArguments(TrainingArguments):
    """`transformers.TrainingArguments` and the recipe's options; `RECIPES[name].arguments()` are published ones."""

    layer_dropout: float = field(default=0.1, metadata={"help": "p_max of layer dropout, 0..1; 0: none"})
    layer_dropout_schedule: str = field(
        default="constant", metadata={"help": "constant (continual training) or exponential (from scratch)"}
    )
    e_scale: float = field(default=0.1, metadata={"help": "weight of the early exits beside the last layer, >= 0"})
    curriculum: str = field(default="rotational", metadata={"help": "all, rotational or gradual"})
    curriculum_interval: int = field(default=8, metadata={"help": "R of the rotational curriculum, 1..L"})
    curriculum_include_last: bool = field(
        default=True, metadata={"help": "the rotational curriculum trains the last layer at every step"}
    )
    distill_weight: float = field(default=0.0, metadata={"help": "weight of KL(last layer, exit); 0: none"})
    distill_temperature: float = field(default=1.0, metadata={"help": "temperature of both distributions, > 0"})
    focus_exit: int = field(default=0, metadata={"help": "exit E trained at every step, 1..L-1; 0: none"})
    focus_weight: float = field(default=0.25, metadata={"help": "share of the loss that focus_exit has, 0..1"})
    loss_chunk_size: int | None = field(default=None, metadata={"help": "rows of logits in memory at once"})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.layer_dropout <= 1:
            raise ValueError(f"layer_dropout={self.layer_dropout}: choose 0..1")
        if self.layer_dropout_schedule not in TIME_SCHEDULES:
            raise ValueError(
                f"layer_dropout_schedule={self.layer_dropout_schedule!r}: choose {', '.join(TIME_SCHEDULES)}"
            )
        if self.curriculum not in CURRICULA:
            raise ValueError(f"curriculum={self.curriculum!r}: choose {', '.join(CURRICULA)}")
        if not self.distill_weight >= 0:
            raise ValueError(f"distill_weight={self.distill_weight}: must be >= 0")
        if not self.distill_temperature > 0:
            raise ValueError(f"distill_temperature={self.distill_temperature}: must be > 0")
        if not 0 <= self.focus_weight < 1:
            raise ValueError(f"focus_weight={self.focus_weight}: choose 0 or more, below 1")
        exit_weights(2, self.e_scale)
        if self.layer_dropout and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # a layer that drops a rank's whole batch has no gradient there


class LayerSkipTrainer(Trainer):
    """`transformers.Trainer` with layer dropout and the early-exit loss; takes `LayerSkipArguments`.

    Training logs `exit_<E>_loss` beside `loss`: the cross entropy after the first E layers, a mean over the tokens
    since the last log on which that exit was enabled. Evaluation is the model's own, without dropout and early exits.
    Checkpoints appear whole or not at all: they are written to the folder `partial` and moved when they are complete.

    Raises ValueError for a model the recipe does not support, or several GPUs in one process (use torchrun).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, LayerSkipArguments):
            raise TypeError(f"args: expected LayerSkipArguments, got {type(self.args).__name__}")
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process: start one process per GPU with torchrun")
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.args.world_size:
            raise ValueError(
                f"{started} processes were started and each would train alone: set use_cpu=True where there is no GPU"
            )
        num_layers = len(model_parts(self.model).layers)
        if self.args.curriculum == "rotational" and not 1 <= self.args.curriculum_interval <= num_layers:
            raise ValueError(
                f"curriculum_interval={self.args.curriculum_interval}: the model has {num_layers} layers, "
                f"choose 1..{num_layers}"
            )
        if not 0 <= self.args.focus_exit < num_layers:
            raise ValueError(
                f"focus_exit={self.args.focus_exit}: the model has {num_layers} layers, choose 1..{num_layers - 1}, "
                "or 0 for none"
            )
        self._dropout: LayerDropout | None = None
        self._saving = False
        self._sums = torch.zeros(2, num_layers, dtype=torch.float64)  # loss and tokens by layer since the last log

    def train(self, *args, **kwargs):
        dropout = LayerDropout(
            self.model,
            self.args.layer_dropout,
            schedule=self.args.layer_dropout_schedule,
            seed=self.args.seed,
            rank=self.args.process_index,
        )
        with dropout:
            self._dropout = dropout
            try:
                return super().train(*args, **kwargs)
            finally:
                self._dropout = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._dropout is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step, args = self.state.global_step, self.args
        if self._dropout.step != step or self._dropout.total_steps != self.state.max_steps:
            self._dropout.total_steps = self.state.max_steps
            self._dropout.set_step(step)
        layers = enabled_exits(
            args.curriculum,
            step,
            self._sums.shape[1],
            self.state.max_steps,
            interval=args.curriculum_interval,
            include_last=args.curriculum_include_last,
        )
        output = early_exit_loss(
            model,
            inputs,
            layers=layers,
            e_scale=args.e_scale,
            num_items=num_items_in_batch,
            distill_weight=args.distill_weight,
            distill_temperature=args.distill_temperature,
            chunk_size=args.loss_chunk_size,
            focus=args.focus_exit - 1 if args.focus_exit else None,
            focus_weight=args.focus_weight if args.focus_exit else 0.0,
        )
        self._record(output, inputs, num_items_in_batch)
        loss = output.loss
        if num_items_in_batch is not None and args.average_tokens_across_devices:
            # The divisor counts the tokens of all processes, and the gradients will be averaged over them.
            loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _record(self, output, inputs, num_items):
        targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
        tokens = (targets != -100).sum()
        layers = list(output.layers)
        self._sums = self._sums.to(tokens.device)
        self._sums[0, layers] += output.exit_losses.double() * (tokens if num_items is None else num_items)
        self._sums[1, layers] += tokens

    def log(self, logs, start_time=None):
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums).tolist()
            self._sums.zero_()
            for layer, (loss, tokens) in enumerate(zip(*sums)):
                if tokens:
                    logs[f"exit_{layer + 1}_loss"] = loss / tokens
        super().log(logs, start_time)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder, "partial")) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        final, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(final / "partial", ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(final / name, ignore_errors=True)
            (final / "partial" / name).rename(final / name)
            (final / "partial").rmdir()
            best = final / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and best.exists():
                self.state.best_model_checkpoint = str(best)
            rotate_checkpoints(
                str(final),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()
