"""Decoding speed beside transformers' `generate`: same weights, prompts and threads or GPU, taken in turns.

    python benchmarks/decode_speed.py --prompt "def mean(values):"   # the demo model
    python benchmarks/decode_speed.py --model build/smollm2 --exit_layer 20 --num_speculations 2
    python benchmarks/decode_speed.py --shape llama3.2-1b --exit_layer 4 --num_speculations 4 6
    python benchmarks/decode_speed.py --shape llama3-8b --device cuda --batch 16 --backend triton --peers compiled

A `--shape` has random weights; what its layers from --exit_layer on add is scaled by --late_scale, so that the early
exit agrees with the last layer at a rate of choice ("acceptance-controlled": it shows speed at an acceptance, no text).
Each round runs every contender once and probes the read bandwidth before and after. Medians over the rounds: tokens per
second of decoding alone, all sequences together, the weights' bytes per step as a share of the bandwidth, and the
seconds of the prefill, which for transformers are those of one new token. The ceiling is what self-speculative decoding
would gain at the acceptance it had if time were bytes of weights.
"""

import argparse
import json
import statistics
import time
from itertools import chain
from pathlib import Path

import torch
from bandwidth import read_bandwidth
from make_controlled import SHAPES, random_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerskip_kernels as lk
from layerskip_kernels.models.hub import checkpoint_folder
from layerskip_kernels.switches import switched_on

PEERS = {"transformers": {}, "compiled": {"cache_implementation": "static"}}  # options of their `generate`


def transformers_speed(model, prompts: torch.Tensor, tokens: int, **options) -> tuple[float, float, list[list[int]]]:
    """Tokens per second of decoding: the time of `tokens` new tokens less that of one, the prefill's seconds."""
    options = dict(do_sample=False, repetition_penalty=1.0, eos_token_id=None, pad_token_id=0, **options)

    def run(new: int) -> tuple[float, list[list[int]]]:
        started = time.perf_counter()
        output = model.generate(prompts, min_new_tokens=new, max_new_tokens=new, **options)
        answers = output[:, prompts.shape[1] :].tolist()
        return time.perf_counter() - started, answers

    first, _ = run(1)
    total, answers = run(tokens)
    return len(answers) * (tokens - 1) / (total - first), first, answers


def ceiling(stats, model, exit_layer: int, drafts: int) -> float:
    """Tokens per round over what a round reads, in steps of the whole model."""
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    head, layers = model.lm_head.weight.nbytes, len(model.model.layers)
    return stats.tokens_per_round / (1 + drafts * (exit_layer * layer + head) / (layers * layer + head))


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="demo", help="a checkpoint")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--exit_layer", type=int, help="recorded with the checkpoint, or 4")
    parser.add_argument("--num_speculations", type=int, nargs="*", default=[4])
    parser.add_argument("--late_scale", type=float, default=0.1)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["transformers"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", help="text, for a checkpoint; otherwise random tokens")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append the figures to this file, a JSON object a line")
    return parser.parse_args(argv)


