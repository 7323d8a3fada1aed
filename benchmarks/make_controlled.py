"""An acceptance-controlled checkpoint: real sizes, random weights, an early exit that agrees at a rate of choice.

    python benchmarks/make_controlled.py build/1b                       # Llama-3.2-1B shape, E = 4, 80 % accepted

Speed depends on sizes and on how often a draft is accepted, not on what the text says. So all weights are random
(seed 0, the usual initialization), and what the layers from the exit on add to the hidden state, their o and down
projections, is scaled by one number: at 1 the exit never agrees with the last layer, at 0 always. The number is
searched by bisection until the model's own greedy text, after prompts of random tokens, has the acceptance asked for,
counted per draft position given that the positions before it were accepted. Nothing else is changed: every layer has
its full size and is computed in full. Text that goes round in circles would be accepted for the wrong reason, so its
share of distinct tokens is printed, and too small a share is an error. `controlled.json` beside the weights says all
of this.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import layerskip_kernels as lk
from layerskip_kernels.files import write_whole

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
    ),
    "llama3-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}
DISTINCT = 0.5  # of the generated tokens, at least


def random_model(shape: str, exit_layer: int, late_scale: float, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """The shape with random weights; what the layers from `exit_layer` on add is scaled by `late_scale`."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None))
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        for weight in late_projections(model, exit_layer):
            weight.mul_(late_scale)
    return model.eval()


def late_projections(model: LlamaForCausalLM, exit_layer: int) -> list[torch.Tensor]:
    """The weights through which the layers from `exit_layer` on add to the hidden state."""
    late = model.model.layers[exit_layer:]
    return [weight for layer in late for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]


def random_prompt(vocabulary: int, tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(0, vocabulary, (tokens,), generator=torch.manual_seed(seed)).tolist()


def acceptance(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int, **speculation) -> tuple[float, float]:
    """Accepted share of a draft position, given those before it; distinct share of the tokens. Means over prompts."""
    decoder = lk.SelfSpeculativeDecoder.from_model(model, max_batch_size=1)
    reached = accepted = 0
    distinct = []
    for prompt in prompts:
        result = decoder.generate([prompt], max_new_tokens=tokens, eos_token_id=[], **speculation)
        reached += sum(result.stats.drafted_at)
        accepted += sum(result.stats.accepted_at)
        distinct.append(len(set(result.sequences[0])) / tokens)
    return accepted / reached, statistics.mean(distinct)


def calibrate(measure, wanted: float, tolerance: float, steps: int) -> tuple[float, float, float]:
    """(scale, acceptance, distinct share): bisection of the scale's logarithm in 0.005 ... 0.5, best of its steps.

    `measure(scale)` gives the other two; acceptance falls with the scale, up to the noise of so few tokens.
    """
    low, high = math.log(0.005), math.log(0.5)
    tried = []
    for _ in range(steps):
        scale = math.exp((low + high) / 2)
        found, distinct = measure(scale)
        tried.append((abs(found - wanted), scale, found, distinct))
        if abs(found - wanted) <= tolerance:
            break
        low, high = (math.log(scale), high) if found > wanted else (low, math.log(scale))
    return min(tried)[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama3.2-1b")
    parser.add_argument("--exit_layer", type=int, default=4)
    parser.add_argument("--num_speculations", type=int, default=4)
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="of the bisection, at most")
    arguments = parser.parse_args()
    console = Console(stderr=True)

    model = random_model(arguments.shape, arguments.exit_layer, 1.0, torch.bfloat16, "cpu")
    weights = late_projections(model, arguments.exit_layer)
    originals = [weight.detach().clone() for weight in weights]
    prompts = [
        random_prompt(model.config.vocab_size, arguments.prompt_tokens, seed=1 + i) for i in range(arguments.prompts)
    ]
    speculation = dict(exit_layer=arguments.exit_layer, num_speculations=arguments.num_speculations)

    def set_scale(scale: float) -> None:
        with torch.no_grad():
            for weight, original in zip(weights, originals):
                torch.mul(original, scale, out=weight)

    def measure(scale: float) -> tuple[float, float]:
        set_scale(scale)
        found, distinct = acceptance(model, prompts, arguments.new_tokens, **speculation)
        console.print(f"late_scale {scale:.4f}: {found:.3f} accepted, {distinct:.2f} of the tokens distinct")
        return found, distinct

    scale, found, distinct = calibrate(measure, arguments.acceptance, arguments.tolerance, arguments.steps)
    if distinct < DISTINCT:
        raise SystemExit(f"{distinct:.2f} of the tokens are distinct, less than {DISTINCT}: the text goes in circles")
    set_scale(scale)
    model.config.layerskip = speculation
    model.save_pretrained(arguments.output)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    controlled = {**settings, "late_scale": scale, "measured_acceptance": found, "distinct_tokens": distinct}
    write_whole(arguments.output / "controlled.json", json.dumps(controlled, indent=2).encode())
    print(arguments.output)


if __name__ == "__main__":
    main()
