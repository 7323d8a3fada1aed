"""`layerskip benchmark` on tiny checkpoints: figures, answers, peers, interruption and refusals."""

import json
from pathlib import Path

import pytest
from cli_examples import examples
from click.testing import CliRunner
from tiny_models import tiny_checkpoint

import layerskip_kernels as lk
from layerskip_kernels.cli import app
from layerskip_kernels.datasets import Sample
from layerskip_kernels.measure import benchmark
from layerskip_kernels.measure.quality import Scorer, cut
from layerskip_kernels.measure.statistics import summary

PROMPTS = ["one", "two and", "three, four", "five"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama2", late_scale=0.1))


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": prompt, "response": f"{prompt} again"} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(checkpoint, *arguments):
    fixed = ["benchmark", "--model", checkpoint, "--max_steps", "12"]
    return CliRunner().invoke(app, [*fixed, *map(str, arguments)], prog_name="layerskip", env={"COLUMNS": "70"})


def report(folder):
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_strategies_and_peers_side_by_side(checkpoint, prompts, tmp_path):
    arguments = ["--dataset", "custom_jsonl", "--data_path", "prompts.jsonl", "--peers", "transformers"]
    result = run(checkpoint, *arguments, "--exit_layer", 2, "--num_speculations", 3, "--output_dir", "new/folder")
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "new/folder")
    names = ["autoregressive", "self_speculative", "transformers", "assistant_early_exit"]
    assert list(found["strategies"]) == names and found["baseline"] == "autoregressive"
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint, exit_layer=2, num_speculations=3)
    for name, entry in found["strategies"].items():
        summary, rows = entry["summary"], entry["samples"]
        assert summary["same_tokens"] == summary["samples"] == 4  # float32: transformers says the same
        assert sorted(row["prompt"] for row in rows) == sorted(PROMPTS)
        for row in rows:
            assert row["tokens"] == decoder.generate(row["prompt"], max_new_tokens=12).sequences[0]
        speed = summary["tokens_per_second"]
        assert 0 < speed["low"] <= speed["mean"] <= speed["high"] and summary["ratio"]["median"] > 0
        assert summary["time_to_first_token"]["mean"] > 0 and summary["decode_tokens"] == summary["tokens"] - 4
        assert {"rouge1", "rougeL", "bleu", "exact_match"} <= set(summary["quality"])
        assert name in result.stdout and "…" not in result.stdout
    speculative = found["strategies"]["self_speculative"]
    calls = [decoder.generate(row["prompt"], max_new_tokens=12).stats for row in speculative["samples"]]
    assert [call["accepted"] for call in speculative["calls"]] == [stats.accepted for stats in calls]
    rounds = sum(stats.rounds for stats in calls)
    assert speculative["summary"]["tokens_per_round"] == sum(stats.decode_tokens for stats in calls) / rounds
    assert found["settings"]["num_speculations"] == 3 and found["environment"]["versions"]["torch"]


def test_batches_give_the_same_answers(checkpoint, prompts, tmp_path):
    arguments = ["--dataset", "custom_jsonl", "--data_path", "prompts.jsonl", "--sample", "--generation_strategy"]
    for batch in (1, 3):
        result = run(
            checkpoint, *arguments, "self_speculative", "--max_batch_size", batch, "--output_dir", f"batch{batch}"
        )
        assert result.exit_code == 0, result.output
    one, three = (report(tmp_path / f"batch{batch}")["strategies"]["self_speculative"] for batch in (1, 3))
    assert [len(call["samples"]) for call in three["calls"]] == [3, 1]
    assert [row["tokens"] for row in one["samples"]] == [row["tokens"] for row in three["samples"]]


