"""`layerskip train`: what it leaves behind, that it goes on exactly after a kill, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from tiny_models import tiny_checkpoint, tiny_config, tiny_tokenizer

import layerskip_kernels as lk
from layerskip_kernels.cli import app
from layerskip_kernels.training import trainer as trainer_module

TEXTS = [
    f"def f{n}(a, b):\n    return a + b * {n}\n\n\ndef g{n}(x):\n    return f{n}(x, {n})  # draft, verify\n"
    for n in range(60)
]
STEPS, SAVE = 12, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A data set and the folder of a new model: config and tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"code": text}) + "\n" for text in TEXTS))
    tiny_config("llama2").save_pretrained(folder / "new")
    tiny_tokenizer().save_pretrained(folder / "new")
    return folder


def arguments(files, out, **changes):
    options = {
        "config": files / "new" / "config.json",
        "dataset": files / "texts.jsonl",
        "text_field": "code",
        "heldout": 0.1,
        "sequence_length": 48,
        "output_dir": out,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": SAVE,
        "learning_rate": 0.01,
        "layer_dropout": 0.2,
        "curriculum_interval": 2,
        "focus_exit": 1,
        "dtype": "float32",
        "measure_texts": 2,
    } | changes
    return [
        "train",
        *(str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)),
    ]


def losses(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if "loss" in k or k == "step"} for e in entries]


@pytest.fixture(scope="module")
def trained(files):
    result = CliRunner().invoke(app, arguments(files, files / "whole"), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result, files / "whole"


def test_what_a_run_leaves_behind(trained):
    result, out = trained
    log = losses(out)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert log[-1]["exit_4_loss"] < 0.9 * log[0]["exit_4_loss"]
    assert all("exit_1_loss" in entry for entry in log)  # in focus at every step
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    recorded = json.loads((out / "config.json").read_text())["layerskip"]
    report = json.loads((out / "exits.json").read_text())
    assert recorded["exit_layer"] == report["setting"]["exit_layer"]
    assert [layer["layer"] for layer in report["layers"]] == [1, 2, 3, 4]
    assert "agreement" in result.output and "recorded in config.json" in result.output
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(out)
    assert decoder.exit_layer == recorded["exit_layer"]
    assert decoder.generate("def ", max_new_tokens=8).stats.rounds > 0
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


def test_killed_and_resumed_it_repeats_the_same_losses(files, trained):
    out = files / "killed"
    command = [sys.executable, "-m", "layerskip_kernels", *arguments(files, out)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    while process.poll() is None and not (out / f"checkpoint-{SAVE}").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (out / "config.json").exists()
    (out / "partial").mkdir(exist_ok=True)  # as if it had been killed while saving
    (out / "partial" / "checkpoint-99").mkdir(exist_ok=True)
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(trained[1])
    assert (out / "model.safetensors").read_bytes() == (trained[1] / "model.safetensors").read_bytes()
    assert not (out / "partial").exists()


def test_a_checkpoint_that_fails_half_way_is_not_there(files, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer_module.LayerSkipTrainer, "_save_optimizer_and_scheduler", full)
    result = CliRunner().invoke(app, arguments(files, files / "full"))
    assert result.exit_code == 2 and result.stderr.strip().endswith("layerskip: No space left on device")
    assert not list((files / "full").glob("checkpoint-*"))


def test_lora_goes_on_from_a_checkpoint_and_is_merged(files, tmp_path):
    tiny_checkpoint(tmp_path / "base", "llama2")
    changes = dict(config=None, model=tmp_path / "base", lora_rank=4, max_steps=2, save_steps=2, recipe="code-7b")
    changes |= dict(layer_dropout=None, curriculum_interval=4)
    result = CliRunner().invoke(app, arguments(files, tmp_path / "out", **changes))
    assert result.exit_code == 0, result.output
    lk.SelfSpeculativeDecoder.from_pretrained(tmp_path / "out")  # a plain checkpoint
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "give either model or config"),
        ({"dataset": "nowhere.jsonl"}, "dataset=nowhere.jsonl: there is no such file"),
        ({"text_field": "text"}, "text_field='text': {dataset} has the fields code"),
        ({"heldout": "1.5"}, "heldout=1.5: choose a share above 0 and below 1, or a data set"),
        ({"sequence_length": 100000}, "sequence_length=100000: the texts are too short to fill one row, choose less"),
        ({"save_steps": 3, "logging_steps": 2}, "save_steps=3: choose a multiple of logging_steps=2"),
        ({"recipe": "llama9"}, "recipe='llama9': choose from llama2-7b-continual, "),
        ({"focus_exit": 4}, "focus_exit=4: the model has 4 layers, choose 1..3, or 0 for none"),
        ({"focus_weight": 1.0}, "focus_weight=1.0: choose 0 or more, below 1"),
        ({"layer_dropout": 2.0}, "layer_dropout=2.0: choose 0..1"),
        ({"output_dir": "whole"}, "has checkpoint-12: resume it, or choose another"),
    ],
)
def test_bad_input(files, tmp_path, trained, changes, message):
    out = changes.get("output_dir", tmp_path / "out")
    options = arguments(files, files / out, **{k: v for k, v in changes.items() if k != "output_dir"})
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert message.format(dataset=files / "texts.jsonl") in last and last.startswith("layerskip: ")


def test_nothing_to_resume(files, tmp_path):
    result = CliRunner().invoke(app, [*arguments(files, tmp_path / "none"), "--resume"])
    assert result.exit_code == 2 and "has no checkpoint" in result.stderr


def test_text_files_and_folders(files, tmp_path):
    """Blank lines separate the texts of a .txt file; a folder of files is one data set."""
    from layerskip_kernels.training.data import load_texts

    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("four\n")
    assert load_texts(str(tmp_path / "a.txt"))["text"][:] == ["one\ntwo", "three\n"]
    assert len(load_texts(str(tmp_path))) == 3
    (tmp_path / "c.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="a folder of files of one kind"):
        load_texts(str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt is empty$"):
        load_texts(str(tmp_path / "empty.txt"))
