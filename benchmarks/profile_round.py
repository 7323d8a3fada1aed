"""Where the time of a decoding round goes: kernels and host calls by share, and how long the device sits idle.

    python benchmarks/profile_round.py --device cuda --backend triton
    python benchmarks/profile_round.py --shape llama3.2-1b --strategy autoregressive

On a GPU the rounds are graph replays, and "busy" is the time from the first kernel's start to the last one's end in
which at least one runs. Where launches overlap, a kernel's time has its waiting for the one in front in it;
LAYERSKIP_PDL=0 shows them one after the other. The profiler itself slows the host down: read the shares, take speeds
from decode_speed.py.
"""

import argparse
import json
from pathlib import Path

import torch
from decode_speed import SHAPES, random_model
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import layerskip_kernels as lk


def busy_seconds(spans: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans in microseconds, in seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="demo")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--strategy", default="self_speculative", choices=("self_speculative", "autoregressive"))
    parser.add_argument("--num_speculations", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    options = dict(backend=arguments.backend, max_batch_size=arguments.batch)
    if arguments.shape:
        model = random_model(arguments.shape, 4, 0.1, torch.bfloat16, arguments.device)
        decoder = lk.SelfSpeculativeDecoder.from_model(model, exit_layer=4, **options)
    else:
        decoder = lk.SelfSpeculativeDecoder.from_pretrained(arguments.model, device=arguments.device, **options)
    prompts = torch.randint(0, decoder.config.vocab_size, (arguments.batch, 16), generator=torch.manual_seed(0))

    def generate():
        return decoder.generate(
            prompts,
            max_new_tokens=arguments.new_tokens,
            generation_strategy=arguments.strategy,
            num_speculations=arguments.num_speculations,
            eos_token_id=[],
        ).stats

    generate()  # compiles
    generate()  # captures
    gpu = decoder.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiled:
        stats = generate()
    rounds = stats.rounds / arguments.batch
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    spans = [(e.time_range.start, e.time_range.end) for e in profiled.events() if e.device_type == kind]
    seconds = {"rounds": stats.decode_seconds, "prefill": stats.prefill_seconds}
    if gpu:
        seconds["kernels"] = busy_seconds(spans)
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = sorted(profiled.key_averages(), key=lambda e: -getattr(e, own))[:25]
    total = sum(getattr(e, own) for e in profiled.key_averages()) or 1
    table = Table("name", "calls per round", "us per call", "share", caption=str(seconds))
    for e in rows:
        time = getattr(e, own)
        table.add_row(e.key[:70], f"{e.count / rounds:.1f}", f"{time / max(e.count, 1):.1f}", f"{time / total:.1%}")
    Console(width=120).print(table)
    if arguments.json:
        record = {"rounds": rounds, "launches_per_round": len(spans) / rounds, **seconds}
        record["rows"] = [{"name": e.key, "calls": e.count, "microseconds": getattr(e, own)} for e in rows]
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
