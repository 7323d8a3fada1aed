"""`layerskip benchmark`: strategies and peers side by side on the prompts of a data set."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from layerskip_kernels.cli.errors import INTERRUPTED, CliError, one_sentence
from layerskip_kernels.cli.load import load_decoder
from layerskip_kernels.cli.measuring import check_dataset, load_prompts, settings, token_arguments
from layerskip_kernels.cli.options import (
    STRATEGIES,
    MetaCommand,
    TrueFalse,
    dataset_options,
    exit_options,
    model_options,
    penalty_option,
    token_options,
)
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
)

PEERS = ("transformers",)


class Benchmark(MetaCommand):
    LISTS = (*MetaCommand.LISTS, "generation_strategy")


@click.command(cls=Benchmark, short_help="Time strategies side by side on a data set, with the quality of the answers.")
@model_options(max_batch_size=1)
@dataset_options
@click.option(
    "--generation_strategy",
    type=click.Choice(STRATEGIES),
    multiple=True,
    default=("autoregressive", "self_speculative"),
    help="Several, side by side; ratios are to the first.",
)
@exit_options
@token_options
@penalty_option
@click.option("--peers", type=click.Choice(PEERS), multiple=True, help="Also time generation of this library.")
@click.option("--num_warmup", type=click.IntRange(0), default=1, help="Calls of each that are not counted.")
@click.option(
    "--execute_code",
    type=TrueFalse(),
    is_flag=False,
    flag_value="True",
    default="False",
    help="human_eval: run the answers against the tests, for pass@1. They run with limits, but unguarded.",
)
@OUTPUT_DIR
@click.pass_context
def benchmark(ctx: click.Context, **options: Any) -> None:
    """Decode the prompts of a data set with several strategies, in turns, and compare speed and answers.

    Data sets: cnn_dm_summarization, xsum_summarization, cnn_dm_lm, top_v2, gsm8k (from the hub, or --data_path),
    human_eval (from its package), custom_jsonl, chat_format, token_ids (from --data_path). Ctrl-C keeps what was
    measured.

    \b
    Examples:
      layerskip benchmark --dataset human_eval --num_samples 10 --max_steps 64
      layerskip benchmark --dataset custom_jsonl --data_path prompts.jsonl --peers transformers --max_steps 32
      layerskip benchmark --dataset human_eval --num_samples 4 --generation_strategy self_speculative early_exit
    """
    need("measure", "scipy", "rouge_score", "sacrebleu")
    if options["execute_code"] and options["dataset"] != "human_eval":
        raise CliError(f"--execute_code: {options['dataset']} has no tests to run, human_eval does")
    with one_sentence():
        check_dataset(options["dataset"])
        folder = prepare(options["output_dir"])
        decoder = load_decoder(ctx, options)
        samples = load_prompts(options, decoder.tokenizer)
        ways = _ways(decoder, options)
        calls, interrupted = _run(ways, samples, options)
        report = _report(decoder, samples, calls, options)
    _print(report["strategies"])
    path = folder / f"benchmark_{options['dataset']}_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}.json"
    with one_sentence():
        write_json(path, {"interrupted": interrupted, "settings": settings(options), **report})
    say_written(path)
    if interrupted:
        ctx.exit(INTERRUPTED)


def _ways(decoder: Any, options: dict[str, Any]) -> dict[str, Any]:
    from layerskip_kernels.datasets import DATASETS
    from layerskip_kernels.measure.benchmark import ours

    arguments = token_arguments(decoder, options, DATASETS[options["dataset"]].stop)
    strategies = dict.fromkeys(options["generation_strategy"])
    if "autoregressive" in strategies and len(strategies) == 1 and options["exit_layer"] != -1:
        click.echo("note: autoregressive runs the whole model and ignores --exit_layer", err=True)
    found = {name: ours(decoder, name, arguments) for name in strategies}
    if "transformers" in options["peers"]:
        from layerskip_kernels.measure.peers import transformers_ways
        from layerskip_kernels.models.hub import checkpoint_folder

        found |= transformers_ways(decoder, checkpoint_folder(options["model"]), arguments)
    return found


def _run(ways: dict[str, Any], samples: list[Any], options: dict[str, Any]) -> tuple[dict[str, list[Any]], bool]:
    from layerskip_kernels.measure.benchmark import run

    with progress() as bar:
        task = bar.add_task(options["dataset"], total=len(samples), rate="warming up")

        def tick(calls: dict[str, list[Any]], prompts: int) -> None:
            last = "  ".join(f"{name} {figure(c[-1].tokens_per_second, '{:.0f}')}" for name, c in calls.items())
            bar.update(task, advance=prompts, rate=f"tok/s: {last}")

        batch = options["max_batch_size"]
        return run(ways, samples, batch_size=batch, warmup=options["num_warmup"], tick=tick)


def _report(decoder: Any, samples: list[Any], calls: dict[str, list[Any]], options: dict[str, Any]) -> dict[str, Any]:
    from layerskip_kernels.datasets import DATASETS
    from layerskip_kernels.measure.benchmark import summarize
    from layerskip_kernels.measure.environment import environment
    from layerskip_kernels.measure.quality import Scorer

    form = DATASETS[options["dataset"]]
    scorer = Scorer(options["dataset"], options["stop_words"] or form.stop, options["execute_code"])
    baseline = next(iter(calls.values()))
    strategies = {}
    for name, made in calls.items():
        rows = []
        for number, call in enumerate(made):
            for index, ids, text in zip(call.samples, call.sequences, call.texts):
                rows.append(
                    {
                        "sample": index,
                        "call": number,
                        "prompt": samples[index].prompt,
                        "response": samples[index].response,
                        "text": text,
                        "tokens": ids,
                        "quality": scorer.score(text, samples[index]),
                    }
                )
        timings = [
            {key: value for key, value in asdict(call).items() if key not in ("sequences", "texts")}
            | {"tokens_per_second": call.tokens_per_second}
            for call in made
        ]
        summary = summarize(made, baseline, options["seed"]) | {"quality": scorer.totals(rows)}
        strategies[name] = {"summary": summary, "calls": timings, "samples": rows}
    return {"environment": environment(decoder), "baseline": next(iter(calls)), "strategies": strategies}


def _print(strategies: dict[str, Any]) -> None:
    count = next(iter(strategies.values()))["summary"]["samples"]
    speed = table(
        "", "tok/s", "median", "95 %", "ratio", "ms/token", "first ms", "same", title=f"Speed, {count} prompts"
    )
    drafts = table("", "acceptance", "tokens/round", "by position", title="Drafts")
    quality = table("", *_columns(strategies), title="Quality")
    for name, entry in strategies.items():
        s = entry["summary"]
        rate, ratio = s["tokens_per_second"] or {}, s["ratio"] or {}
        interval = "n/a" if rate.get("low") is None else f"{rate['low']:.1f}..{rate['high']:.1f}"
        speed.add_row(
            name,
            figure(rate.get("mean"), "{:.1f}"),
            figure(rate.get("median"), "{:.1f}"),
            interval,
            figure(ratio.get("median"), "{:.2f} x"),
            figure((s["time_per_token"] or {}).get("mean"), "{:.2f}", 1000),
            figure((s["time_to_first_token"] or {}).get("mean"), "{:.1f}", 1000),
            f"{s['same_tokens']}/{s['samples']}",
        )
        if "tokens_per_round" in s:
            positions = " ".join(figure(share, "{:.0%}") for share in s["position_acceptance"])
            drafts.add_row(name, figure(s["acceptance_rate"], "{:.1%}"), f"{s['tokens_per_round']:.2f}", positions)
        quality.add_row(name, *(f"{value:.3g}" for value in s["quality"].values()))
    show(speed, *([drafts] if drafts.rows else []), *([quality] if len(quality.columns) > 1 else []))


def _columns(strategies: dict[str, Any]) -> list[str]:
    return list(next(iter(strategies.values()))["summary"]["quality"])
