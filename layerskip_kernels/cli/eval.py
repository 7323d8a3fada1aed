"""`layerskip eval`: the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from layerskip_kernels.cli.errors import CliError, one_sentence
from layerskip_kernels.cli.load import load_decoder
from layerskip_kernels.cli.measuring import settings
from layerskip_kernels.cli.options import (
    STRATEGIES,
    MetaCommand,
    TrueFalse,
    draft_options,
    exit_options,
    model_options,
)
from layerskip_kernels.cli.output import OUTPUT_DIR, figure, need, prepare, say_written, show, table, write_json


class Eval(MetaCommand):
    LISTS = ("tasks", "include_path")


@click.command(name="eval", cls=Eval, short_help="Run tasks of lm-evaluation-harness.")
@model_options
@click.option("--tasks", multiple=True, required=True, help="Names, patterns as mmlu_*, or .yaml files; several.")
@click.option(
    "--include_path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    help="Folder with tasks of your own; several.",
)
@click.option("--num_fewshot", type=click.IntRange(0), help="Examples before a question.  [default: the task's]")
@click.option("--limit", type=float, help="Questions per task; below 1: their share.  [default: all]")
@click.option("--gen_kwargs", help='In place of what tasks say: do_sample=True,temperature=0.8 or {"until": ["."]}.')
@click.option("--max_gen_toks", type=click.IntRange(1), help="Most tokens of an answer.  [default: the task's, or 256]")
@click.option(
    "--apply_chat_template",
    is_flag=False,
    flag_value="True",
    help="Ask through the tokenizer's chat template; or the name of one of several.",
)
@click.option("--system_instruction", help="Text in front of every conversation.")
@click.option(
    "--fewshot_as_multiturn",
    type=TrueFalse(),
    is_flag=False,
    flag_value="True",
    help="Examples as turns of the conversation.  [default: with a chat template]",
)
@click.option(
    "--enable_thinking",
    type=TrueFalse(),
    is_flag=False,
    flag_value="True",
    help="For chat templates that know it.  [default: the template's]",
)
@click.option("--think_end_token", help="Text that ends the model's thinking; what follows is the answer.")
@click.option("--generation_strategy", type=click.Choice(STRATEGIES), default=STRATEGIES[0])
@exit_options
@draft_options
@click.option("--seed", type=int, help="Of examples and sampling.  [default: lm_eval's]")
@click.option("--use_cache", type=click.Path(), help="File that keeps answers, for going on after Ctrl-C.")
@click.option("--log_samples", is_flag=True, help="Also write every question and answer.")
@click.option("--confirm_run_unsafe_code", is_flag=True, help="Allow tasks that run what the model wrote, as code.")
@OUTPUT_DIR
@click.pass_context
def evaluate(ctx: click.Context, **options: Any) -> None:
    """Rate a model on tasks of EleutherAI's lm-evaluation-harness, and tell how its drafts fared.

    Options are lm_eval's. Speculation changes no answer, so scores are those of autoregressive decoding. Tasks whose
    data are local files need no network.

    \b
    Examples:
      layerskip eval --tasks python_lines.yaml
      layerskip eval --tasks python_lines --include_path . --num_fewshot 2 --limit 3 --log_samples
      layerskip eval --tasks python_lines.yaml --generation_strategy autoregressive --max_gen_toks 8
    """
    need("eval", "lm_eval")
    if options["limit"] is not None and not options["limit"] > 0:
        raise CliError(f"--limit {options['limit']:g}: must be above 0")
    if options["fewshot_as_multiturn"] and options["apply_chat_template"] is None:
        raise CliError("--fewshot_as_multiturn: needs --apply_chat_template")
    how = _gen_kwargs(options)
    with one_sentence():
        folder = prepare(options["output_dir"])
        tasks, manager = _load(options["tasks"], options["include_path"])
        decoder = load_decoder(ctx, options)
        results = _run(decoder, tasks, manager, how, options)
        samples = results.pop("samples", {})
        _print(results)
        stem = f"eval_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
        paths = [folder / f"{stem}.json"]
        write_json(paths[0], _plain({"settings": settings(options), **results}))
        if options["log_samples"]:
            paths.append(folder / f"{stem}_samples.json")
            write_json(paths[1], _plain(samples))
    say_written(*paths)


def _gen_kwargs(options: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    text = (options["gen_kwargs"] or "").strip()
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise CliError(f"--gen_kwargs {text}: is not JSON: {error}") from error
    else:
        for item in filter(None, text.split(",")):
            if "=" not in item:
                raise CliError(f"--gen_kwargs {item!r}: does not look like key=value")
        found = simple_parse_args_string(text)
    if options["max_gen_toks"] is not None:
        found["max_gen_toks"] = options["max_gen_toks"]
    return found


def _load(names: Sequence[str], include_path: Sequence[Path]) -> tuple[list[Any], Any]:
    """The tasks and groups of these names with their data, and lm_eval's manager of them."""
    import jinja2
    import yaml
    from lm_eval.tasks import TaskManager

    names = [name for item in names for name in item.split(",") if name]
    for name in names:
        if not _is_file(name):
            continue
        if not Path(name).is_file():
            raise CliError(f"--tasks {name}: there is no such file")
        if re.search(r"^[{\s]*group\s*:", Path(name).read_text(encoding="utf-8"), re.MULTILINE):
            raise CliError(f"--tasks {name}: a group goes by its name, with --include_path for its folder")
    # reading lm_eval's own 14 000 tasks takes seconds, and is for nothing where all tasks are the user's
    manager = TaskManager(include_path=list(include_path), include_defaults=False)
    found = [_matches(name, manager) for name in names]
    if not all(found) or any(name in manager.all_groups for match in found for name in match):
        manager = TaskManager(include_path=list(include_path))
        found = [_matches(name, manager) for name in names]
    for name, match in zip(names, found):
        if not match:
            near = get_close_matches(name, manager.all_tasks, n=5)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise CliError(f"--tasks {name}: there is no such task; {hint}")
    tasks: list[Any] = []
    for name in dict.fromkeys(name for match in found for name in match):
        try:
            loaded = manager.load(name)
        except (LookupError, AssertionError, AttributeError, yaml.YAMLError, jinja2.TemplateError) as error:
            raise ValueError(f"--tasks {name}: {type(error).__name__}: {error}") from error
        # a group comes before those in it
        tasks += [next(iter(loaded["groups"].values()))] if loaded["groups"] else loaded["tasks"].values()
    return tasks, manager


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _matches(name: str, manager: Any) -> list[str]:
    return [name] if _is_file(name) else manager.match_tasks([name])


