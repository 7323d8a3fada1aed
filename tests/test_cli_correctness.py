"""`layerskip correctness` on a tiny checkpoint: equal answers, planted differences, interruption and refusals."""

import json

import pytest
import torch
from cli_examples import examples
from click.testing import CliRunner
from tiny_models import tiny_checkpoint

from layerskip_kernels.cli import app
from layerskip_kernels.cli.correctness import PROMPTS
from layerskip_kernels.decode import decoder as decoder_module

CHECKED = decoder_module.SelfSpeculativeDecoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama3", torch.bfloat16, late_scale=0.05))


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=checkpoint, steps=8):
        fixed = ["correctness", "--model", model] + (["--max_steps", str(steps)] if steps else [])
        return CliRunner().invoke(app, [*fixed, *map(str, arguments)], prog_name="layerskip", env={"COLUMNS": "70"})

    return run


def report(tmp_path):
    (path,) = (tmp_path / "logs").iterdir()
    return json.loads(path.read_text())


def plant(monkeypatch, change):
    """`change(result, kwargs)` alters what self-speculative decoding returns."""
    original = CHECKED.generate

    def generate(self, prompts, **kwargs):
        result = original(self, prompts, **kwargs)
        if kwargs.get("generation_strategy") != "autoregressive":
            change(result, kwargs)
        return result

    monkeypatch.setattr(CHECKED, "generate", generate)


def test_built_in_prompts_are_answered_the_same(run, tmp_path):
    result = run("--exit_layer", 1, 3, "--num_speculations", 2, "--num_speculations", 5)
    assert result.exit_code == 0, result.output
    assert "same tokens, same logits" in result.stdout and "DIFFERENT" not in result.stdout
    found = report(tmp_path)
    assert found["prompts"] == list(PROMPTS) and found["differences"] == []
    compared = [(way["exit_layer"], way["num_speculations"], way["together"]) for way in found["compared"]]
    pairs = [(e, k) for e in (1, 3) for k in (2, 5)]
    assert compared == [(None, None, True)] + [(e, k, together) for e, k in pairs for together in (False, True)]
    assert all(way["answers"] == len(PROMPTS) and way["tokens"] == 8 * len(PROMPTS) for way in found["compared"])


def test_sampled_batches_of_a_data_set(run, tmp_path):
    rows = [{"prompt": text} for text in ("one", "two and", "three")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("--dataset", "custom_jsonl", "--data_path", "p.jsonl", "--sample", "--max_batch_size", 2)
    assert result.exit_code == 0, result.output
    assert sorted(report(tmp_path)["prompts"]) == ["one", "three", "two and"]


def test_a_planted_token_is_found(run, tmp_path, monkeypatch):
    expected = {}

    def change(result, kwargs):
        if kwargs["num_speculations"] == 3 and len(result.sequences) == 2:
            expected["token"], expected["logits"] = result.sequences[1][4], result.logits[1][4].clone()
            result.sequences[1][4] = 70
            result.logits[1][2, 9] += 1e-3

    plant(monkeypatch, change)
    result = run("--prompt", "a [b]", "--prompt", "cd", "--exit_layer", 2, "--num_speculations", 1, 3)
    assert result.exit_code == 1, result.output
    (found,) = report(tmp_path)["differences"]
    assert found["way"] == {"exit_layer": 2, "num_speculations": 3, "together": True}
    assert (found["prompt"], found["position"], found["logits_position"]) == (1, 4, 2)
    assert (found["expected"], found["got"]) == (expected["token"], 70)
    best, second = expected["logits"].topk(2).values.tolist()
    assert found["margin"] == best - second
    shown = " ".join(result.stdout.split())
    assert "DIFFERENT: prompt 2, E=2 K=3, in a batch, new token 4" in shown
    assert f"{expected['token']} " in shown and "/ 70 " in shown and f"{best - second:.3g}" in shown


def test_a_planted_bit_is_found(run, tmp_path, monkeypatch):
    def change(result, kwargs):
        result.logits[0].view(torch.int32)[5, 100] ^= 1

    plant(monkeypatch, change)
    result = run("--prompt", "a", "--exit_layer", 2)
    assert result.exit_code == 1, result.output
    (found,) = report(tmp_path)["differences"]
    assert found["position"] == found["logits_position"] == 5 and found["expected"] == found["got"]


def test_an_answer_that_ends_early_is_found(run, tmp_path, monkeypatch):
    def change(result, kwargs):
        del result.sequences[0][6:]
        result.logits[0] = result.logits[0][:6]

    plant(monkeypatch, change)
    assert run("--prompt", "a", "--exit_layer", 2).exit_code == 1
    (found,) = report(tmp_path)["differences"]
    assert (found["position"], found["logits_position"], found["got"]) == (6, None, None)


def test_ctrl_c_keeps_what_was_compared(run, tmp_path, monkeypatch):
    calls = []

    def change(result, kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            result.finish_reasons[0] = "interrupted"

    plant(monkeypatch, change)
    result = run("--prompt", "a", "--prompt", "b", "--max_batch_size", 1)
    assert result.exit_code == 0, result.output  # two answers, two calls
    (next((tmp_path / "logs").iterdir())).unlink()
    result = run("--prompt", "a", "--prompt", "b", "--max_batch_size", 1)
    assert result.exit_code == 130, result.output
    assert "interrupted; until then: no answer was compared" in result.stdout
    assert report(tmp_path)["interrupted"] is True and report(tmp_path)["prompts"] == []


def test_the_examples_work_as_printed(run):
    found = examples("correctness")
    assert len(found) == 3
    for arguments in found:
        result = run(*arguments, steps=None)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exit_layer", "1", "4"], "exit_layer=4: the model has 4 layers, choose 1..3"),
        (["--num_speculations", "64"], "num_speculations=64: choose 0..63"),
        (["--prompt", "x", "--dataset", "human_eval"], "leave one out"),
        (["--dataset", "nothing"], "dataset='nothing': choose from"),
        (["--prompt_file", "nowhere.txt"], "--prompt_file nowhere.txt does not exist"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--sample", "--top_p", "2"], "top_p=2.0: must be above 0 and at most 1"),
        (["--max_steps", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_input(run, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_a_model_of_one_layer(run, tmp_path):
    model = str(tiny_checkpoint(tmp_path / "one", "llama3", num_hidden_layers=1))
    result = run(model=model)
    assert result.exit_code == 2 and "a model of 1 layer has no early exit" in result.stderr, result.output
