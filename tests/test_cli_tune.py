"""`layerskip tune` on tiny checkpoints: what it records, where, and that decoding honours it."""

import json

import pytest
from cli_examples import examples
from click.testing import CliRunner
from tiny_models import tiny_checkpoint

import layerskip_kernels as lk
from layerskip_kernels.cli import app
from layerskip_kernels.measure import timing
from layerskip_kernels.models import tuned

DATA = [
    "--dataset",
    "custom_jsonl",
    "--data_path",
    "prompts.jsonl",
    "--max_steps",
    "12",
    "--num_speculations_last",
    "3",
]


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoint(tmp_path / "model", "llama2", late_scale=0.1)


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("layerskip_kernels.measure.costs.REPEATS", 1)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two and")))

    def run(*arguments):
        fixed = ["tune", "--model", str(checkpoint), "--verify", 2, "--repeats", 1]
        arguments = map(str, [*fixed, *arguments])
        return CliRunner().invoke(app, [*arguments], prog_name="layerskip", env={"COLUMNS": "70"})

    return run


@pytest.fixture
def speeds(monkeypatch):
    """Makes the timed figures known: autoregressive 100, the settings as given."""

    def set_to(*settings):
        def fastest(decoder, prompts, choices, *, repeats, tick, **options):
            timed = [*zip(choices, settings), (None, 100.0)]
            return sorted(timed, key=lambda pair: -pair[1])

        monkeypatch.setattr(timing, "fastest", fastest)

    return set_to


def test_the_fastest_is_recorded_beside_the_checkpoint(run, checkpoint, tmp_path, speeds):
    speeds(110.0, 130.0)
    result = run(*DATA, "--max_batch_size", 2)
    assert result.exit_code == 0, result.output
    recorded = json.loads((checkpoint / "config.json").read_text())["layerskip"]
    assert recorded["tuned"]["speedup"] == 1.3 and recorded["tuned"]["batch_size"] == 2
    e, k = recorded["exit_layer"], recorded["num_speculations"]
    assert f"fastest on cpu, 2 sequences at a time: E {e}, K {k}" in result.stdout
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint)
    assert (decoder.exit_layer, decoder.num_speculations) == (e, k)
    assert not (tmp_path / "cache").exists()


def test_where_speculation_does_not_pay_decoding_is_autoregressive(run, checkpoint, speeds):
    speeds(80.0, 90.0)
    result = run(*DATA)
    assert "speculation does not pay on cpu, 1 sequence at a time: the choice is autoregressive" in result.stdout
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint)
    assert decoder.num_speculations == 0
    answer = decoder.generate("Hello", max_new_tokens=6)
    assert answer.stats.drafted == 0 and answer.stats.tokens_per_round == 1.0
    assert answer.sequences == decoder.generate("Hello", max_new_tokens=6, num_speculations=3).sequences


def test_a_read_only_checkpoint_has_its_choice_in_the_users_cache(run, checkpoint, tmp_path, speeds, monkeypatch):
    def refused(*args):
        raise PermissionError("read-only")

    speeds(130.0, 110.0)
    before = (checkpoint / "config.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "write_choice", refused)
        result = run(*DATA)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "cache").rglob("*.json")
    assert f"recorded in {path}" in result.stdout and (checkpoint / "config.json").read_bytes() == before
    choice = json.loads(path.read_text())["layerskip"]
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint)
    assert (decoder.exit_layer, decoder.num_speculations) == (choice["exit_layer"], choice["num_speculations"])
    tuned.write_choice(checkpoint, {"exit_layer": 3, "num_speculations": 1})  # another checkpoint at this place
    assert lk.SelfSpeculativeDecoder.from_pretrained(checkpoint).exit_layer == 3


def test_nothing_is_recorded_unless_wanted(run, checkpoint):
    before = (checkpoint / "config.json").read_bytes()
    result = run(*DATA, "--save", "False")
    assert result.exit_code == 0 and "autoregressive" in result.stdout, result.output
    assert (checkpoint / "config.json").read_bytes() == before


def test_the_examples_work_as_printed(run):
    found = examples("tune")
    assert len(found) == 2
    for arguments in found:
        result = run(*arguments, "--max_steps", 4, "--num_speculations_last", 2, "--num_samples", 1)
        assert result.exit_code == 0, result.output


def test_interrupted_it_records_nothing(run, checkpoint, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    before = (checkpoint / "config.json").read_bytes()
    monkeypatch.setattr(timing, "fastest", interrupted)
    result = run(*DATA)
    assert result.exit_code == 130 and "nothing was recorded" in result.stderr
    assert (checkpoint / "config.json").read_bytes() == before


def test_bad_input(run):
    result = run("--dataset", "cnn")
    assert result.exit_code == 2 and "dataset='cnn': choose from" in result.stderr
    result = run("--num_speculations_last", 64)
    assert result.exit_code == 2 and "64 is not in the range 1<=x<=63" in result.stderr
