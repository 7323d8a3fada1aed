"""What the measuring commands write, and the extras they need."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from layerskip_kernels.cli.errors import CliError
from layerskip_kernels.files import write_whole

OUTPUT_DIR = click.option(
    "--output_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default="logs",
    help="Folder for what is written; it is created.",
)


def need(extra: str, *modules: str) -> None:
    """Raises CliError, with the line that installs them, when one of the `modules` is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise CliError(f'{", ".join(missing)} is not installed: pip install "layerskip_kernels[{extra}]"')


def prepare(folder: Path) -> Path:
    """Creates the folder and tries to write there: found out now rather than after the model ran."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    return folder


def write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_pictures(figure: Any, stem: Path) -> list[Path]:
    """A matplotlib figure as PNG and PDF; returns their paths."""
    paths = []
    for kind in ("png", "pdf"):
        data = BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # tokens may be of any script
            figure.savefig(data, format=kind, dpi=140)
        paths.append(stem.with_name(f"{stem.name}.{kind}"))
        write_whole(paths[-1], data.getvalue())
    return paths


def say_written(*paths: Path) -> None:
    click.echo(f"written: {', '.join(map(str, paths))}", err=True)


def table(*columns: str, title: str | None = None) -> Table:
    """The first column is text, the others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    return made


def show(*tables: Table) -> None:
    console = Console(highlight=False)
    # in a file or on a narrow terminal a table keeps its width: lines may wrap, but nothing is lost
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, *(console.measure(one, options=wide).maximum for one in tables))
    for one in tables:
        console.print(one)


def progress() -> Progress:
    """A bar on standard error with a `rate` field; shown on a terminal only."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not Console(stderr=True).is_terminal,
    )


def figure(value: float | None, pattern: str, scale: float = 1.0) -> str:
    return "n/a" if value is None else pattern.format(value * scale)
