"""`layerskip correctness`: does speculation leave every answer as it is, here and with this checkpoint?"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from layerskip_kernels.cli.errors import INTERRUPTED, CliError, one_sentence
from layerskip_kernels.cli.load import load_decoder
from layerskip_kernels.cli.measuring import check_dataset, load_prompts, settings, token_arguments
from layerskip_kernels.cli.options import MetaCommand, dataset_options, model_options, token_options
from layerskip_kernels.cli.output import OUTPUT_DIR, figure, prepare, progress, say_written, show, table, write_json
from layerskip_kernels.cli.prompts import given_prompts

DIFFERENT = 1  # exit code
SHOWN = 10  # differences in the table; the report has all

# Short and long, so that both ways of reading a prompt are used.
PROMPTS = (
    "Once",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Q: How many legs do three spiders have?\nA:",
    "1, 2, 4, 8, 16,",
    "Dear committee,\n\nthank you for your letter of last week. We read it with care, talked it over with everybody "
    "who works on the bridge, and would like to answer your questions one after the other. First, the noise at night:",
)


class Correctness(MetaCommand):
    LISTS = (*MetaCommand.LISTS, "exit_layer", "num_speculations")


@click.command(cls=Correctness, short_help="Compare the bits of answers with and without speculation.")
@model_options
@click.option("--prompt", multiple=True, help="A prompt; repeat it for more.")
@click.option(
    "--prompt_file", multiple=True, help='A text file is one prompt; each line {"prompt": ...} of a .jsonl file is one.'
)
@dataset_options(required=False)
@click.option("--exit_layer", type=int, multiple=True, default=(-1,), help="One or several; -1: recorded or default.")
@click.option(
    "--num_speculations", type=int, multiple=True, default=(-1,), help="One or several; -1: recorded or default."
)
@token_options
@OUTPUT_DIR
@click.pass_context
def correctness(ctx: click.Context, **options: Any) -> None:
    """Decode prompts autoregressively and self-speculatively and compare token ids and logits bit by bit.

    Each prompt is decoded alone and autoregressively; then with every exit layer and number of speculations, alone and
    --max_batch_size together. Prompts come from --prompt, --prompt_file or --dataset; without any, a few built-in ones
    are used. The exit code is 0 when nothing differs and 1 when something does. Ctrl-C keeps what was compared.

    \b
    Examples:
      layerskip correctness --max_steps 64
      layerskip correctness --exit_layer 1 2 --num_speculations 3 6 --max_steps 32 --sample
      layerskip correctness --dataset human_eval --num_samples 3 --max_steps 32
    """
    chosen = options["prompt"] or options["prompt_file"]
    if chosen and options["dataset"]:
        raise CliError("--dataset and --prompt or --prompt_file are both given, leave one out")
    given = given_prompts(options["prompt"], options["prompt_file"]) if chosen else None
    with one_sentence():
        if options["dataset"]:
            check_dataset(options["dataset"])
        folder = prepare(options["output_dir"])
        decoder = load_decoder(ctx, {**options, "exit_layer": -1, "num_speculations": -1})
        prompts, stop = _prompts(given, decoder, options)
        if _on_reference(decoder):
            note = "note: the reference backend runs on torch's products, whose bits may depend on a batch's shape"
            click.echo(note, err=True)
        outcome = _check(decoder, prompts, stop, options)
        _print(outcome, decoder, prompts)
        path = folder / f"correctness_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}.json"
        write_json(path, _report(outcome, prompts, options))
    say_written(path)
    if outcome.differences:
        ctx.exit(DIFFERENT)
    if outcome.interrupted:
        ctx.exit(INTERRUPTED)


def _prompts(given: list[str] | None, decoder: Any, options: dict[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """The prompts, and the texts that end their answers."""
    if not options["dataset"]:
        return list(given or PROMPTS), ()
    from layerskip_kernels.datasets import DATASETS

    samples = load_prompts(options, decoder.tokenizer)
    return [sample.prompt for sample in samples], DATASETS[options["dataset"]].stop


def _on_reference(decoder: Any) -> bool:
    return "reference" in decoder.ops.backends.values()


def _check(decoder: Any, prompts: list[Any], stop: tuple[str, ...], options: dict[str, Any]) -> Any:
    from layerskip_kernels.decode import arguments
    from layerskip_kernels.measure.correctness import check, ways

    def values(name: str, checked: Any) -> list[int]:
        return [checked(None if value == -1 else value) for value in options[name]]

    exits = values("exit_layer", lambda e: arguments.exit_layer(e, decoder.config, decoder.exit_layer))
    if None in exits:
        raise CliError(f"{options['model']}: a model of 1 layer has no early exit")
    drafts = values("num_speculations", lambda k: arguments.speculations(k, decoder.num_speculations))
    batch_size = options["max_batch_size"]
    compared = ways(exits, drafts, together=batch_size > 1 and len(prompts) > 1)
    with progress() as bar:
        task = bar.add_task("answers", total=len(compared) * len(prompts), rate="")

        def tick(outcome: Any) -> None:
            bar.update(task, advance=1, rate=f"{len(outcome.differences)} different")

        return check(
            decoder,
            prompts,
            compared,
            token_arguments(decoder, options, stop),
            batch_size=batch_size,
            tick=tick,
        )


def _print(outcome: Any, decoder: Any, prompts: list[Any]) -> None:
    from layerskip_kernels.measure.correctness import BASELINE

    made = table("compared", "answers", "tokens", "other tokens", "other logits only", title=f"With {BASELINE.name}")
    for way, count in outcome.answers.items():
        found = [d for d in outcome.differences if d.way == way]
        in_tokens = sum(d.in_tokens for d in found)
        made.add_row(way.name, str(count), str(outcome.tokens[way]), str(in_tokens), str(len(found) - in_tokens))
    if not outcome.differences:
        show(made)
        compared = "no answer was compared" if not any(outcome.answers.values()) else "same tokens, same logits"
        click.echo(f"interrupted; until then: {compared}" if outcome.interrupted else compared)
        return
    title = "First differences" + (", until interrupted" if outcome.interrupted else "")
    details = table("prompt", "decoded", "position", "logits differ from", "tokens", "margin", title=title)
    for d in outcome.differences[:SHOWN]:
        details.add_row(
            f"{d.prompt + 1}: {_start(prompts[d.prompt])}",
            d.way.name,
            str(d.position),
            "n/a" if d.logits_position is None else str(d.logits_position),
            f"{_token(decoder, d.expected)} / {_token(decoder, d.got)}",
            figure(d.margin, "{:.3g}"),
        )
    show(made, details)
    click.echo("positions count new tokens from 0; margin: between the two best logits there")
    if len(outcome.differences) > SHOWN:
        click.echo(f"{len(outcome.differences) - SHOWN} more are in the report")
    first = outcome.differences[0]
    report = "" if _on_reference(decoder) else "; please report this"
    click.echo(f"DIFFERENT: prompt {first.prompt + 1}, {first.way.name}, new token {first.position}{report}")


def _start(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt[:8]))
    return repr(text if len(text) <= 24 else text[:23] + "…").replace("[", "\\[")


def _token(decoder: Any, token: int | None) -> str:
    """Its id and text; the answer's end where there is none."""
    return "end" if token is None else f"{token} {decoder.tokenizer.decode([token])!r}".replace("[", "\\[")


def _report(outcome: Any, prompts: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    return {
        "interrupted": outcome.interrupted,
        "settings": settings(options),
        "prompts": [prompts[i] for i in range(outcome.prompts)],
        "compared": [
            {**asdict(way), "answers": count, "tokens": outcome.tokens[way]} for way, count in outcome.answers.items()
        ],
        "differences": [asdict(difference) for difference in outcome.differences],
    }
