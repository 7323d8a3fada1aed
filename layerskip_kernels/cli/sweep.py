"""`layerskip sweep`: the speed-up over a grid of exit layers and numbers of drafts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from layerskip_kernels.cli.errors import INTERRUPTED, CliError, one_sentence
from layerskip_kernels.cli.load import load_decoder
from layerskip_kernels.cli.measuring import check_dataset, load_prompts, settings, token_arguments
from layerskip_kernels.cli.options import MetaCommand, dataset_options, model_options, token_options
from layerskip_kernels.cli.output import (
    OUTPUT_DIR,
    figure,
    need,
    prepare,
    progress,
    say_written,
    show,
    table,
    write_json,
    write_pictures,
)

BOUNDS = (
    ("exit_layer_first", 1, 1),
    ("exit_layer_last", 15, 1),
    ("exit_layer_step", 1, 1),
    ("num_speculations_first", 1, 1),
    ("num_speculations_last", 6, 1),
    ("num_speculations_step", 1, 1),
)
SHOWN = 10  # rows of the table


def _bounds(command: Any) -> Any:
    for name, default, low in reversed(BOUNDS):
        command = click.option(f"--{name}", type=click.IntRange(low), default=default)(command)
    return command


@click.command(cls=MetaCommand, short_help="Time a grid of exit layers and numbers of drafts; picture and table.")
@model_options(max_batch_size=1)
@dataset_options
@_bounds
@click.option("--fast", is_flag=True, help="Predict the grid from one pass, and time only --verify cells.")
@click.option("--verify", type=click.IntRange(1), default=4, help="Cells that --fast times to check itself.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Of every cell; the least time of a round counts.")
@token_options
@OUTPUT_DIR
@click.pass_context
def sweep(ctx: click.Context, **options: Any) -> None:
    """Time self-speculative decoding for every exit layer E and number of drafts K of a grid.

    sweep.csv is written anew after every cell: called again with the same settings, the command goes on where it
    stopped. sweep.png and sweep.pdf show the grid with its best cell marked. --fast predicts the grid instead, from
    what every exit would draft in the model's own answers and from what the phases of a round cost here.

    \b
    Examples:
      layerskip sweep --dataset human_eval --num_samples 2 --max_steps 32 --exit_layer_last 3 --num_speculations_last 2
      layerskip sweep --dataset human_eval --num_samples 2 --max_steps 32 --exit_layer_last 3 --fast --output_dir fast
    """
    need("measure", "matplotlib")
    with one_sentence():
        check_dataset(options["dataset"])
        folder = prepare(options["output_dir"])
        found = _resume(folder, options)
        decoder = load_decoder(ctx, options)
        layers, speculations = _grid(decoder, options)
        measured = _sweep(decoder, options)
        csv = folder / "sweep.csv"
        run = _fast if options["fast"] else _cells
        interrupted = run(measured, layers, speculations, found, csv, options)
        wanted = [c for c in found.values() if c.exit_layer in layers and c.num_speculations in speculations]
        if not wanted:
            ctx.exit(INTERRUPTED)
        _print(wanted)
        _finish(decoder, wanted, folder, options)
    if interrupted:
        ctx.exit(INTERRUPTED)


def _resume(folder: Path, options: dict[str, Any]) -> dict[tuple[int, int], Any]:
    """The cells of the folder's sweep.csv, by (E, K). Refuses those of other settings."""
    from layerskip_kernels.measure.sweep import read_cells

    if not (folder / "sweep.csv").exists():
        write_json(folder / "sweep.json", {"settings": _identity(options)})
        return {}
    try:
        before = json.loads((folder / "sweep.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        before = {}
    now = _identity(options)
    if changed := [name for name in now if before.get(name) != now[name]]:
        name = changed[0]
        raise CliError(
            f"{folder / 'sweep.csv'} was made with {name}={before.get(name)}, not {now[name]}: "
            "choose another --output_dir"
        )
    return {(cell.exit_layer, cell.num_speculations): cell for cell in read_cells(folder / "sweep.csv")}


def _identity(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that cells of one table share."""
    free = {name for name, _, _ in BOUNDS} | {"output_dir", "verify"}
    return {name: value for name, value in settings(options).items() if name not in free}


def _grid(decoder: Any, options: dict[str, Any]) -> tuple[range, range]:
    deepest = decoder.config.num_layers - 1
    first, last, step = (options[name] for name, _, _ in BOUNDS[:3])
    if not first <= deepest:
        raise CliError(f"--exit_layer_first {first}: the model has {deepest + 1} layers, choose 1..{deepest}")
    layers = range(first, min(last, deepest) + 1, step)
    first, last, step = (options[name] for name, _, _ in BOUNDS[3:])
    speculations = range(first, min(last, 63) + 1, step)
    for name, values in (("exit_layer", layers), ("num_speculations", speculations)):
        if not values:
            raise CliError(
                f"--{name}_last {options[f'{name}_last']} is below --{name}_first {options[f'{name}_first']}"
            )
    return layers, speculations


def _sweep(decoder: Any, options: dict[str, Any]) -> Any:
    from layerskip_kernels.datasets import DATASETS
    from layerskip_kernels.decode.prompts import encode
    from layerskip_kernels.measure.sweep import Sweep

    samples = load_prompts(options, decoder.tokenizer)
    prompts = encode([sample.prompt for sample in samples], decoder.tokenizer, decoder.config.vocab_size)
    return Sweep(
        decoder, prompts, token_arguments(decoder, options, DATASETS[options["dataset"]].stop), options["repeats"]
    )


def _cells(measured: Any, layers: range, speculations: range, found: dict, csv: Path, options: Any) -> bool:
    """Times every cell that is not in `found` yet; True when Ctrl-C ended it."""
    from layerskip_kernels.measure.sweep import write_cells

    todo = [(e, k) for e in layers for k in speculations if (e, k) not in found]
    try:
        with progress() as bar:
            task = bar.add_task("sweep", total=len(todo), rate="autoregressive")
            if todo:
                measured.autoregressive()  # warms up
            for number, (e, k) in enumerate(todo):
                if not number or e != todo[number - 1][0]:
                    measured.autoregressive()  # again with every exit layer: the machine's speed may wander
                found[e, k] = cell = measured.measure(e, k)
                write_cells(csv, [found[key] for key in sorted(found)])
                bar.update(task, advance=1, rate=f"E {e}, K {k}: {cell.speedup:.2f} x")
    except KeyboardInterrupt:
        return True
    return False


def _fast(measured: Any, layers: range, speculations: range, found: dict, csv: Path, options: Any) -> bool:
    """Predicts all cells, then times some; True when Ctrl-C ended it."""
    from layerskip_kernels.measure.costs import REPEATS, measure_costs
    from layerskip_kernels.measure.sweep import Cell, predict, write_cells

    decoder, prompts = measured.decoder, measured.prompts
    try:
        with progress() as bar:
            task = bar.add_task("predict", total=len(prompts) + REPEATS + 1 + options["verify"], rate="autoregressive")
            measured.autoregressive()

            def tick(what: str) -> None:
                bar.update(task, advance=1, rate=what)

            drafts = measured.drafts(partial(tick, "agreement"))
            middle = sorted(prompts, key=len)[len(prompts) // 2]
            costs = measure_costs(decoder, middle, speculations[-1], tick=partial(tick, "costs"))
            ranked = predict(decoder, drafts, costs, layers, speculations)
            if not ranked:
                raise CliError("the model ends every answer at once, so nothing is drafted: choose other prompts")
            for s, speedup in ranked:
                cell = Cell(s.exit_layer, s.num_speculations, predicted_speedup=speedup)
                cell = replace(cell, acceptance_rate=s.acceptance_rate, tokens_per_round=s.tokens_per_round)
                found[s.exit_layer, s.num_speculations] = cell
            write_cells(csv, [found[key] for key in sorted(found)])
            # the best ones, and one from the middle of the ranking
            chosen = [s for s, _ in ranked[: max(1, options["verify"] - 1)]] + [ranked[len(ranked) // 2][0]]
            for s in dict.fromkeys(chosen[: options["verify"]]):
                measured.autoregressive(anew=True)  # beside the cell, with as many repeats
                cell = measured.measure(s.exit_layer, s.num_speculations)
                found[s.exit_layer, s.num_speculations] = replace(
                    cell, predicted_speedup=found[s.exit_layer, s.num_speculations].predicted_speedup
                )
                write_cells(csv, [found[key] for key in sorted(found)])
                tick("verifying")
    except KeyboardInterrupt:
        return True
    return False


def _print(cells: list[Any]) -> None:
    from layerskip_kernels.measure.sweep import rank

    ranked = sorted(cells, key=rank)
    kept = [cell for cell in ranked if cell.speedup is not None and cell.predicted_speedup is not None] or ranked[
        :SHOWN
    ]
    made = table("E", "K", "tok/s", "speed-up", "predicted", "off", "acceptance", "tokens/round", "same")
    for cell in kept:
        off = None
        if cell.speedup and cell.predicted_speedup:
            off = cell.predicted_speedup / cell.speedup - 1
        made.add_row(
            str(cell.exit_layer),
            str(cell.num_speculations),
            figure(cell.tokens_per_second, "{:.1f}"),
            figure(cell.speedup, "{:.2f} x"),
            figure(cell.predicted_speedup, "{:.2f} x"),
            figure(off, "{:+.1%}"),
            figure(cell.acceptance_rate, "{:.1%}"),
            figure(cell.tokens_per_round, "{:.2f}"),
            "n/a" if cell.samples is None else f"{cell.same_tokens}/{cell.samples}",
        )
    show(made)
    best = ranked[0]
    kind = "predicted" if best.speedup is None else "measured"
    click.echo(
        f"best of {len(cells)} cells: E {best.exit_layer}, K {best.num_speculations}, {best.best_known:.2f} x {kind}"
    )


def _finish(decoder: Any, cells: list[Any], folder: Path, options: dict[str, Any]) -> None:
    from layerskip_kernels.measure.environment import environment
    from layerskip_kernels.measure.pictures import draw_sweep
    from layerskip_kernels.measure.sweep import rank

    pictures = write_pictures(draw_sweep(cells), folder / "sweep")
    best = min(cells, key=rank)
    content = {"settings": _identity(options), "environment": environment(decoder)}
    content["best"] = {"exit_layer": best.exit_layer, "num_speculations": best.num_speculations}
    write_json(folder / "sweep.json", content)
    say_written(folder / "sweep.csv", folder / "sweep.json", *pictures)
