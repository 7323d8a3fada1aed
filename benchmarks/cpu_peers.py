"""Decoding on the CPU beside other libraries: the same weights, prompt and threads, batch 1, greedy.

    pip install layerskip_kernels[peers]
    python benchmarks/cpu_peers.py --json demo.json                              # the demo model
    python benchmarks/smollm2.py build/smollm2
    python benchmarks/cpu_peers.py --model build/smollm2 --exit_layer 20 --num_speculations 2
    python benchmarks/make_controlled.py build/1b
    python benchmarks/cpu_peers.py --model build/1b --rows ours llama.cpp "transformers float32"

Every peer has its weights in a process of its own, which waits while others decode (`idle_cpu_share` in the JSON says
how much of one processor it used meanwhile). Each round runs every row once. The read bandwidth is probed before and
after each turn; a turn across a change of more than --steady is thrown away and repeated. Figures are medians over the
rounds, of decoding without prefill (how they are told apart: `peer_workers.py`). "of bandwidth" is tokens per second
times the bytes of the weights as stored, which plain decoding reads for every token. "= plain" counts speculation's
tokens before the first that differs from the same peer's plain greedy ones, "= float32" those of every row before the
first that differs from transformers' float32 greedy ones. A row that can't run is named with its reason.

OpenVINO models are exported by optimum-intel, which may need an older transformers: --openvino_python is a Python that
has both.
"""

import argparse
import fcntl
import json
import os
import platform
import signal
import sys
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch
from bandwidth import read_bandwidth
from make_controlled import random_prompt
from peer_files import PeerFiles
from peer_rows import Row, chosen, figures, steady_turn, table
from peer_workers import Task, Worker, set_environment
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig, AutoTokenizer

from layerskip_kernels import __version__
from layerskip_kernels.files import write_whole
from layerskip_kernels.measure.environment import cpu_model, cpu_variant, version
from layerskip_kernels.models.hub import checkpoint_folder

PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "openvino", "optimum-intel", "nncf", "numpy")
PROBE_FLOATS = 64 << 20
PROMPT = '''def mean(values):
    """Return the arithmetic mean of a list of numbers."""
    total = 0
    for value in values:
        total += value
    return total / len(values)


def median(values):
    """Return the middle value of a list of numbers, the mean of the two middle ones if their count is even."""
    ordered = sorted(values)
    middle = len(ordered) // 2
'''


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or the folder of a Llama checkpoint")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only rows whose name begins so; default all")
    parser.add_argument("--exit_layer", type=int, help="recorded with the checkpoint, or a quarter of its layers")
    parser.add_argument("--num_speculations", type=int, help="recorded with the checkpoint, or 4")
    parser.add_argument("--threads", type=int, default=min(torch.get_num_threads(), len(os.sched_getaffinity(0))))
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steady", type=float, default=0.15, help="change of bandwidth a turn may have")
    parser.add_argument("--tries", type=int, default=3, help="turns per row and round, at most")
    parser.add_argument("--cache", type=Path, default=Path("build/peers"), help="folder for the converted weights")
    parser.add_argument("--openvino_python", default=sys.executable, help="a Python that has optimum-intel")
    parser.add_argument("--lock", type=Path, help="lock this file: shared while loading, exclusively for the rounds")
    parser.add_argument(
        "--lock_seconds", type=float, default=220, help="rounds under one lock take no longer than this"
    )
    parser.add_argument("--json", type=Path, help="write settings, figures and every turn to this file")
    arguments = parser.parse_args(argv)
    try:
        arguments.chosen = chosen(arguments.rows)
    except ValueError as error:
        parser.error(str(error))
    for name in ("threads", "prompt_tokens", "rounds", "tries"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: expected at least 1")
    if arguments.new_tokens < 16:
        parser.error(f"--new_tokens={arguments.new_tokens}: expected at least 16")
    return arguments


def prompt_of(folder: Path, tokens: int) -> list[int]:
    """The first tokens of `PROMPT`, repeated as needed; without a tokenizer random ones."""
    if not (folder / "tokenizer.json").is_file():
        return random_prompt(AutoConfig.from_pretrained(folder).vocab_size, tokens)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    return (ids * -(-tokens // len(ids)))[:tokens]


@contextmanager
def locked(path: Path | None, kind: int):
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, kind)
        yield


def load(arguments, files: PeerFiles, task: Task, console: Console) -> tuple[dict, dict[str, str]]:
    """Workers by their key; the reasons of those rows that can't run."""
    workers, failed = {}, {}
    for row in arguments.chosen:
        if row.worker in workers or row.worker in failed:
            continue
        with locked(arguments.lock, fcntl.LOCK_SH):
            try:
                workers[row.worker] = Worker(row.peer, row.weights, row.load, files, task)
            except RuntimeError as error:
                failed[row.worker] = str(error)
        console.print(f"{row.name}: {failed.get(row.worker, 'loaded')}")
    return workers, {row.name: failed[row.worker] for row in arguments.chosen if row.worker in failed}


def warm_up(rows, workers, reasons: dict[str, str], console: Console) -> None:
    """Decodes every row once: it compiles, and fills caches. A row that fails gets its reason."""
    for row in rows:
        try:
            result = workers[row.worker].decode(row.method)
            note = f"{result['decode_tokens'] / result['decode_seconds']:.1f} tok/s in the warm-up"
        except RuntimeError as error:
            note = reasons[row.name] = str(error)
        console.print(f"{row.name}: {note}")


def measure(arguments, workers, reasons, console: Console, turns: list[dict], tokens: dict[str, list[int]]) -> None:
    """Fills in every turn of every round, each row's tokens, and the reasons of rows that fail in the warm-up."""
    data = torch.ones(PROBE_FLOATS)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())

    def rows() -> list[Row]:
        return [row for row in arguments.chosen if row.name not in reasons]

    def one_round(number: int) -> None:
        for row in rows():
            taken = steady_turn(
                lambda row=row: workers[row.worker].decode(row.method),
                lambda: read_bandwidth(data, repeats=8),
                arguments.steady,
                arguments.tries,
            )
            for turn in taken:
                tokens[row.name] = turn.pop("tokens")
                turns.append({"round": number, "row": row.name, **turn})
            rate = turn["decode_tokens"] / turn["decode_seconds"]
            progress.update(bar, advance=1, description=f"{row.name}: {rate:.1f} tok/s")

    number, warm = 0, False
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("turns", total=arguments.rounds * len(rows()))
        while number < arguments.rounds:
            with locked(arguments.lock, fcntl.LOCK_EX):
                started = ended = time.monotonic()
                longest = 0.0
                while number < arguments.rounds and ended - started + longest <= arguments.lock_seconds:
                    if warm:
                        one_round(number)
                        number += 1
                    else:
                        warm_up(rows(), workers, reasons, console)
                        progress.update(bar, total=arguments.rounds * len(rows()))
                        warm = True
                    longest, ended = max(longest, time.monotonic() - ended), time.monotonic()


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(argv)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit keeps what was measured, as Ctrl-C does
    set_environment(arguments.threads)
    torch.set_num_threads(arguments.threads)
    source = checkpoint_folder(arguments.model)
    files = PeerFiles(source, arguments.cache, arguments.openvino_python)
    config = AutoConfig.from_pretrained(source)
    recorded = getattr(config, "layerskip", None) or {}
    task = Task(
        prompt_of(source, arguments.prompt_tokens),
        arguments.new_tokens,
        arguments.exit_layer or recorded.get("exit_layer") or max(1, config.num_hidden_layers // 4),
        arguments.num_speculations or recorded.get("num_speculations") or 4,
        arguments.threads,
    )
    workers, reasons = load(arguments, files, task, console)
    turns: list[dict] = []
    tokens: dict[str, list[int]] = {}
    try:
        try:
            measure(arguments, workers, reasons, console, turns, tokens)
        except KeyboardInterrupt:
            console.print(f"interrupted: {len(turns)} turns are kept")
        report(arguments, source.name, task, workers, reasons, turns, tokens)
    finally:  # after the report: closing takes seconds, and a second interrupt would lose what was measured
        for worker in workers.values():
            worker.close()


def report(arguments, model: str, task: Task, workers, reasons, turns: list[dict], tokens: dict) -> None:
    """Writes the file of `--json`, and prints the table."""
    found = [
        figures(row, [turn for turn in turns if turn["row"] == row.name], tokens, workers[row.worker].loaded)
        for row in arguments.chosen
        if row.name not in reasons
    ]
    versions = {"layerskip_kernels": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("chosen", "json", "cache", "lock", "lock_seconds", "openvino_python")
    }
    settings |= {"exit_layer": task.exit_layer, "num_speculations": task.num_speculations, "model": model}
    if arguments.json:
        whole = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": settings,
            "versions": versions,
            "machine": {
                "cpu": cpu_model(),
                "cpu_variant": cpu_variant(),
                "logical_processors": os.cpu_count(),
                "system": platform.system(),
            },
            "rows": found,
            "unavailable": reasons,
            "turns": turns,
            "tokens": tokens,
        }
        write_whole(arguments.json, (json.dumps(whole, indent=1) + "\n").encode())
    caption = (
        f"{model}, E={task.exit_layer}, K={task.num_speculations}, {len(task.prompt)}+{task.new_tokens} tokens, "
        f"{task.threads} threads, medians of {arguments.rounds} rounds"
    )
    Console(width=140).print(table(found, reasons, task.new_tokens, caption))


if __name__ == "__main__":
    main()
