"""Is the demo model's text Python? Greedy function bodies for held-out `def` lines, and how many of them parse.

python docs/demo/quality.py CHECKPOINT build/demo/heldout.parquet [--show 3]
"""

from __future__ import annotations

import ast
import random

import click
import pyarrow.parquet as pq

import layerskip_kernels as lk

PROMPTS, NEW_TOKENS = 100, 256


def header(function: str) -> str:
    """The function up to the colon of its `def`."""
    (node,) = ast.parse(function).body
    lines = function.splitlines()[: node.body[0].lineno - 1]
    while lines and not lines[-1].rstrip().endswith(":"):
        lines.pop()  # comments between the colon and the body
    return "\n".join(lines).rstrip()


def parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


@click.command()
@click.argument("checkpoint")
@click.argument("heldout", type=click.Path(exists=True, dir_okay=False))
@click.option("--repetition_penalty", type=float, help="Default: the checkpoint's.")
@click.option("--show", type=int, default=0, help="Texts to print.")
def main(checkpoint: str, heldout: str, repetition_penalty: float | None, show: int) -> None:
    texts = pq.read_table(heldout)["text"].to_pylist()
    random.Random(0).shuffle(texts)
    prompts = [prompt for prompt in map(header, texts) if prompt][:PROMPTS]
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint)
    result = decoder.generate(prompts, max_new_tokens=NEW_TOKENS, repetition_penalty=repetition_penalty)
    answers = [prompt + text for prompt, text in zip(prompts, result.text)]
    for answer in answers[:show]:
        click.echo(answer + "\n" + "-" * 20)
    ended = sum(reason == "eos" for reason in result.finish_reasons)
    click.echo(f"{sum(map(parses, answers))} of {len(answers)} parse; {ended} ended within {NEW_TOKENS} tokens")
    stats = result.stats
    click.echo(
        f"E={decoder.exit_layer}, K={decoder.num_speculations}: {stats.acceptance_rate:.1%} of the drafts accepted, by "
        f"position {', '.join(f'{share:.1%}' for share in stats.position_acceptance)}; "
        f"{stats.tokens_per_round:.2f} tokens a round"
    )


if __name__ == "__main__":
    main()