def test_interrupted_it_keeps_what_was_measured(checkpoint, prompts, tmp_path, monkeypatch):
    calls = []

    def interrupted(decoder, strategy, options):
        def decode(prompts, first):
            calls.append(first)
            if len(calls) == 5:  # the first strategy on the third prompt
                raise KeyboardInterrupt
            return benchmark.Call([first], [[1, 2]], ["x"], 0.1, 0.5, 1)

        return decode

    monkeypatch.setattr(benchmark, "ours", interrupted)
    result = run(
        checkpoint,
        "--dataset",
        "custom_jsonl",
        "--data_path",
        "prompts.jsonl",
        "--num_warmup",
        0,
        "--output_dir",
        "out",
    )
    assert result.exit_code == 130, result.output
    found = report(tmp_path / "out")
    assert found["interrupted"] and [len(s["calls"]) for s in found["strategies"].values()] == [2, 2]


def test_the_examples_work_as_printed(checkpoint, prompts):
    found = examples("benchmark")
    assert len(found) == 3
    for arguments in found:
        result = run(checkpoint, *arguments, "--max_steps", 2)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cnn"], "dataset='cnn': choose from cnn_dm_summarization, xsum_summarization, cnn_dm_lm, "),
        (["--dataset", "custom_jsonl"], "dataset='custom_jsonl' is read from a file: give data_path"),
        (["--dataset", "custom_jsonl", "--data_path", "no.jsonl"], "data_path=no.jsonl does not exist"),
        (
            ["--dataset", "human_eval", "--num_samples", "1", "--exit_layer", "9"],
            "exit_layer=9: the model has 4 layers",
        ),
        (["--dataset", "gsm8k", "--execute_code"], "--execute_code: gsm8k has no tests to run, human_eval does"),
    ],
)
def test_bad_input(checkpoint, prompts, arguments, message):
    result = run(checkpoint, *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not list(Path("logs").glob("*.json"))


def test_answers_are_cut_and_rated():
    assert cut("    return 1\n\ndef g", ["\nclass", "\ndef"]) == "    return 1\n"
    numbers = Scorer("gsm8k", ())
    sample = Sample("q", "1 + 1,000 = 1,001\n#### 1,001")
    assert numbers.score("so it is 1001.", sample) == {"exact_match": 1.0}
    assert numbers.score("#### 1001\nQuestion: 7", sample) == {"exact_match": 1.0}
    assert numbers.score("none", sample) == {"exact_match": 0.0}
    text = Scorer("custom_jsonl", ())
    found = text.score("the cat sat on the mat", Sample("p", "the cat sat on the mat"))
    assert found["rouge1"] == found["rouge3"] == found["rougeL"] == found["exact_match"] == 1.0
    assert found["bleu"] == pytest.approx(100.0) and text.score("x", Sample("p")) == {}
    rows = [{"text": "a b c d", "response": "a b c d", "quality": {"bleu": 50.0}}] * 2
    assert text.totals(rows)["bleu"] == pytest.approx(100.0) and text.totals([]) == {}


def test_code_runs_with_limits(tmp_path):
    from layerskip_kernels.measure.execution import passes

    record = {
        "prompt": "def double(n):\n",
        "test": "def check(f):\n    assert f(3) == 6\n",
        "entry_point": "double",
    }
    assert passes(record, "    return 2 * n\n")
    for wrong in (
        "    return n\n",
        "    return (\n",
        "    raise SystemExit(0)\n",
        "    return len(bytearray(1 << 31)) and 6\n",
        f"    open({str(tmp_path / 'big')!r}, 'wb').write(bytes(1 << 22))\n    return 6\n",
    ):
        assert not passes(record, wrong), wrong
    assert not passes(record, "    while True:\n        pass\n", seconds=1)


def test_bootstrap_interval():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = summary(values)
    assert (found["mean"], found["median"]) == (22.0, 3.0) and found == summary(values)
    assert 1 < found["low"] < 22 < found["high"] < 100
    assert summary([5.0]) == {"mean": 5.0, "median": 5.0, "low": None, "high": None} and summary([]) is None
    assert summary([2.0, 2.0])["high"] == 2.0
