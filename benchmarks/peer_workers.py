"""The peers, each with its weights in a process of its own: it decodes when told to, and waits in between.

How decoding is told apart from prefill: ours, by its own statistics, rounds only; transformers, by a streamer: the
tokens after the first ones it shows, over the time since; with `assistant_early_exit` these are a whole round's.
llama.cpp and OpenVINO: a loop of our own around one call per token, the prompt in one call before.
"""

from __future__ import annotations

import ctypes
import inspect
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from peer_files import PeerFiles
from peer_rows import LLAMA_CPP, OPENVINO, OURS, TRANSFORMERS

NOT_INSTALLED = "pip install layerskip_kernels[peers]"
SETTLE_SECONDS = 0.3  # thread pools may spin for a while after work: bandwidth is probed later


@dataclass(frozen=True)
class Task:
    """What all rows decode. Greedy, batch 1, no end of sequence."""

    prompt: list[int]
    new_tokens: int
    exit_layer: int
    num_speculations: int
    threads: int


class Worker:
    """A process that holds one peer. Raises RuntimeError with the reason when it can't load, or fails."""

    def __init__(self, peer: str, weights: str, load: dict[str, Any], files: PeerFiles, task: Task):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, peer, weights, load, files, task), daemon=True)
        self._process.start()
        theirs.close()
        self.loaded = self._answer()

    def decode(self, method: str) -> dict[str, Any]:
        self._pipe.send(method)
        return self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.terminate()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"its process ended with exit code {self._process.exitcode}") from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def _serve(pipe, peer: str, weights: str, load: dict[str, Any], files: PeerFiles, task: Task) -> None:
    """Loads, then answers every method's name with what decoding took, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the bench's, which keeps what was measured
    torch.set_num_threads(task.threads)
    try:
        held, answer = _attempt(lambda: PEERS[peer](weights, load, files, task))
        pipe.send(answer if held is None else held.loaded)
        while held is not None:
            cpu, clock = time.process_time(), time.perf_counter()
            method = pipe.recv()
            idle = (time.process_time() - cpu) / max(time.perf_counter() - clock, 1e-9)
            result, answer = _attempt(lambda method=method: held.decode(method))
            time.sleep(SETTLE_SECONDS)
            pipe.send(answer if result is None else {**result, "idle_cpu_share": idle})
    except (EOFError, BrokenPipeError):  # the other end is closed: no more work
        return


def _attempt(call) -> tuple[Any, dict[str, str]]:
    """The call's result, or None and the reason, for the other process to show beside the row's name."""
    try:
        return call(), {}
    except ModuleNotFoundError as error:
        return None, {"error": f"{error.name} is not installed: {NOT_INSTALLED}"}
    except Exception as error:
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        return None, {"error": f"{kind}{error}"}


class Ours:
    def __init__(self, weights: str, load: dict[str, Any], files: PeerFiles, task: Task):
        import layerskip_kernels as lk

        known = inspect.signature(lk.SelfSpeculativeDecoder.from_pretrained).parameters
        if missing := [name for name in load if name not in known]:
            raise RuntimeError(f"from_pretrained of this version has no argument {missing[0]}")
        self.task = task
        self.decoder = lk.SelfSpeculativeDecoder.from_pretrained(
            str(files.checkpoint),
            exit_layer=task.exit_layer,
            num_speculations=task.num_speculations,
            device="cpu",
            max_batch_size=1,
            **load,
        )
        model = self.decoder.model
        held = model.weights
        looked_up = 0 if held.lm_head is held.embedding else held.embedding.nbytes
        self.loaded = {
            "bytes_per_token": tensor_bytes(held) - looked_up - held.lm_head.nbytes + model.head_bytes(),
            "draft_layers": self.decoder.draft_layers,
            "draft_head": self.decoder.draft_head,
            "head_screen": self.decoder.head_screen,
        }

    def decode(self, method: str) -> dict[str, Any]:
        result = self.decoder.generate(
            [self.task.prompt],
            max_new_tokens=self.task.new_tokens,
            generation_strategy=method,
            repetition_penalty=1,
            eos_token_id=[],
        )
        stats = result.stats
        reached = sum(stats.drafted_at)
        return {
            "tokens": result.sequences[0],
            "decode_tokens": stats.decode_tokens,
            "decode_seconds": stats.decode_seconds,
            "prefill_seconds": stats.prefill_seconds,
            "acceptance": sum(stats.accepted_at) / reached if reached else None,
        }


class _Streamer:
    """Notes when tokens come; the first ones to come are the prompt."""

    def __init__(self):
        self.puts: list[tuple[float, int]] = []

    def put(self, ids: torch.Tensor) -> None:
        self.puts.append((time.perf_counter(), ids.numel()))

    def end(self) -> None:
        pass


class Transformers:
    def __init__(self, weights: str, load: dict[str, Any], files: PeerFiles, task: Task):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.task = task
        self.model = AutoModelForCausalLM.from_pretrained(files.checkpoint, dtype=getattr(torch, weights)).eval()
        settings = self.model.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = task.num_speculations, "constant"
        settings.repetition_penalty = None  # a checkpoint's own: not all of the peers have one
        whole = sum(parameter.nbytes for parameter in self.model.parameters())
        tied = self.model.config.tie_word_embeddings
        self.loaded = {"bytes_per_token": whole - (0 if tied else self.model.get_input_embeddings().weight.nbytes)}

    def _options(self, method: str) -> dict[str, Any]:
        from transformers import CompileConfig

        if method == "assistant_early_exit":
            return {"assistant_early_exit": self.task.exit_layer}
        if method != "compiled":
            return {}
        compiling = CompileConfig(mode="default")
        compiling._compile_all_devices = True  # otherwise `generate` compiles on accelerators alone
        return {"cache_implementation": "static", "compile_config": compiling}

    @torch.inference_mode()
    def decode(self, method: str) -> dict[str, Any]:
        prompt, new = torch.tensor([self.task.prompt]), self.task.new_tokens
        streamer = _Streamer()
        started = time.perf_counter()
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=streamer,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=new,
            **self._options(method),
        )
        ended = time.perf_counter()
        first_at, first = streamer.puts[1]
        return {
            "tokens": output[0, prompt.shape[1] :].tolist(),
            "decode_tokens": new - first,
            "decode_seconds": ended - first_at,
            "prefill_seconds": first_at - started,
        }


class _Loop:
    """Greedy decoding around `_step(ids, position)`, which gives the logits after the ids."""

    task: Task

    def _reset(self) -> None:
        raise NotImplementedError

    def _step(self, ids: list[int], position: int) -> np.ndarray:
        raise NotImplementedError

    def decode(self, method: str) -> dict[str, Any]:
        prompt, new = self.task.prompt, self.task.new_tokens
        self._reset()
        started = time.perf_counter()
        tokens = [int(self._step(prompt, 0).argmax())]
        first_at = time.perf_counter()
        while len(tokens) < new:
            tokens.append(int(self._step(tokens[-1:], len(prompt) + len(tokens) - 1).argmax()))
        return {
            "tokens": tokens,
            "decode_tokens": new - 1,
            "decode_seconds": time.perf_counter() - first_at,
            "prefill_seconds": first_at - started,
        }


class LlamaCpp(_Loop):
    """llama.cpp by llama-cpp-python's bindings of its C functions, without what its Python classes add per token."""

    def __init__(self, weights: str, load: dict[str, Any], files: PeerFiles, task: Task):
        import llama_cpp
        from gguf_file import bytes_per_token

        self.lib, self.task = llama_cpp, task
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        file = files.gguf(weights)
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {file}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = len(task.prompt) + task.new_tokens + 64
        parameters.n_batch = parameters.n_ubatch = max(64, len(task.prompt))
        parameters.n_threads = parameters.n_threads_batch = task.threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {file}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        whole, types = bytes_per_token(file)
        system = llama_cpp.llama_print_system_info().decode()
        self.loaded = {"bytes_per_token": whole, "types": types, "system": system}

    def _reset(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _step(self, ids: list[int], position: int) -> np.ndarray:
        tokens = (self.lib.llama_token * len(ids))(*ids)  # the batch only points to it
        if failed := self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode gave {failed}")
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocabulary,))


