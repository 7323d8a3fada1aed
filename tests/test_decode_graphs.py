"""Graphs of rounds, and a host one round behind: on a device that does nothing until it is waited for."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer

import layerskip_kernels as lk
from layerskip_kernels.decode import workspace
from layerskip_kernels.decode.batch import Batch
from layerskip_kernels.decode.buffers import Buffers
from layerskip_kernels.decode.graphs import RoundGraphs
from layerskip_kernels.decode.workspace import captures_rounds

PROMPTS = [[5, 9, 17, 3, 250, 11, 40], [7], [100, 101, 102] * 14, [30, 20], [8, 8, 8]]


class LazyDevice:
    """In place of `CudaDevice`: replays and copies queue up, and run in their order when the host waits for one."""

    LAG = 1

    def __init__(self):
        self.queue = deque()
        self.captures = self.replays = self.early = 0

    def capture(self, body):
        self.captures += 1

        def replay():
            self.replays += 1
            self.queue.append(body)

        return replay

    def fetch(self, tensor):
        copy = torch.full_like(tensor, 113)
        done = []

        def arrive():
            copy.copy_(tensor)
            done.append(True)

        self.queue.append(arrive)

        def wait():
            while not done:
                self.queue.popleft()()
            self.early += bool(self.queue)  # work was there for the device while the host read this round
            return copy

        return wait


@pytest.fixture
def device(monkeypatch):
    device = LazyDevice()
    original_init, original_add = workspace.Workspace.__init__, Batch.add

    def with_device(self, *args):
        original_init(self, *args)
        self.device = device

    def add(self, request):
        assert not device.queue, "a slot was refilled while rounds were on their way"
        original_add(self, request)

    monkeypatch.setattr(workspace.Workspace, "__init__", with_device)
    monkeypatch.setattr(Batch, "add", add)
    return device


def decoder(**options):
    return lk.SelfSpeculativeDecoder.from_model(
        tiny_model("llama3", late_scale=0.05), tokenizer=tiny_tokenizer(), exit_layer=2, max_batch_size=2, **options
    )


OPTIONS = {
    "greedy": dict(eos_token_id=[]),
    "eos": dict(eos_token_id=list(range(0, 260, 23))),
    "sampled": dict(sample=True, temperature=0.9, top_k=40, seed=7, eos_token_id=[]),
    "penalty": dict(repetition_penalty=1.4, eos_token_id=[]),
    "stop": dict(stop_strings=["a", "e"], eos_token_id=[]),
    "plain": dict(generation_strategy="autoregressive", eos_token_id=[11, 12]),
    "early_exit": dict(generation_strategy="early_exit", eos_token_id=[]),
    "no drafts": dict(num_speculations=0, eos_token_id=[]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_host_behind_the_device_gets_the_same_answers(device, monkeypatch, options):
    options = dict(num_speculations=3, max_new_tokens=40) | options
    found = decoder().generate(PROMPTS, **options)
    assert not device.queue and device.replays
    monkeypatch.undo()
    expected = decoder().generate(PROMPTS, **options)
    assert found.sequences == expected.sequences
    assert found.finish_reasons == expected.finish_reasons
    for name in ("tokens", "decode_tokens", "accepted"):
        assert getattr(found.stats, name) == getattr(expected.stats, name), name


def test_the_next_round_is_launched_before_a_round_is_read(device):
    result = decoder().generate([7, 8], max_new_tokens=60, eos_token_id=[], num_speculations=2)
    assert device.early >= result.stats.rounds - 2  # all but the last; the first ran without a graph


def test_graphs_are_captured_once(device):
    model = decoder(num_speculations=3)
    ask = dict(max_new_tokens=24, eos_token_id=[])
    model.generate(PROMPTS[:2], **ask)
    first = device.captures
    assert 1 <= first <= 2  # two rows, then one
    replays = device.replays
    model.generate([[1, 2], [3]], **ask)
    assert device.captures <= 2 and device.replays > replays
    model.generate(PROMPTS[:2], generation_strategy="autoregressive", **ask)
    more = device.captures
    assert more > first  # another kind of round
    model.generate(PROMPTS[:2], generation_strategy="autoregressive", **ask)
    model.generate(PROMPTS[:2], **ask)
    assert device.captures == more


def test_a_larger_cache_drops_the_graphs_of_the_old_one(device):
    model = decoder(num_speculations=3)
    model.generate(PROMPTS[:2], max_new_tokens=24, eos_token_id=[])
    captures = device.captures
    short = model.generate(PROMPTS[:2], max_new_tokens=24, eos_token_id=[]).sequences
    assert device.captures == captures
    long = model.generate(PROMPTS[:2], max_new_tokens=400, eos_token_id=[]).sequences
    assert device.captures > captures
    assert [tokens[:24] for tokens in long] == short


def test_what_looks_into_rounds_runs_without_graphs(device):
    seen = []

    class Streamer:
        def put(self, ids):
            seen.extend(ids.tolist())

        def put_draft(self, ids):
            pass

        def end(self):
            pass

    tokens = decoder().generate(PROMPTS[0], max_new_tokens=20, eos_token_id=[], streamer=Streamer()).sequences[0]
    assert seen == PROMPTS[0] + tokens
    result = decoder().generate(PROMPTS[:2], max_new_tokens=20, eos_token_id=[], output_logits=True)
    assert [logits.argmax(-1).tolist() for logits in result.logits] == result.sequences
    assert not device.captures


def test_a_failed_call_leaves_no_round_behind(device):
    class Broken:
        def put(self, ids):
            if len(ids) < 3:
                raise OSError("the terminal is gone")

        def end(self):
            pass

    model = decoder(num_speculations=1)
    expected = model.generate(PROMPTS[2], max_new_tokens=20, eos_token_id=[]).sequences
    device.queue.clear()
    with pytest.raises(OSError, match="terminal"):
        model.generate(PROMPTS[0], max_new_tokens=20, eos_token_id=[], streamer=Broken())
    while device.queue:  # the device goes on by itself
        device.queue.popleft()()
    assert model.generate(PROMPTS[2], max_new_tokens=20, eos_token_id=[]).sequences == expected


def test_the_first_run_is_eager_the_second_is_captured():
    calls = []

    class Device:
        def capture(self, body):
            calls.append("capture")
            return lambda: calls.append("replay")

    graphs = RoundGraphs(Device())
    for _ in range(3):
        graphs.run("a", lambda: calls.append("run"))
    graphs.run("b", lambda: calls.append("run"))
    assert calls == ["run", "capture", "replay", "replay", "run"]


@pytest.mark.parametrize(
    ("kind", "name", "graphs", "captured"),
    [
        ("cuda", "cuda", "1", True),
        ("cuda", "reference", "1", False),
        ("cuda", "triton", "0", False),
        ("cpu", "cpu", "1", False),
    ],
)
def test_which_rounds_are_captured(monkeypatch, kind, name, graphs, captured):
    """The reference reads from the device in the middle of a round."""
    monkeypatch.setenv("LAYERSKIP_GRAPHS", graphs)
    ops = SimpleNamespace(backends={"rms_norm": name, "decoder_stack": "composed"})
    assert captures_rounds(SimpleNamespace(device=torch.device(kind), ops=ops)) == captured


@pytest.mark.parametrize("options", [dict(output_logits=True), dict(stopping_criteria=[lambda ids, scores: False])])
def test_a_call_leaves_no_tensors_to_the_garbage_collector(monkeypatch, options):
    """Logits and caches are large: they go when the call ends, or the next one needs the room."""
    made, original = [], Buffers.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Buffers, "__init__", init)
    model = decoder()
    gc.collect()
    gc.disable()
    try:
        caches = []
        for new in (8, 300):  # which needs a larger cache
            model.generate(PROMPTS[:2], max_new_tokens=new, eos_token_id=[], **options)
            caches.append(weakref.ref(model._workspace.cache))
        assert caches[0]() is None and caches[1]() is not None
        kept = {id(buffers) for buffers, _ in model._workspace._rounds.values()}
        assert len(made) >= 2 and {id(b()) for b in made if b() is not None} == kept
    finally:
        gc.enable()
