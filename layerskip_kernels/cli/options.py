"""Options shared by the commands, under the names of Meta's scripts, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

DEMO = "demo"  # --model of the checkpoint that comes with the package
STRATEGIES = ("self_speculative", "autoregressive", "early_exit")
DTYPES = ("auto", "float32", "float16", "bfloat16")
VERIFICATIONS = ("coupled", "rejection")
METHODS = ("standard", "block")
QUANTIZATIONS = ("int8", "int4")
DRAFT_LAYERS = DRAFT_HEADS = ("auto", "shared", "int8", "int4")
HEAD_SCREENS = ("auto", "none", "int8")
MAX_STEPS = ("--max_steps", "--max_new_tokens")  # Meta's name, and transformers'
BACKENDS = ("auto", "cuda", "triton", "cpu", "reference")


class TrueFalse(click.ParamType):
    """`--sample`, `--sample True`, `--sample False`."""

    name = "True|False"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, bool):
            return value
        if value.lower() not in ("true", "false"):
            self.fail(f"{value!r} is not True or False.", param, ctx)
        return value.lower() == "true"


class KeyValues(click.ParamType):
    """`key=value,key=value`; whole numbers become int."""

    name = "key=value,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int | str]:
        if isinstance(value, dict):
            return value
        pairs = {}
        for item in filter(None, value.split(",")):
            key, equals, text = (part.strip() for part in item.partition("="))
            if not (key and equals and text):
                self.fail(f"{item!r} does not look like key=value.", param, ctx)
            pairs[key] = int(text) if text.lstrip("-").isdecimal() else text
        return pairs


class Device(click.ParamType):
    """Where to run: auto, cpu, cuda, cuda:1."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            self.fail(f"{value!r} is not auto, cpu, cuda or cuda:N.", param, ctx)
        return value


class MetaCommand(click.Command):
    """Reads what Meta's scripts accept and click does not: dashes in option names, several values after one option."""

    LISTS = ("stop_words", "stop_token_ids")

    def __init__(self, *args: Any, **kwargs: Any):
        settings = {"token_normalize_func": lambda name: name.replace("-", "_"), "show_default": True}
        super().__init__(*args, context_settings=settings, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        expanded: list[str] = []
        current, is_value = None, False  # the list option being read; whether the next argument is its first value
        for arg in args:
            if current and not is_value and not arg.startswith("-"):
                expanded.append(f"--{current}")
            expanded.append(arg)
            if is_value:
                is_value = False
            elif arg.startswith("-"):
                name, equals, _ = arg.lstrip("-").partition("=")
                current = name.replace("-", "_") if name.replace("-", "_") in self.LISTS else None
                is_value = current is not None and not equals
        return super().parse_args(ctx, expanded)


def model_options(command: Callable | None = None, *, max_batch_size: int = 8, drafts: bool = True) -> Callable:
    """Which model, and what it runs on. `drafts`: the command makes some."""
    if command is None:
        return partial(model_options, max_batch_size=max_batch_size, drafts=drafts)
    if drafts:
        draft_layers = click.option(
            "--draft_layers",
            type=click.Choice(DRAFT_LAYERS),
            default=DRAFT_LAYERS[0],
            help="Layers that draft: the model's, or copies of them. auto: copies where they pay.",
        )
        draft_head = click.option(
            "--draft_head",
            type=click.Choice(DRAFT_HEADS),
            default=DRAFT_HEADS[0],
            help="LM head that drafts: the model's, or a copy of it. auto: a copy where it pays.",
        )
        head_screen = click.option(
            "--head_screen",
            type=click.Choice(HEAD_SCREENS),
            default=HEAD_SCREENS[0],
            help="Copy of the LM head read in its place; changes no answer. auto: where it pays.",
        )
        command = draft_layers(draft_head(head_screen(command)))
    for option in reversed(
        [
            click.option(
                "--model", default=DEMO, help="Folder of a Hugging Face checkpoint, its id on the hub, or demo."
            ),
            click.option("--model_args", type=KeyValues(), help="More arguments of the decoder, as max_length=4096."),
            click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="auto: as stored."),
            click.option("--device", type=Device(), default="auto", help="cpu, cuda, cuda:1; auto: a GPU if any."),
            click.option("--backend", type=click.Choice(BACKENDS), default="auto", help="Kernels to run on."),
            click.option(
                "--quantization",
                type=click.Choice(QUANTIZATIONS),
                help="Quantize linears while loading, the LM head to int8. On the CPU.",
            ),
            click.option(
                "--max_batch_size", type=click.IntRange(1), default=max_batch_size, help="Prompts decoded together."
            ),
        ]
    ):
        command = option(command)
    return command


