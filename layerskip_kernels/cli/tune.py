"""`layerskip tune`: the exit layer and number of drafts that decode fastest here, recorded for this checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from layerskip_kernels.cli.errors import INTERRUPTED, CliError, one_sentence
from layerskip_kernels.cli.load import load_decoder
from layerskip_kernels.cli.measuring import check_dataset, load_prompts, token_arguments
from layerskip_kernels.cli.options import MetaCommand, TrueFalse, dataset_options, model_options, token_options
from layerskip_kernels.cli.output import figure, progress, show, table


@click.command(cls=MetaCommand, short_help="Find and record the fastest exit layer and number of drafts.")
@model_options(max_batch_size=1)
@dataset_options(dataset="human_eval", num_samples=8)
@click.option("--num_speculations_last", type=click.IntRange(1, 63), default=12, help="Most drafts per round to try.")
@click.option("--verify", type=click.IntRange(1), default=4, help="Settings to time, the best predicted ones.")
@click.option("--repeats", type=click.IntRange(1), default=4, help="Of each; the least time of a round counts.")
@token_options(max_steps=64)
@click.option(
    "--save", type=TrueFalse(), is_flag=False, flag_value="True", default="True", help="Record what was found."
)
@click.pass_context
def tune(ctx: click.Context, **options: Any) -> None:
    """Find the exit layer E and number of drafts K that decode fastest with this checkpoint on this device.

    All (E, K) are predicted, as `layerskip sweep --fast` does; the best ones are timed beside autoregressive decoding,
    with --max_batch_size prompts together. What is fastest goes into the checkpoint's config.json, or where that is not
    the user's into a cache; decoding finds it there. Where no setting is faster, K = 0 is recorded: autoregressive.

    \b
    Examples:
      layerskip tune
      layerskip tune --dataset custom_jsonl --data_path prompts.jsonl --max_batch_size 2 --save False
    """
    with one_sentence():
        check_dataset(options["dataset"])
        decoder = load_decoder(ctx, options)
        if decoder.config.num_layers < 2:
            raise CliError("a model of 1 layer has no early exit")
        try:
            timed, predicted = _search(decoder, options)
        except KeyboardInterrupt:
            click.echo("nothing was recorded", err=True)
            ctx.exit(INTERRUPTED)
        choice = _choice(decoder, timed, predicted)
        _print(decoder, timed, predicted)
        if options["save"]:
            click.echo(f"recorded in {_record(options['model'], choice)}")


def _search(decoder: Any, options: dict[str, Any]) -> tuple[list[tuple[Any, float]], dict[Any, float]]:
    """(setting, tokens/s) of the timed settings and of None, autoregressive, best first; all predicted speed-ups."""
    from layerskip_kernels.datasets import DATASETS
    from layerskip_kernels.decode.prompts import encode
    from layerskip_kernels.measure.costs import REPEATS, measure_costs
    from layerskip_kernels.measure.sweep import Sweep, predict
    from layerskip_kernels.measure.timing import fastest

    samples = load_prompts(options, decoder.tokenizer)
    prompts = encode([sample.prompt for sample in samples], decoder.tokenizer, decoder.config.vocab_size)
    arguments = token_arguments(decoder, options, DATASETS[options["dataset"]].stop)
    calls = -(-len(prompts) // decoder.max_batch_size)
    with progress() as bar:
        steps = len(prompts) + REPEATS + 1 + calls * options["repeats"]
        task = bar.add_task("tune", total=steps, rate="autoregressive")

        def tick(what: str) -> None:
            bar.update(task, advance=1, rate=what)

        plain = Sweep(decoder, prompts, arguments)
        plain.autoregressive()
        drafts = plain.drafts(partial(tick, "agreement"))
        most = options["num_speculations_last"]
        costs = measure_costs(decoder, sorted(prompts, key=len)[len(prompts) // 2], most, tick=partial(tick, "costs"))
        ranked = predict(decoder, drafts, costs, range(1, decoder.config.num_layers), range(1, most + 1))
        if not ranked:
            raise CliError("the model ends every answer at once, so nothing is drafted: choose other prompts")
        chosen = [setting for setting, _ in ranked[: options["verify"]]]
        timed = fastest(decoder, prompts, chosen, repeats=options["repeats"], tick=partial(tick, "timing"), **arguments)
    return timed, dict(ranked)


def _choice(decoder: Any, timed: list[tuple[Any, float]], predicted: dict[Any, float]) -> dict[str, Any]:
    """What is recorded: the fastest. K = 0 where that is autoregressive decoding, with the exit of the next best."""
    import torch

    from layerskip_kernels.measure.environment import cpu_model

    speeds = dict(timed)
    best = next(setting for setting, _ in timed if setting is not None)
    speculates = timed[0][0] is not None
    on_gpu = decoder.device.type == "cuda"
    return {
        "exit_layer": best.exit_layer,
        "num_speculations": best.num_speculations if speculates else 0,
        "tuned": {
            "device": torch.cuda.get_device_name(decoder.device) if on_gpu else cpu_model(),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": decoder.max_batch_size,
            "draft_layers": decoder.draft_layers,
            "draft_head": decoder.draft_head,
            "speedup": speeds[best] / speeds[None],
            "predicted_speedup": predicted[best],
            "setting": asdict(best),
        },
    }


def _print(decoder: Any, timed: list[tuple[Any, float]], predicted: dict[Any, float]) -> None:
    plain = dict(timed)[None]
    made = table("E", "K", "tok/s", "speed-up", "predicted", "acceptance", "tokens/round")
    for setting, speed in timed:
        if setting is None:
            made.add_row("autoregressive", "", f"{speed:.1f}", "1.00 x")
            continue
        made.add_row(
            str(setting.exit_layer),
            str(setting.num_speculations),
            f"{speed:.1f}",
            f"{speed / plain:.2f} x",
            figure(predicted[setting], "{:.2f} x"),
            f"{setting.acceptance_rate:.1%}",
            f"{setting.tokens_per_round:.2f}",
        )
    show(made)
    batch = decoder.max_batch_size
    where = f"on {decoder.device}, {batch} sequence{'s' if batch > 1 else ''} at a time"
    best = timed[0][0]
    if best is None:
        click.echo(f"speculation does not pay {where}: the choice is autoregressive decoding (K = 0)")
    else:
        click.echo(f"fastest {where}: E {best.exit_layer}, K {best.num_speculations}")


def _record(model: str, choice: dict[str, Any]) -> Path:
    """Into the config.json of a folder that the user named and may write to, else into the user's cache."""
    from layerskip_kernels.models.hub import checkpoint_folder
    from layerskip_kernels.models.tuned import write_choice, write_user_choice

    folder = checkpoint_folder(model)
    if folder == Path(model).expanduser():  # not a download, nor what came with the package
        try:
            return write_choice(folder, choice)
        except OSError:  # read-only
            pass
    return write_user_choice(folder, choice)
