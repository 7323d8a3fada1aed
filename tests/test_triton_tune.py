"""The tuner's search, its refusals and its file; what it times needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerskip_kernels.triton import configs, tune


def test_search_follows_one_setting_at_a_time():
    measured = []

    def measure(settings):
        measured.append(settings)
        if settings["stages"] == 4:  # does not fit
            return None
        return abs(settings["tile"] - 64) + abs(settings["warps"] - 8) + 1

    best, seconds = tune.search(
        dict(tile=16, warps=4, stages=2), dict(tile=(16, 32, 64, 128), warps=(2, 4, 8), stages=(2, 4)), measure
    )
    assert best == dict(tile=64, warps=8, stages=2) and seconds == 1
    assert len({tuple(m.items()) for m in measured}) == len(measured)  # nothing is measured twice
    with pytest.raises(RuntimeError, match="do not work"):
        tune.search(dict(stages=4), dict(stages=(4,)), lambda settings: None)


def workload(result, agree=lambda: True):
    return tune.Workload("small_linear", dict(C=64, N=64), dict(BLOCK_N=16), [[result]], agree)


def current():
    return configs.table().get("test GPU", {}).get("small_linear", {}).get("bfloat16 C=64 N=64", {})


def test_only_right_and_invariant_results_are_timed():
    timed = []

    def seconds(calls):
        timed.append(dict(current()))
        return 1.0

    def measure(result, agree=lambda: True):
        return tune.measurer(workload(result, agree), torch.bfloat16, "test GPU", seconds)

    value = dict(right=torch.ones(2), wrong=torch.zeros(2))
    by_config = measure(lambda: value["right" if current().get("BLOCK_N", 16) < 128 else "wrong"])
    assert by_config(dict(BLOCK_N=32)) == pytest.approx(1.0)
    assert by_config(dict(BLOCK_N=128)) is None
    assert measure(lambda: value["right"], agree=lambda: False)(dict(BLOCK_N=32)) is None
    assert timed == [dict(BLOCK_N=32)]
    assert current() == {}  # a trial leaves the table as it was


@pytest.mark.parametrize("where", ["result", "rows_agree"])
def test_settings_that_do_not_fit_are_no_error(where):
    from triton.runtime.errors import OutOfResources

    def fit():
        if current().get("num_stages", 3) > 3:
            raise OutOfResources(147456, 101376, "shared memory")
        return True

    def result():
        assert where != "result" or fit()
        return torch.ones(2)

    tried = workload(result, fit if where == "rows_agree" else lambda: True)._replace(start=dict(num_stages=4))
    measure = tune.measurer(tried, torch.bfloat16, "test GPU", lambda calls: 1.0)
    assert measure(tried.start) is None
    assert measure(dict(num_stages=3)) == pytest.approx(1.0)


def test_the_start_fits_the_most_rows(monkeypatch):
    """Rows of x need shared memory: 4 stages of 64 rows are too much for GPUs that have 99 KB."""
    from layerskip_kernels.triton import launch

    monkeypatch.setattr(launch, "num_sms", lambda tensor: 84)
    for columns in (2048, 6144, 28672, 200_000):
        start = tune.linear_start(columns, torch.empty(64, 4096, dtype=torch.bfloat16))
        tiles = [(start["BLOCK_N"] + rows) * start["BLOCK_K"] * 2 for rows in (16, 64)]
        assert tiles[1] * (start["num_stages"] - 1) <= 99 << 10, (columns, start)


def test_the_table_is_written_whole(tmp_path):
    path = tmp_path / "configs.json"
    path.write_text("{}")
    table = {"GPU": {"small_linear": {"bfloat16 C=64 N=64": {"BLOCK_N": 16}}}}
    tune.write(table, path)
    assert json.loads(path.read_text()) == table
    with pytest.raises(TypeError):
        tune.write({"GPU": object()}, path)
    assert json.loads(path.read_text()) == table


def test_heuristics_use_the_settings_that_are_tuned():
    from layerskip_kernels.triton.linear_tile import tile_config
    from layerskip_kernels.triton.verify_attention import choose

    starts = {"verify_attention": choose(32, 8, 128, torch.bfloat16)}
    starts["small_linear"] = starts["exit_head"] = tile_config(4096, 4096, torch.bfloat16, 132, 1)
    for op, choices in tune.CHOICES.items():
        assert set(choices) == set(starts[op]), op


def test_without_a_gpu_it_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "layerskip_kernels.triton.tune"]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.strip().startswith("tune: torch finds no CUDA device"), run.stderr
