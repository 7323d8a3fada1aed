"""`layerskip inspect` on a tiny checkpoint."""

import json

import pytest
from cli_examples import examples
from click.testing import CliRunner
from tiny_models import tiny_checkpoint

from layerskip_kernels.cli import app


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama2", late_scale=0.1))


def run(checkpoint, *arguments):
    arguments = ["inspect", "--model", checkpoint, *map(str, arguments)]
    return CliRunner().invoke(app, arguments, prog_name="layerskip", env={"COLUMNS": "60"})


def test_a_text_as_table_picture_and_json(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("draft, then verify \u00e9\u4e2d$^\n" * 4)
    out = tmp_path / "new" / "folder"
    result = run(checkpoint, "--prompt_file", tmp_path / "text.txt", "--output_dir", out)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "inspect.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == [1, 2, 3, 4]
    assert sum(layer["first_stable"] for layer in report["layers"]) == report["tokens"]
    assert report["layers"][-1]["agreement"] == 1.0
    rows = [line.split() for line in result.stdout.splitlines() if line.split() and line.split()[0] in "1234"]
    for row, layer in zip(rows, report["layers"], strict=True):
        assert row[1] == f"{layer['agreement']:.1%}" and row[2] == f"{layer['entropy']:.2f}"
    assert (out / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "inspect.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(out.iterdir())) == 3


def test_the_examples_work_as_printed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("some text")
    found = examples("inspect")
    assert len(found) == 2
    for arguments in found:
        result = run(checkpoint, *arguments)
        assert result.exit_code == 0, result.output
        assert (tmp_path / "logs" / "inspect.png").exists()
    assert json.loads((tmp_path / "logs/inspect.json").read_text())["tokens"] <= 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--output_dir", "taken"], "taken"),
        (["--prompt_file", "nowhere.txt"], "--prompt_file nowhere.txt does not exist"),
        (["--max_steps", "-1", "--prompt", "x"], "-1 is not in the range x>=0"),
    ],
)
def test_bad_input(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    result = run(checkpoint, *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
