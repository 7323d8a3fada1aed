"""The model that comes with the package: there, exact, early-exit ready, and worth reading."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layerskip_kernels as lk
from layerskip_kernels.models.hub import checkpoint_folder

FOLDER = checkpoint_folder("demo")
PROMPTS = [
    "def fibonacci(n):",
    "def is_valid(self, name):",
    "def read_lines(path):",
    'def get_config(self):\n    """Return the configuration."""\n',
    "def mean(values):",
    "def __init__(self, name, value=None):",
    "def add_item(self, item):",
    "def __repr__(self):",
    "def close(self):",
    "def parse_version(text):",
    "def to_dict(self):",
    "def find_files(root, pattern):",
]


@pytest.fixture(scope="module")
def demo():
    return lk.SelfSpeculativeDecoder.from_pretrained()


@pytest.fixture(scope="module")
def answers(demo):
    return demo.generate(PROMPTS, max_new_tokens=128)


def test_it_is_small_and_says_where_it_comes_from():
    assert (FOLDER / "model.safetensors").stat().st_size <= 32e6
    card = (FOLDER / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert not [path for path in FOLDER.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_its_setting_is_recorded(demo):
    recorded = json.loads((FOLDER / "config.json").read_text())["layerskip"]
    assert recorded == {"exit_layer": demo.exit_layer, "num_speculations": demo.num_speculations}


def test_a_folder_named_demo_is_reached_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("demo") == FOLDER
    assert checkpoint_folder("./demo") == Path("demo")


def test_speculation_changes_nothing(demo, answers):
    assert demo.generate(PROMPTS, max_new_tokens=128, generation_strategy="autoregressive").sequences == (
        answers.sequences
    )
    sampled = dict(max_new_tokens=48, sample=True, temperature=1.0, seed=3)
    plain = demo.generate(PROMPTS[:3], generation_strategy="autoregressive", **sampled)
    assert demo.generate(PROMPTS[:3], **sampled).sequences == plain.sequences


def test_its_drafts_pay(demo, answers):
    """By bytes read: tokens per round over what a round costs in autoregressive steps."""
    embedding = demo.config.vocab_size * demo.config.hidden_size
    weights = sum(w.numel() for w in demo.model.weights.layers[0] if hasattr(w, "numel"))
    layers = weights * demo.config.num_layers
    draft_step = (weights * demo.exit_layer + embedding) / (layers + embedding)
    cost = 1 + demo.num_speculations * draft_step
    assert answers.stats.tokens_per_round / cost > 1.4  # its card says what it is on a hundred texts


def test_its_text_is_mostly_python(answers):
    def parses(source):
        try:
            ast.parse(source)
        except SyntaxError:
            return False
        return True

    ended = [p + text for p, text, why in zip(PROMPTS, answers.text, answers.finish_reasons) if why == "eos"]
    assert len(ended) > len(PROMPTS) / 2
    assert sum(map(parses, ended)) > 0.7 * len(ended)


def test_the_first_command_of_the_readme(tmp_path):
    """No option but the prompt, in a folder of the user's."""
    command = [sys.executable, "-m", "layerskip_kernels", "generate", "--prompt", "def fibonacci(n):"]
    environment = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "speed-up" in done.stderr and "same tokens" in done.stderr
