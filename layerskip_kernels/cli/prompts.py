"""Where prompts come from: options, files, standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from layerskip_kernels.cli.errors import CliError


def given_prompts(prompts: tuple[str, ...], files: tuple[str, ...]) -> list[str] | None:
    """The prompts of the options, files and a piped standard input; None when they are to be typed at the terminal."""
    found = [(f"prompt {number}", text) for number, text in enumerate(prompts, 1)]
    for file in files:
        found += _read_file(Path(file))
    if not found:
        if sys.stdin is not None and sys.stdin.isatty():
            return None
        raw = b"" if sys.stdin is None else sys.stdin.buffer.read()
        if not raw.strip():
            raise CliError("there is no prompt: give --prompt or --prompt_file, or one on standard input")
        found = [("standard input", _without_newline(_decode(raw, "standard input")))]
    for where, text in found:
        if not text:
            raise CliError(f"{where} is empty")
    return [text for _, text in found]


def typed_prompts() -> Iterator[str]:
    """Lines typed at the terminal, until end of file."""
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:  # not on Windows
        pass
    click.echo("Type a prompt and press Enter. Ctrl-C stops an answer, Ctrl-D ends.", err=True)
    while True:
        try:
            if sys.stdout.isatty():
                line = input("> ")
            else:
                click.echo("> ", nl=False, err=True)
                line = input()
        except EOFError:
            click.echo(err=True)
            return
        except UnicodeDecodeError:
            click.echo("layerskip: that line is not text in the terminal's encoding", err=True)
            continue
        if line:
            yield line


def _read_file(path: Path) -> list[tuple[str, str]]:
    if path.is_dir():
        raise CliError(f"--prompt_file {path} is a folder, give a file")
    try:
        text = _decode(path.read_bytes(), f"--prompt_file {path}")
    except FileNotFoundError:
        raise CliError(f"--prompt_file {path} does not exist") from None
    except OSError as error:
        raise CliError(f"--prompt_file {path} cannot be read: {error.strerror}") from error
    if path.suffix != ".jsonl":
        return [(f"--prompt_file {path}", _without_newline(text))]
    lines = [(f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise CliError(f"--prompt_file {path} is empty")
    return [(where, _prompt_field(line, where)) for where, line in lines]


def _prompt_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CliError(f"{where} is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise CliError(f'{where} must be an object with a text "prompt"')
    return prompt


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CliError(f"{where} is not UTF-8 text (byte {raw[error.start]:#04x} at position {error.start})") from error


def _without_newline(text: str) -> str:
    """Drops the one line end that editors and `echo` put after a text."""
    return text.removesuffix("\n").removesuffix("\r")