def _run(decoder: Any, tasks: list[Any], manager: Any, how: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    import jinja2
    import lm_eval

    from layerskip_kernels.integrations.lm_eval import SEED, LayerSkipLM

    names = ("verification", "rejection_method", "draft_confidence", "adaptive_speculations")
    names += ("enable_thinking", "think_end_token")
    strategy, seed = options["generation_strategy"], options["seed"]
    model = LayerSkipLM(
        decoder,
        generation_strategy=strategy,
        seed=SEED if seed is None else seed,
        **{name: options[name] for name in names},
    )
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    template, multiturn = options["apply_chat_template"], options["fewshot_as_multiturn"]
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options["num_fewshot"],
            limit=options["limit"],
            gen_kwargs=how or None,
            apply_chat_template=template == "True" or template or False,
            system_instruction=options["system_instruction"],
            fewshot_as_multiturn=template is not None if multiturn is None else multiturn,
            use_cache=options["use_cache"],
            log_samples=options["log_samples"],
            confirm_run_unsafe_code=options["confirm_run_unsafe_code"],
            batch_size=decoder.max_batch_size,
            device=str(decoder.device),
            **({} if seed is None else dict.fromkeys(seeds, seed)),
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"a task's template: {error}") from error
    results["config"] |= {"model": "layerskip", "model_args": {"pretrained": options["model"]}}
    return results


def _print(results: dict[str, Any]) -> None:
    scores = table("task", "filter", "shots", "metric", "value", "± error", title="Scores")
    for name, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{which}")
            label = str(figures.get("alias", name)).replace("[", "\\[")
            shots = str(results.get("n-shot", {}).get(name, ""))
            scores.add_row(label, which, shots, metric, _score(value), _score(error))
    ran = results["config"]["layerskip"]
    tables = [scores]
    if made := ran.get("generation"):
        speed = table("", "answers", "tokens", "tok/s", "acceptance", "tokens/round", "by position", title="Generation")
        positions = " ".join(figure(share, "{:.0%}") for share in made.get("position_acceptance", []))
        speed.add_row(
            ran["generation_strategy"],
            str(made["answers"]),
            str(made["tokens"]),
            figure(made["tokens_per_second"], "{:.1f}"),
            figure(made.get("acceptance_rate"), "{:.1%}"),
            figure(made.get("tokens_per_round"), "{:.2f}"),
            positions or "n/a",
        )
        tables.append(speed)
    if rated := ran.get("loglikelihood"):
        speed = table("", "texts", "tokens", "texts/s", title="Log-likelihoods")
        speed.add_row("", str(rated["texts"]), str(rated["tokens"]), f"{rated['texts_per_second']:.1f}")
        tables.append(speed)
    show(*tables)


def _score(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None or value == "N/A" else str(value)


def _plain(value: Any) -> Any:
    """As JSON holds it: what it has no form for by name, no number as null."""
    from lm_eval.utils import handle_non_serializable

    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(handle_non_serializable(value))
