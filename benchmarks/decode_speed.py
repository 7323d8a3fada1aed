"""Decoding speed beside transformers' `generate`: same weights, prompt and threads, taken in turns.

    python benchmarks/decode_speed.py --model build/smollm2 --exit_layer 20 --num_speculations 2
    python benchmarks/decode_speed.py --shape llama3.2-1b --exit_layer 4 --num_speculations 4 6

A `--shape` has random weights; what its layers from --exit_layer on add is scaled by --late_scale, so that the early
exit agrees with the last layer at a rate of choice ("acceptance-controlled": it shows speed at an acceptance, no text).
Each round runs every contender once and probes the read bandwidth before and after. Medians over the rounds: tokens per
second of decoding alone, and the bytes of weights that one token needs as a share of the bandwidth.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import layerskip_kernels as lk

SHAPES = {
    "llama3.2-1b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
}


def random_model(shape: str, exit_layer: int, late_scale: float, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None))
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        for layer in model.model.layers[exit_layer:]:
            layer.self_attn.o_proj.weight.mul_(late_scale)
            layer.mlp.down_proj.weight.mul_(late_scale)
    return model.eval()


def bandwidth(data: torch.Tensor) -> float:
    """Bytes per second of summing `data` with all threads: the best of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return data.nbytes / min(times)


def transformers_speed(model, prompt: torch.Tensor, tokens: int, **options) -> tuple[float, list[int]]:
    """Tokens per second of decoding: the time of `tokens` new tokens less that of one."""
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, **options)

    def run(new: int) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        output = model.generate(prompt, min_new_tokens=new, max_new_tokens=new, **options)
        return time.perf_counter() - started, output

    first, _ = run(1)
    total, output = run(tokens)
    return (tokens - 1) / (total - first), output[0, prompt.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--exit_layer", type=int, default=4)
    parser.add_argument("--num_speculations", type=int, nargs="*", default=[4])
    parser.add_argument("--late_scale", type=float, default=0.1)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    else:
        model = random_model(arguments.shape, arguments.exit_layer, arguments.late_scale, dtype)
    decoder = lk.SelfSpeculativeDecoder.from_model(model, exit_layer=arguments.exit_layer)
    read_per_token = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if "embed_tokens" not in name or model.config.tie_word_embeddings
    )
    prompt = torch.randint(0, model.config.vocab_size, (1, arguments.prompt_tokens), generator=torch.manual_seed(1))
    probe = torch.ones(64 << 20)

    def ours(strategy: str, drafts: int | None = None):
        result = decoder.generate(
            prompt,
            max_new_tokens=arguments.new_tokens,
            generation_strategy=strategy,
            num_speculations=drafts,
            eos_token_id=[],
        )
        acceptance[strategy, drafts] = result.stats.acceptance_rate
        return result.stats.tokens_per_second, result.sequences[0]

    acceptance: dict = {}
    contenders = {
        "transformers": lambda: transformers_speed(model, prompt, arguments.new_tokens),
        "autoregressive": lambda: ours("autoregressive"),
    }
    for drafts in arguments.num_speculations:
        contenders[f"self_speculative K={drafts}"] = lambda k=drafts: ours("self_speculative", k)

    speeds = {name: [] for name in contenders}
    shares = {name: [] for name in contenders}
    answers = {}
    for contender in contenders.values():
        contender()  # warm-up
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            before = bandwidth(probe)
            speed, answers[name] = contender()
            speeds[name].append(speed)
            shares[name].append(speed * read_per_token / statistics.mean((before, bandwidth(probe))))

    table = Table(
        "contender", "tok/s", "to transformers", "share of bandwidth", "acceptance", "tokens = autoregressive"
    )
    base = statistics.median(speeds["transformers"])
    for name in contenders:
        speed = statistics.median(speeds[name])
        strategy, _, drafts = name.partition(" K=")
        accepted = acceptance.get((strategy, int(drafts) if drafts else None))
        same = sum(a == b for a, b in zip(answers[name], answers["autoregressive"]))
        table.add_row(
            name,
            f"{speed:.1f}",
            f"{speed / base:.2f}",
            f"{statistics.median(shares[name]):.0%}",
            f"{accepted:.2f}" if accepted is not None else "",
            f"{same}/{arguments.new_tokens}",
        )
    table.caption = (
        f"{arguments.model or arguments.shape + ' shape, random weights'} {arguments.dtype}, E={arguments.exit_layer}, "
        f"{arguments.prompt_tokens}+{arguments.new_tokens} tokens, {torch.get_num_threads()} threads, "
        f"{read_per_token / 1e6:.0f} MB a token, medians of {arguments.rounds} rounds"
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
