"""The page of each measuring command holds its --help, word for word."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from layerskip_kernels.cli import app

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("command", ["benchmark", "eval", "inspect", "sweep", "tune"])
def test_the_page_holds_the_help(command):
    shown = CliRunner().invoke(app, [command, "--help"], prog_name="layerskip", terminal_width=100).output
    (block,) = re.findall(r"```text\n(Usage: .*?)```", (DOCS / f"{command}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block == shown, f"copy the output of `COLUMNS=100 layerskip {command} --help` into docs/{command}.md"