def main() -> None:
    arguments = arguments_of()
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    if arguments.shape:
        arguments.exit_layer = arguments.exit_layer or 4
        model = random_model(arguments.shape, arguments.exit_layer, arguments.late_scale, dtype, device)
    else:
        folder = checkpoint_folder(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    if arguments.prompt and arguments.shape:
        raise SystemExit("--prompt: a --shape has no tokenizer, leave it out")
    decoder = lk.SelfSpeculativeDecoder.from_model(
        model, exit_layer=arguments.exit_layer, backend=arguments.backend, max_batch_size=arguments.batch
    )
    read_per_step = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if "embed_tokens" not in name or model.config.tie_word_embeddings
    )
    if arguments.prompt:
        ids = AutoTokenizer.from_pretrained(folder)(arguments.prompt).input_ids
        prompts, arguments.prompt_tokens = torch.tensor([ids] * arguments.batch, device=device), len(ids)
    else:
        shape = arguments.batch, arguments.prompt_tokens
        prompts = torch.randint(0, model.config.vocab_size, shape, generator=torch.manual_seed(1)).to(device)
    probe = torch.ones((64 if device == "cpu" else 512) << 20, device=device)

    def ours(strategy: str, drafts: int | None = None):
        result = decoder.generate(
            prompts,
            max_new_tokens=arguments.new_tokens,
            generation_strategy=strategy,
            num_speculations=drafts,
            repetition_penalty=1,
            eos_token_id=[],
        )
        stats[strategy if drafts is None else f"{strategy} K={drafts}"] = result.stats
        return result.stats.tokens_per_second, result.stats.prefill_seconds, result.sequences

    stats: dict = {}
    contenders = {
        name: lambda options=PEERS[name]: transformers_speed(model, prompts, arguments.new_tokens, **options)
        for name in arguments.peers
    }
    contenders["autoregressive"] = lambda: ours("autoregressive")
    for drafts in arguments.num_speculations:
        contenders[f"self_speculative K={drafts}"] = lambda k=drafts: ours("self_speculative", k)

    speeds = {name: [] for name in contenders}
    prefills = {name: [] for name in contenders}
    shares = {name: [] for name in contenders}
    answers = {}
    for contender in contenders.values():
        contender()  # compiles, captures graphs
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            before = read_bandwidth(probe)
            speed, prefill, answers[name] = contender()
            speeds[name].append(speed)
            prefills[name].append(prefill)
            steps_per_second = speed / arguments.batch
            shares[name].append(steps_per_second * read_per_step / statistics.mean((before, read_bandwidth(probe))))

    rows = []
    for name in contenders:
        row = {"contender": name, "tokens_per_second": statistics.median(speeds[name])}
        row["to_autoregressive"] = row["tokens_per_second"] / statistics.median(speeds["autoregressive"])
        row["share_of_bandwidth"] = statistics.median(shares[name])
        row["prefill_seconds"] = statistics.median(prefills[name])
        if name.startswith("self_speculative"):
            drafts = int(name.partition("=")[2])
            row["acceptance"] = stats[name].acceptance_rate
            row["ceiling"] = ceiling(stats[name], model, decoder.exit_layer, drafts)
        ours_too = zip(chain(*answers[name]), chain(*answers["autoregressive"]))
        row["same_tokens"] = sum(a == b for a, b in ours_too)
        rows.append(row)
    conditions = {name: value for name, value in vars(arguments).items() if name != "json"}
    conditions |= dict(
        exit_layer=decoder.exit_layer,
        backend=decoder.ops.backends["small_linear"],
        hardware=torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()} threads",
        read_per_step=read_per_step,
        bandwidth=read_bandwidth(probe),
        torch=torch.__version__,
        launches_overlap=decoder.ops.backends["small_linear"] in ("cuda", "triton") and switched_on("LAYERSKIP_PDL"),
    )
    show(rows, conditions)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(json.dumps({**conditions, "rows": rows}) + "\n")


def show(rows: list[dict], conditions: dict) -> None:
    columns = ("tok/s", "to autoregressive", "share of bandwidth", "prefill s", "acceptance", "ceiling")
    table = Table("contender", *columns, "tokens = autoregressive")
    total = conditions["batch"] * conditions["new_tokens"]
    for row in rows:
        speculative = "ceiling" in row
        table.add_row(
            row["contender"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['to_autoregressive']:.2f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['prefill_seconds']:.3f}",
            f"{row['acceptance']:.2f}" if speculative else "",
            f"{row['ceiling']:.2f}" if speculative else "",
            f"{row['same_tokens']}/{total}",
        )
    weights = conditions["shape"] + " shape, random weights," if conditions["shape"] else conditions["model"]
    table.caption = (
        f"{weights} {conditions['dtype']}, E={conditions['exit_layer']}, {conditions['backend']} on "
        f"{conditions['hardware']}, batch {conditions['batch']}, {conditions['prompt_tokens']}+"
        f"{conditions['new_tokens']} tokens, {conditions['read_per_step'] / 1e6:.0f} MB a step, "
        f"medians of {conditions['rounds']} rounds"
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
