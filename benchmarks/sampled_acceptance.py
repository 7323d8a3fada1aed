"""Acceptance of sampled drafts: coupled noise beside rejection sampling, standard and block. No speed is measured.

    python benchmarks/sampled_acceptance.py --model CHECKPOINT
    python benchmarks/sampled_acceptance.py --model CHECKPOINT --exit_layer 6 --temperature 0.6 1.0 --prompt "def f(x):"

Each seed is one call with all prompts. Of them all together: accepted / drafted, with the standard error over the
seeds; the acceptance of a draft all before which were accepted ("per position"); and tokens per round, by which methods
that judge a draft as a whole compare. The methods say different texts, so they are asked about different drafts.
"""

import argparse
import statistics

from rich.console import Console
from rich.table import Table

import layerskip_kernels as lk

PROMPTS = (
    "Once upon a time",
    "The little girl went to the",
    "One day, a dog named",
    "def fibonacci(n):",
    "The capital of France is",
    "Tom and his mother",
)
WAYS = {
    "coupled": {},
    "rejection, standard": dict(verification="rejection", rejection_method="standard"),
    "rejection, block": dict(verification="rejection", rejection_method="block"),
}


def acceptance(generate, seeds: int) -> dict[str, float]:
    """`generate(seed)` returns a result; what the module says about the figures."""
    runs = [generate(seed).stats for seed in range(seeds)]
    rates = [stats.acceptance_rate for stats in runs if stats.drafted]
    if not rates:
        raise SystemExit("nothing was drafted: --num_speculations must be at least 1, --max_steps at least 3")

    def total(name: str) -> int:
        return sum(getattr(stats, name) for stats in runs)

    reached, passed = (sum(sum(getattr(s, name)) for s in runs) for name in ("drafted_at", "accepted_at"))
    return {
        "drafted": total("drafted"),
        "accepted": total("accepted") / total("drafted"),
        "error": statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else float("nan"),
        "per_position": passed / reached,
        "tokens_per_round": total("decode_tokens") / total("rounds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--exit_layer", type=int, help="recorded with the checkpoint, or a quarter of the layers")
    parser.add_argument("--num_speculations", type=int, help="recorded with the checkpoint, or 6")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--prompt", nargs="+", default=list(PROMPTS))
    parser.add_argument("--max_steps", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()

    decoder = lk.SelfSpeculativeDecoder.from_pretrained(
        args.model, exit_layer=args.exit_layer, num_speculations=args.num_speculations
    )
    layers = f"E = {decoder.exit_layer} of {decoder.config.num_layers}, K = {decoder.num_speculations}"
    table = Table(title=f"{layers}, top-p {args.top_p}, {len(args.prompt)} prompts, {args.seeds} seeds")
    for column in ("temperature", "verification", "drafted", "accepted / drafted", "per position", "tokens per round"):
        table.add_column(column, justify="left" if column == "verification" else "right")
    for temperature in args.temperature:
        for name, way in WAYS.items():
            options = dict(max_new_tokens=args.max_steps, sample=True, temperature=temperature, top_p=args.top_p, **way)
            found = acceptance(lambda seed, o=options: decoder.generate(args.prompt, seed=seed, **o), args.seeds)
            table.add_row(
                f"{temperature}",
                name,
                f"{found['drafted']}",
                f"{found['accepted']:.3f} ± {found['error']:.3f}",
                f"{found['per_position']:.3f}",
                f"{found['tokens_per_round']:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
