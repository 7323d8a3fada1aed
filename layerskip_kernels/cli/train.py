"""`layerskip train`: the LayerSkip recipe on a model and a data set, from the first step to the best (E, K)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from layerskip_kernels.cli.errors import CliError, one_sentence
from layerskip_kernels.cli.options import MetaCommand, TrueFalse

# the option names of transformers.TrainingArguments where it has one
_PASSED_ON = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "optim",
    "bf16",
    "gradient_checkpointing",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "layer_dropout",
    "layer_dropout_schedule",
    "e_scale",
    "curriculum",
    "curriculum_interval",
    "focus_exit",
    "focus_weight",
    "distill_weight",
    "distill_temperature",
)
_SETTINGS_TIMED = 4  # of the settings with the highest ceiling
_FLAG = {"type": TrueFalse(), "is_flag": False, "flag_value": "True", "default": "False"}


@click.command(cls=MetaCommand, short_help="Train a model to exit early, and find its best exit.")
@click.option("--model", help="Checkpoint to go on with: a folder, an id on the hub, or demo.")
@click.option("--config", help="A config.json to start a new model from, instead of --model.")
@click.option("--tokenizer", help="Folder or hub id; the model's own unless given.")
@click.option(
    "--dataset", required=True, help=".txt, .jsonl or .parquet file, a folder of them, or a hub name[:config]."
)
@click.option("--dataset_split", default="train", help="Split of a data set on the hub.")
@click.option("--text_field", default="text", help="Field with the text.")
@click.option("--heldout", default="0.01", help="Share of the texts to hold out, or another data set.")
@click.option("--sequence_length", type=click.IntRange(2), default=512)
@click.option("--output_dir", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --output_dir, exactly.")
@click.option("--recipe", help="Published settings by name (docs/training.md); options given beside it win.")
@click.option("--layer_dropout", type=float, help="p_max.  [default: 0.1]")
@click.option("--layer_dropout_schedule", help="constant or exponential.  [default: constant]")
@click.option("--e_scale", type=float, help="Weight of the early exits.  [default: 0.1]")
@click.option("--curriculum", help="rotational, gradual or all.  [default: rotational]")
@click.option("--curriculum_interval", type=int, help="R of the rotational curriculum.  [default: 8, at most L]")
@click.option("--focus_exit", type=int, default=0, help="An exit E to train at every step; 0: none.")
@click.option("--focus_weight", type=float, default=0.25, help="Share of the loss it gets.")
@click.option("--distill_weight", type=float, help="Weight of KL(last layer, exit).  [default: 0]")
@click.option("--distill_temperature", type=float, help="[default: 1]")
@click.option("--max_steps", type=click.IntRange(1), help="Optimizer steps; wins over --num_train_epochs.")
@click.option("--num_train_epochs", type=float, default=1.0)
@click.option("--per_device_train_batch_size", type=click.IntRange(1), default=8, help="Rows per process and step.")
@click.option("--gradient_accumulation_steps", type=click.IntRange(1), default=1)
@click.option("--learning_rate", type=float, help="[default: the recipe's, else 5e-5]")
@click.option("--lr_scheduler_type", default="linear", help="As in transformers: linear, cosine, ...")
@click.option("--warmup_steps", type=click.IntRange(0), default=0)
@click.option("--weight_decay", type=float, default=0.0)
@click.option("--adam_beta2", type=float, default=0.999)
@click.option("--optim", default="adamw_torch", help="As in transformers.")
@click.option("--lora_rank", type=click.IntRange(0), default=0, help="Train LoRA adapters, merged at the end; 0: all.")
@click.option("--bf16", **_FLAG, help="bfloat16 autocast.")
@click.option("--gradient_checkpointing", **_FLAG, help="Less memory, more time.")
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="bfloat16", help="To save in.")
@click.option("--logging_steps", type=click.IntRange(1), default=10)
@click.option("--save_steps", type=click.IntRange(1), default=500, help="A multiple of --logging_steps.")
@click.option("--save_total_limit", type=click.IntRange(1), default=2, help="Checkpoints to keep.")
@click.option("--measure_texts", type=click.IntRange(1), default=32, help="Held-out texts to measure exits on.")
@click.option("--seed", type=int, default=42)
@click.pass_context
def train(ctx: click.Context, **options: Any) -> None:
    """Train a model to exit early, then find and record the exit that decodes fastest.

    --output_dir gets a plain transformers checkpoint, log.jsonl, loss.png and exits.json; checkpoint-<step> folders
    hold what --resume needs. For several processes or GPUs: torchrun --nproc_per_node N -m layerskip_kernels train ...
    """
    missing = [name for name in ("datasets", "accelerate", "matplotlib", "tqdm") if not importlib.util.find_spec(name)]
    if missing:
        raise CliError(f'{", ".join(missing)} is not installed: pip install "layerskip_kernels[train]"')
    if options["save_steps"] % options["logging_steps"]:
        raise CliError(
            f"save_steps={options['save_steps']}: choose a multiple of logging_steps={options['logging_steps']}"
        )
    with one_sentence():
        run = _run(options)
        trainer = run.trainer()
        trainer.train(resume_from_checkpoint=run.last_checkpoint() if options["resume"] else None)
        if trainer.is_world_process_zero():
            finish(trainer, options)


def _run(options: dict[str, Any]) -> Any:
    from layerskip_kernels.training.recipes import RECIPES
    from layerskip_kernels.training.run import TrainingRun

    arguments = {}
    if options["recipe"] is not None:
        if options["recipe"] not in RECIPES:
            raise CliError(f"recipe={options['recipe']!r}: choose from {', '.join(RECIPES)}")
        arguments = RECIPES[options["recipe"]].arguments()
    # False is transformers' default too, and its names for such flags change
    given = {name: options[name] for name in _PASSED_ON if options[name] is not None and options[name] is not False}
    arguments |= given
    return TrainingRun(
        output_dir=options["output_dir"],
        dataset=options["dataset"],
        model=options["model"],
        config=options["config"],
        tokenizer=options["tokenizer"],
        heldout=options["heldout"],
        text_field=options["text_field"],
        split=options["dataset_split"],
        sequence_length=options["sequence_length"],
        lora_rank=options["lora_rank"],
        resume=options["resume"],
        seed=options["seed"],
        arguments=arguments | {"report_to": [], "save_strategy": "steps"},
    )


def finish(trainer: Any, options: dict[str, Any]) -> None:
    """Saves the model, measures its exits on the held-out rows, and records the best (E, K)."""
    import torch

    from layerskip_kernels import SelfSpeculativeDecoder
    from layerskip_kernels.measure import lens, settings
    from layerskip_kernels.measure.timing import fastest
    from layerskip_kernels.training.run import save

    folder = options["output_dir"]
    model = save(trainer, folder, getattr(torch, options["dtype"]))
    rows = [row["input_ids"] for row in trainer.eval_dataset.select(range(min(len(trainer.eval_dataset), 256)))]
    # one prompt at a time: the setting that is recorded is the fastest for one
    decoder = SelfSpeculativeDecoder.from_model(model, tokenizer=trainer.processing_class, max_batch_size=1)
    report = lens.layer_reports(lens.read_all(decoder, rows))
    length = min(64, options["sequence_length"] // 2)
    prompts = [row[:length] for row in rows[: options["measure_texts"]]]
    texts = decoder.generate(
        prompts, max_new_tokens=length, generation_strategy="autoregressive", repetition_penalty=1
    ).sequences
    read = [lens.read(decoder, prompt, text, drafting=True) for prompt, text in zip(prompts, texts)]
    found = settings.settings(decoder, [one.drafts() for one in read])
    if not found:
        raise CliError(
            "the model ends every held-out text at once, so no exit can be measured; the checkpoint is saved"
        )
    choices = found[:_SETTINGS_TIMED]
    timed = fastest(decoder, prompts[:4], choices, max_new_tokens=length, repetition_penalty=1, repeats=3)
    best = next(choice for choice, _ in timed if choice)
    speeds = {choice: speed for choice, speed in timed}
    settings.record(
        folder,
        best,
        report,
        speedup_measured=speeds[best] / speeds[None],
        threads=torch.get_num_threads(),
        texts=len(texts),
    )
    _print(report, choices, speeds, best)


def _print(report: list[Any], choices: list[Any], speeds: dict[Any, float], best: Any) -> None:
    console = Console(highlight=False)
    table = Table("after layer", "loss", "agreement", box=box.SIMPLE_HEAD)
    for row in report:
        table.add_row(str(row.layer), f"{row.loss:.3f}", f"{row.agreement:.1%}")
    console.print(table)
    table = Table("E", "K", "acceptance", "per position", "tokens/round", "ceiling", "measured", box=box.SIMPLE_HEAD)
    for s in choices:
        table.add_row(
            str(s.exit_layer) + (" *" if s == best else ""),
            str(s.num_speculations),
            f"{s.acceptance_rate:.1%}",
            f"{s.position_acceptance:.1%}",
            f"{s.tokens_per_round:.2f}",
            f"{s.ceiling:.2f} x",
            f"{speeds[s] / speeds[None]:.2f} x",
        )
    console.print(table)
    console.print("* recorded in config.json: decoding this checkpoint needs no --exit_layer and no --num_speculations")
