"""`layerskip inspect`: which layer already knew the token."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from layerskip_kernels.cli.errors import CliError, one_sentence
from layerskip_kernels.cli.load import load_decoder
from layerskip_kernels.cli.options import MAX_STEPS, MetaCommand, model_options
from layerskip_kernels.cli.output import OUTPUT_DIR, need, prepare, say_written, show, table, write_json, write_pictures
from layerskip_kernels.cli.prompts import given_prompts

BAR = 24  # characters of the histogram's longest bar


@click.command(cls=MetaCommand, short_help="Show which layers already know the tokens of a text.")
@model_options(drafts=False)
@click.option("--prompt", multiple=True, help="A text; repeat it for more.")
@click.option(
    "--prompt_file", multiple=True, help='A text file is one text; each line {"prompt": ...} of a .jsonl file is one.'
)
@click.option(
    *MAX_STEPS,
    type=click.IntRange(0),
    default=0,
    help="Continue each text by so many tokens, and look at those instead.",
)
@OUTPUT_DIR
@click.pass_context
def inspect(ctx: click.Context, **options: Any) -> None:
    """Show, for every layer, how often it already says what the last layer says.

    Each layer's output goes through the model's final norm and head: the logit lens. A token is known from the first
    layer on after which no layer changes its mind. Text comes from --prompt, --prompt_file or standard input.

    \b
    Examples:
      layerskip inspect --prompt_file README.md
      layerskip inspect --prompt "def fibonacci(n):" --max_steps 64 --output_dir logs
    """
    need("measure", "matplotlib")
    prompts = given_prompts(options["prompt"], options["prompt_file"])
    if prompts is None:
        raise CliError("there is no text: give --prompt or --prompt_file, or one on standard input")
    with one_sentence():
        folder = prepare(options["output_dir"])
        decoder = load_decoder(ctx, options)
        lenses = _read(decoder, prompts, options["max_steps"])
        _report(decoder, lenses, folder)


def _read(decoder: Any, prompts: list[str], max_steps: int) -> list[Any]:
    from layerskip_kernels.decode.prompts import encode
    from layerskip_kernels.measure import lens

    texts = encode(prompts, decoder.tokenizer, decoder.config.vocab_size)
    if not max_steps:
        return lens.read_all(decoder, texts)
    result = decoder.generate(
        texts, max_new_tokens=max_steps, generation_strategy="autoregressive", repetition_penalty=1
    )
    return [lens.read(decoder, text, more) for text, more in zip(texts, result.sequences) if more]


def _report(decoder: Any, lenses: list[Any], folder: Any) -> None:
    import torch

    from layerskip_kernels.measure.lens import layer_reports
    from layerskip_kernels.measure.pictures import draw_lens

    rows = layer_reports(lenses)
    first = torch.cat([lens.first_stable_layer() for lens in lenses])
    known = torch.bincount(first, minlength=len(rows) + 1)[1:].tolist()
    tokens = len(first)
    made = table(
        "after layer", "agreement", "entropy", "loss", "known from here on", "so far", title=f"{tokens} tokens"
    )
    made.add_column("")
    so_far = 0
    for row, count in zip(rows, known):
        so_far += count
        made.add_row(
            str(row.layer),
            f"{row.agreement:.1%}",
            f"{row.entropy:.2f}",
            f"{row.loss:.2f}",
            f"{count / tokens:.1%}",
            f"{so_far / tokens:.1%}",
            "█" * round(BAR * count / max(known)),
        )
    show(made)
    mean = first.double().mean().item()
    click.echo(
        f"a token is known after {mean:.1f} of {len(rows)} layers on average; entropy and loss in nats per token"
    )
    pictures = write_pictures(draw_lens(rows, known, lenses[0], decoder.tokenizer), folder / "inspect")
    layers = [asdict(row) | {"first_stable": count} for row, count in zip(rows, known)]
    write_json(folder / "inspect.json", {"tokens": tokens, "mean_first_stable_layer": mean, "layers": layers})
    say_written(*pictures, folder / "inspect.json")