def generation_options(command: Callable) -> Callable:
    """How tokens are chosen and when to stop."""
    strategy = click.option("--generation_strategy", type=click.Choice(STRATEGIES), default=STRATEGIES[0])
    return strategy(exit_options(token_options(command)))


def exit_options(command: Callable) -> Callable:
    """One exit layer and one number of drafts."""
    for option in reversed(
        [
            click.option("--exit_layer", type=int, default=-1, help="Layers that draft; -1: recorded or default."),
            click.option(
                "--num_speculations", type=int, default=-1, help="Tokens drafted per round; -1: recorded or default."
            ),
        ]
    ):
        command = option(command)
    return command


def draft_options(command: Callable) -> Callable:
    """How sampled drafts are accepted, and where drafts end."""
    for option in reversed(
        [
            click.option(
                "--verification",
                type=click.Choice(VERIFICATIONS),
                default=VERIFICATIONS[0],
                help="Of sampled drafts. coupled: the text does not depend on speculation.",
            ),
            click.option("--rejection_method", type=click.Choice(METHODS), help="Of --verification rejection."),
            click.option(
                "--draft_confidence", type=float, help="End a draft when the exit gives no token this probability."
            ),
            click.option(
                "--adaptive_speculations",
                type=TrueFalse(),
                is_flag=False,
                flag_value="True",
                default="False",
                help="Draft as many tokens as were lately accepted, --num_speculations at most.",
            ),
        ]
    ):
        command = option(command)
    return command


def token_options(command: Callable | None = None, *, max_steps: int = 512) -> Callable:
    """How tokens are chosen and when to stop."""
    if command is None:
        return partial(token_options, max_steps=max_steps)
    for option in reversed(
        [
            click.option(*MAX_STEPS, type=click.IntRange(1), default=max_steps, help="Most new tokens per prompt."),
            click.option("--sample", type=TrueFalse(), is_flag=False, flag_value="True", default="False"),
            click.option("--temperature", type=float, default=0.6),
            click.option("--top_k", type=int, default=0, help="0: all tokens."),
            click.option("--top_p", type=float, default=0.9),
            click.option("--seed", type=int, default=42),
            click.option("--stop_words", multiple=True, help="Texts that end an answer; several, or repeated."),
            click.option(
                "--stop_token_ids", type=int, multiple=True, help="Tokens that end an answer, besides the model's own."
            ),
        ]
    ):
        command = option(command)
    return command


penalty_option = click.option(
    "--repetition_penalty",
    type=float,
    help="Above 1: tokens of prompt and text become less likely.  [default: the checkpoint's]",
)


def dataset_options(
    command: Callable | None = None,
    *,
    required: bool = True,
    dataset: str | None = None,
    num_samples: int | None = None,
) -> Callable:
    """Which prompts to measure on; `cli.measuring.load_prompts` reads them. `dataset`, `num_samples`: the defaults."""
    if command is None:
        return partial(dataset_options, required=required and dataset is None, dataset=dataset, num_samples=num_samples)
    for option in reversed(
        [
            click.option(
                "--dataset",
                required=required,
                default=dataset,
                help="Name of a data set; an unknown one lists them.",
            ),
            click.option(
                "--data_path",
                type=click.Path(path_type=Path),
                help="Local file in the data set's format: .jsonl, .jsonl.gz, .json, .parquet, .csv or .tsv.",
            ),
            click.option("--n_shot", type=click.IntRange(0), default=0, help="Examples in front of every prompt."),
            click.option("--template", help="Text around every prompt, in place of its {prompt}."),
            click.option(
                "--random_shuffle",
                type=TrueFalse(),
                is_flag=False,
                flag_value="True",
                default="True",
                help="Prompts in random order, by --seed.",
            ),
            click.option(
                "--num_samples",
                type=click.IntRange(1),
                default=num_samples,
                help="Most prompts to ask." + ("" if num_samples else "  [default: all]"),
            ),
        ]
    ):
        command = option(command)
    return command
