"""`layerskip sweep` on a tiny checkpoint: cells, resuming, prediction, interruption and refusals."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from cli_examples import examples
from click.testing import CliRunner
from tiny_models import tiny_checkpoint

import layerskip_kernels as lk
from layerskip_kernels.cli import app
from layerskip_kernels.measure.costs import Costs
from layerskip_kernels.measure.settings import Setting
from layerskip_kernels.measure.sweep import Cell, Sweep, rank, read_cells

PROMPTS = ["one", "two and a half of them", "three, four"]
DATA = ["--dataset", "custom_jsonl", "--data_path", "prompts.jsonl"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama2", late_scale=0.1))


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))

    def run(*arguments):
        fixed = ["sweep", "--model", checkpoint, "--repeats", "1"]
        return CliRunner().invoke(app, [*fixed, *map(str, arguments)], prog_name="layerskip", env={"COLUMNS": "70"})

    return run


def test_cells_are_appended_and_gone_on_with(run, checkpoint, tmp_path, monkeypatch):
    measured = []
    measure = Sweep.measure

    def counted(self, *cell):
        if len(measured) == 3:
            measured.append(None)
            raise KeyboardInterrupt
        measured.append(cell)
        return measure(self, *cell)

    monkeypatch.setattr(Sweep, "measure", counted)
    arguments = [*DATA, "--max_steps", 10, "--num_speculations_last", 2, "--output_dir", "new/out"]
    result = run(*arguments)
    assert result.exit_code == 130, result.output
    out = tmp_path / "new/out"
    assert [(cell.exit_layer, cell.num_speculations) for cell in read_cells(out / "sweep.csv")] == measured[:3]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    grid = [(e, k) for e in (1, 2, 3) for k in (1, 2)]
    assert [cell for cell in measured if cell] == grid
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint)
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    for (e, k), row in zip(grid, rows, strict=True):
        stats = [decoder.generate(p, max_new_tokens=10, exit_layer=e, num_speculations=k).stats for p in PROMPTS]
        assert float(row["acceptance_rate"]) == sum(s.accepted for s in stats) / sum(s.drafted for s in stats)
        assert float(row["speedup"]) > 0 and row["same_tokens"] == row["samples"] == "3"
    best = min(read_cells(out / "sweep.csv"), key=rank)
    assert json.loads((out / "sweep.json").read_text())["best"]["exit_layer"] == best.exit_layer
    assert f"best of 6 cells: E {best.exit_layer}, K {best.num_speculations}" in result.output
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sweep.pdf").read_bytes().startswith(b"%PDF")
    refused = run(*arguments, "--sample", "True")
    assert refused.exit_code == 2
    assert "sweep.csv was made with sample=False, not True: choose another --output_dir" in refused.stderr


@pytest.mark.parametrize("more", [[], ["--sample", "--max_batch_size", 2]])
def test_fast_predicts_what_is_accepted(run, tmp_path, more, monkeypatch):
    monkeypatch.setattr("layerskip_kernels.measure.costs.REPEATS", 1)
    common = [*DATA, "--max_steps", 16, "--num_speculations_last", 3, *more]
    result = run(*common, "--fast", "--verify", 3, "--output_dir", "fast")
    assert result.exit_code == 0, result.output
    cells = read_cells(tmp_path / "fast/sweep.csv")
    assert len(cells) == 9 and all(cell.predicted_speedup > 0 for cell in cells)
    checked = [cell for cell in cells if cell.speedup is not None]
    assert 2 <= len(checked) <= 3  # the middle one may be among the best
    assert "off" in result.stdout
    assert run(*common, "--output_dir", "slow").exit_code == 0
    for cell, measured in zip(cells, read_cells(tmp_path / "slow/sweep.csv"), strict=True):
        assert cell.acceptance_rate == pytest.approx(measured.acceptance_rate)
        assert cell.tokens_per_round == pytest.approx(measured.tokens_per_round)


def test_costs_add_up_by_hand():
    costs = Costs(10, 1, 64, [1, 3], [1.0, 2.0], [0.5, 0.5], [4.0, 6.0], 1.0, 1.5, 0.25, 3.0, 0.125)
    assert costs.step() == 10 * 1.0 + 0.5 + 4.0 + 0.25
    # two drafts and one more pass of 3 layers; 7 layers and the head over 3 tokens
    expected = 3 * (3 * 1.0 + 0.5) + 2 * (1.5 + 0.125) + (7 * 2.0 + 0.5) + 6.0 + 3.0
    assert costs.round(3, 2) == pytest.approx(expected)
    assert costs.layers(10, 2) == pytest.approx(15.5)
    setting = Setting(3, 2, 0.5, 0.5, tokens_per_round=2.5, ceiling=1.0)
    # copies draft at half the cost, and all layers verify
    copied = replace(costs, draft_layer=0.5, copies_draft=True)
    assert copied.round(3, 2) == pytest.approx(2 * (3 * 0.5 + 0.5 + 1.5 + 0.125) + (10 * 2.0 + 0.5) + 6.0 + 3.0)
    assert copied.step() == costs.step()
    assert costs.speedup(setting) == pytest.approx(2.5 * costs.step() / expected)


def test_the_best_is_measured():
    cells = [Cell(1, 1, predicted_speedup=3.0), Cell(1, 2, speedup=1.1), Cell(2, 2, speedup=1.2, predicted_speedup=1.0)]
    assert [cell.best_known for cell in sorted(cells, key=rank)] == [1.2, 1.1, 3.0]


def test_pictures_of_small_and_partial_grids():
    from layerskip_kernels.measure.pictures import draw_sweep

    one = draw_sweep([Cell(1, 1, speedup=1.5)])
    part = draw_sweep([Cell(1, 1, speedup=1.5), Cell(1, 2, speedup=0.5), Cell(2, 1, predicted_speedup=2.0)])
    whole = draw_sweep([Cell(e, k, speedup=e / k) for e in (1, 2) for k in (1, 2)])
    # the color bar is one of the axes
    assert [len(figure.axes) for figure in (one, part, whole)] == [2, 2, 3]
    shown = {text.get_text() for text in part.axes[0].texts}
    assert shown == {"1.50 \u2605", "0.50", "2.00"} and np.isfinite(whole.axes[0].images[0].get_array()).all()


def test_the_examples_work_as_printed(run, monkeypatch):
    monkeypatch.setattr("layerskip_kernels.measure.costs.REPEATS", 1)
    found = examples("sweep")
    assert len(found) == 2
    for arguments in found:
        result = run(*arguments, "--max_steps", 4, "--exit_layer_last", 2)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cnn"], "dataset='cnn': choose from cnn_dm_summarization"),
        ([*DATA, "--exit_layer_first", 4], "--exit_layer_first 4: the model has 4 layers, choose 1..3"),
        (
            [*DATA, "--num_speculations_first", 4, "--num_speculations_last", 3],
            "--num_speculations_last 3 is below --num_speculations_first 4",
        ),
        ([*DATA, "--exit_layer_step", 0], "0 is not in the range x>=1"),
    ],
)
def test_bad_input(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
