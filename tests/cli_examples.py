"""The examples that a command's --help prints, to be run as printed."""

import shlex

from click.testing import CliRunner

from layerskip_kernels.cli import app


def examples(command: str) -> list[list[str]]:
    """The arguments after `layerskip COMMAND` of each example."""
    lines = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output.splitlines()
    return [shlex.split(line)[2:] for line in lines if line.lstrip().startswith(f"layerskip {command}")]