class OpenVino(_Loop):
    def __init__(self, weights: str, load: dict[str, Any], files: PeerFiles, task: Task):
        import openvino

        self.task = task
        folder = files.openvino(weights)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": task.threads}
        compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
        self.request = compiled.create_infer_request()
        whole = (folder / "openvino_model.bin").stat().st_size
        config = _config(files)
        if not config.tie_word_embeddings:
            stored = {"bf16": 2, "int8": 1}[weights]
            whole -= config.vocab_size * config.hidden_size * stored
        precision = str(compiled.get_property("INFERENCE_PRECISION_HINT"))
        cache = str(compiled.get_property("KV_CACHE_PRECISION"))
        self.loaded = {"bytes_per_token": whole, "inference_precision": precision, "kv_cache_precision": cache}

    def _reset(self) -> None:
        self.request.reset_state()

    def _step(self, ids: list[int], position: int) -> np.ndarray:
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, position + len(ids)), np.int64),
            "position_ids": np.arange(position, position + len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return self.request.infer(inputs, share_inputs=True, share_outputs=True)["logits"][0, -1]


PEERS = {OURS: Ours, TRANSFORMERS: Transformers, LLAMA_CPP: LlamaCpp, OPENVINO: OpenVino}


def _config(files: PeerFiles):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(files.checkpoint)


def tensor_bytes(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of the tensors in a tree of dataclasses and sequences, shared memory counted once."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        new = value.data_ptr() not in seen
        seen.add(value.data_ptr())
        return value.nbytes if new else 0
    if is_dataclass(value):
        return sum(tensor_bytes(getattr(value, f.name), seen) for f in fields(value))
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item, seen) for item in value)
    return 0


def set_environment(threads: int) -> None:
    """What the workers inherit: every library's number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
