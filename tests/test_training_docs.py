"""docs/training.md: the example runs as printed, the table says what the presets hold, the plot can be drawn."""

import json
import re
import sys
from pathlib import Path

from tiny_models import tiny_checkpoint

from layerskip_kernels.training import RECIPES

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "training.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "build/smollm2", "smollm2", num_hidden_layers=8)
    (tmp_path / "README.md").write_text("The early layers draft, the late layers verify. " * 12)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(example.splitlines()) <= 25
    names = {}
    exec(example, names)
    history = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(history) == 4 and history[-1]["loss"] < history[0]["loss"]
    assert json.loads((tmp_path / "build/trained/config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "build/trained/model.safetensors").exists()


def test_the_table_is_the_presets():
    rows = re.findall(r"^\| `(\S+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(RECIPES)
    for name, row in rows:
        recipe = RECIPES[name]
        p_max, e_scale, curriculum, schedule, rate = row.split(" | ")
        assert (float(p_max), float(e_scale), schedule) == (recipe.layer_dropout, recipe.e_scale, recipe.time_schedule)
        assert curriculum == recipe.curriculum + (f", R = {recipe.interval}" if recipe.interval else "")
        assert recipe.learning_rate == (None if rate == "not published" else float(rate))


def test_the_plot_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    from plot_schedules import draw

    draw(tmp_path / "schedules.png")
    assert 10_000 < (tmp_path / "schedules.png").stat().st_size < 80_000
    assert (DOCS / "schedules.png").stat().st_size < 80_000
