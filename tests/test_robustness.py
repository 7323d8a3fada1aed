"""Bad and hostile input: one sentence that names the argument, and the next answer is right.

Every argument of the entry points gets every value of `VALUES`. It is refused with a documented exception, or it is
listed as valid for that argument.
"""

from __future__ import annotations

import inspect
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_checkpoint, tiny_model, tiny_tokenizer

import layerskip_kernels as lk

Decoder = lk.SelfSpeculativeDecoder
DOCUMENTED = (ValueError, TypeError, MemoryError)
LOADING = (*DOCUMENTED, ConnectionError, PermissionError, lk.BackendUnavailable)

VALUES = {
    "None": None,
    "True": True,
    "False": False,
    "0": 0,
    "-1": -1,
    "1": 1,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "2**31": 2**31,
    "2**63": 2**63,
    "10**400": 10**400,
    "''": "",
    "'x'": "x",
    "surrogate": "\ud800",
    "null character": "\x00",
    "long text": "a" * 100_000,
    "bytes": b"x",
    "[]": [],
    "()": (),
    "{}": {},
    "{1: 2}": {1: 2},
    "object": object(),
    "[None]": [None],
    "[1.5]": [1.5],
    "['x']": ["x"],
    "['']": [""],
    "[True]": [True],
    "[-1]": [-1],
    "[10**6]": [10**6],
    "[2**70]": [2**70],
    "[5] * 100000": [5] * 100_000,
    "[[[1]]]": [[[1]]],
    "tensor 0-d": torch.tensor(1),
    "tensor [1]": torch.tensor([1]),
    "tensor float": torch.tensor([1.5]),
    "tensor empty": torch.zeros(2, 0, dtype=torch.int64),
    "tensor 3-d": torch.zeros(1, 2, 3, dtype=torch.int64),
    "tensor meta": torch.tensor([1], device="meta"),
    "numpy int": np.int64(3),
    "numpy array": np.array([1, 2]),
    "numpy text": np.array(["a"]),
    "complex": 1j,
    "function": lambda *args: None,
    "Ellipsis": ...,
    "generator": (i for i in [1]),
    "dtype": torch.int8,
    "device": torch.device("meta"),
    "path": Path("/nonexistent/folder"),
    "url": "https://example.com/model",
    "module": torch.nn.Linear(2, 2),
}
BOOLS = {"True", "False"}
VALID = {
    "prompts": {"''", "'x'", "null character", "['x']", "['']", "tensor [1]", "url"},
    "max_new_tokens": {"1"},
    "exit_layer": {"None", "1"},
    "num_speculations": {"None", "0", "1"},
    "sample": BOOLS,
    "temperature": {"0", "1", "1.5", "2**31", "2**63"},
    "top_k": {"0", "1", "2**31", "2**63", "10**400"},
    "top_p": {"1"},
    "min_p": {"0", "1"},
    "seed": {"None", "0", "-1", "1", "2**31", "[-1]", "[10**6]", "tensor [1]"},
    "repetition_penalty": {"None", "1", "1.5", "2**31", "2**63"},
    "min_new_tokens": {"0", "1", "2**31", "2**63", "10**400"},
    "logits_processor": {"None", "[]", "()"},
    "stopping_criteria": {"None", "[]", "()"},
    "stop_strings": {"None", "'x'", "surrogate", "null character", "long text", "[]", "()", "['x']", "url"},
    "eos_token_id": {"None", "0", "1", "[]", "()", "[5] * 100000", "generator"},
    "streamer": {"None"},
    "deterministic_prefill": BOOLS,
    "output_logits": BOOLS,
    "verification": set(),
    "rejection_method": {"None"},
    "draft_confidence": {"None", "0", "1"},
    "adaptive_speculations": BOOLS,
    "profile": BOOLS,
    "max_batch_size": {"1", "2**31", "2**63", "10**400"},
    "max_length": {"None", "2**31", "2**63", "10**400"},
    "quantization": {"None"},
    "tokenizer": {"None"},
}
GENERATE = [name for name in inspect.signature(Decoder.generate).parameters if name in VALID]
FROM_PRETRAINED = list(inspect.signature(Decoder.from_pretrained).parameters)
FROM_MODEL = list(inspect.signature(Decoder.from_model).parameters)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama3", late_scale=0.05)


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder.from_model(model, exit_layer=3, num_speculations=2, tokenizer=tiny_tokenizer(), max_length=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama3", tokenizer=False, late_scale=0.05)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def answer(decoder):
    return decoder.generate([5, 9, 17], max_new_tokens=4, eos_token_id=[]).sequences


def refused(call, errors, *named: str) -> bool:
    """Whether `call` raised one of the errors, in a sentence with one of the names."""
    try:
        call()
    except errors as error:
        message = str(error)
        assert any(name in message for name in named), f"{type(error).__name__}: {message}"
        assert len(message) < 1000, "a sentence, not the value itself"
        return True
    return False


@pytest.mark.parametrize("name", GENERATE)
def test_arguments_of_generate(decoder, name):
    expected = answer(decoder)
    for label, value in VALUES.items():
        arguments = {"prompts": "abc", "max_new_tokens": 2, "sample": True, name: value}
        if label == "module" and name in ("logits_processor", "stopping_criteria"):
            continue  # it can be called, and what it raises is its author's
        accepted = not refused(lambda arguments=arguments: decoder.generate(**arguments), DOCUMENTED, name)
        assert accepted == (label in VALID[name]), f"{name}: {label}"
        assert answer(decoder) == expected, label


def test_every_argument_is_tried():
    assert set(inspect.signature(Decoder.generate).parameters) - {"self", "generation_strategy"} <= set(GENERATE)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_strategies(decoder, value):
    assert refused(lambda: decoder.generate([1], generation_strategy=value), DOCUMENTED, "generation_strategy")


@pytest.mark.parametrize("name", FROM_PRETRAINED)
def test_arguments_of_from_pretrained(checkpoint, name, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, value in VALUES.items():
        arguments = {"model": checkpoint, name: value}
        # a name that could be a model's is looked for on the hub and quoted
        names = (name, repr(value), str(value)) if name == "model" else (name,)
        loaded = not refused(lambda arguments=arguments: Decoder.from_pretrained(**arguments), LOADING, *names)
        assert loaded == (label in VALID.get(name, ())), f"{name}: {label}"


@pytest.mark.parametrize("name", FROM_MODEL)
def test_arguments_of_from_model(model, name):
    for label, value in VALUES.items():
        arguments = {"hf_model": model, name: value}
        names = ("model is a",) if name == "hf_model" else (name,)
        loaded = not refused(lambda arguments=arguments: Decoder.from_model(**arguments), LOADING, *names)
        assert loaded == (label in VALID.get(name, ())), f"{name}: {label}"


def test_prompts_that_do_not_fit(decoder, model):
    expected = answer(decoder)
    unlimited = Decoder.from_model(model)
    for new in (2**40, 2**62, 2**70, 10**400):
        assert refused(lambda new=new: unlimited.generate([5], max_new_tokens=new), DOCUMENTED, "KV cache", "max_new")
        assert answer(unlimited) == expected
    for prompts in ([[5] * 257], [[5], [6] * 300], "a" * 1000):
        assert refused(lambda prompts=prompts: decoder.generate(prompts, max_new_tokens=1), ValueError, "prompts[")
        assert answer(decoder) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["embed_tokens.weight", "layers.0.self_attn.v_proj.weight", "norm.weight"])
def test_weights_that_are_not_numbers(value, where):
    damaged = tiny_model("llama3")
    with torch.no_grad():
        damaged.model.get_parameter(where).fill_(value)
    decoder = Decoder.from_model(damaged)
    for strategy in ("self_speculative", "autoregressive"):
        with pytest.raises(FloatingPointError, match="not numbers"):
            decoder.generate([[1, 2, 3], [4]], max_new_tokens=4, generation_strategy=strategy)


# Values for the entries of config.json. None but those of `SAME` leave the model as it was.
JUNK = [None, True, 0, -1, 3, 1.5, 10**9, 10**30, float("nan"), "x", [], [1], {}, {"a": 1}, "trust_remote_code"]
ADDED = ("auto_map", "layerskip", "quantization_config", "head_dim", "rope_scaling", "sliding_window", "torch_dtype")


def load_and_answer(folder):
    decoder = Decoder.from_pretrained(folder)
    decoder.generate([5, 9, 17], max_new_tokens=4, num_speculations=2, eos_token_id=[])


def test_damaged_configurations(checkpoint, tmp_path):
    """A sentence that names the folder, or a model that decodes; never another exception."""
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    cases = [(key, value) for key in (*config, *ADDED) for value in JUNK]
    for key, value in random.Random(1).sample(cases, 150):
        path.write_text(json.dumps({**config, key: value}))
        refused(lambda: load_and_answer(folder), (ValueError, FloatingPointError), str(folder), "not numbers")
    path.write_text(json.dumps({**config, "num_hidden_layers": 10**12}))
    assert refused(lambda: load_and_answer(folder), ValueError, "num_hidden_layers=1000000000000 is not supported")
    path.write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    assert refused(lambda: load_and_answer(folder), ValueError, "code of a checkpoint is never run")


def test_damaged_weights(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    pick = random.Random(2)
    cuts = [
        0,
        1,
        7,
        8,
        9,
        8 + header // 2,
        8 + header,
        len(whole) - 1,
        *(pick.randrange(len(whole)) for _ in range(12)),
    ]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert refused(lambda: load_and_answer(folder), ValueError, str(folder)), f"cut at byte {cut}"
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        assert refused(lambda: load_and_answer(folder), ValueError, str(folder)), f"header of {length} bytes"
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(pick.choice([1, 1, 4])):
            damaged[8 + pick.randrange(header)] = pick.randrange(256)
        path.write_bytes(damaged)
        refused(lambda: load_and_answer(folder), (ValueError, FloatingPointError), str(folder), "not numbers")
    path.write_bytes(whole)
    load_and_answer(folder)
