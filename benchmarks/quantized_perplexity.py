"""What quantization costs in quality: perplexity on held-out text, and how often quantized heads draft the same token.

    python benchmarks/quantized_perplexity.py --output quantized_demo.json
    python benchmarks/quantized_perplexity.py --model build/smollm2 --text prose --output quantized_smollm2.json

Teacher forced through the kernels that decode, in windows of 64 tokens, every text on its own. `code` is functions of
Python's standard library, which the demo model was not trained on; `prose` the reference manual that comes with Python.
The change of perplexity is given with its standard error, over the same tokens. Heads: the share of tokens where the
head that drafts, a copy in 8 or 4 bits with its best tokens rated again, and the copy alone say what the model's own
says, on the same hidden states, after the exit layer and after the last. Drafts: the share of tokens where copies of
the early layers, with the model's own head, say what the layers themselves say, and what the last layer says.
"""

from __future__ import annotations

import ast
import json
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import torch

import layerskip_kernels as lk
from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.draft_head import make_draft_head
from layerskip_kernels.measure.environment import environment
from layerskip_kernels.measure.teacher import heads, pieces

MODULES = "argparse bdb calendar cmd copy csv difflib fractions heapq inspect mailbox pickle shlex statistics tarfile"
LENGTH = 512  # most tokens of a text


def code() -> Iterator[str]:
    """Functions, dedented, as the demo model's corpus has them."""
    for module in MODULES.split():
        source = Path(__import__(module).__file__).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and 5 <= node.end_lineno - node.lineno <= 60:
                yield textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])) + "\n"


def prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (text for text in topics.values() if len(text) > 1000)


TEXTS = {"code": code, "prose": prose}


@torch.inference_mode()
def read(decoder: lk.SelfSpeculativeDecoder, ids: list[int], copies: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Of every token but the first: its negative log-probability, what the model says, what the heads say the same."""
    model, layers = decoder.model, decoder.config.num_layers
    text = torch.tensor(ids)
    cache = KVCache(model.config, 1, len(ids), model.dtype, model.device)
    losses, said, same = [], [], {}
    for piece in pieces(model, cache, text[:-1], 1):
        for first, last in ((0, decoder.exit_layer), (decoder.exit_layer, layers)):
            piece.run_layers(first, last)
            tokens = torch.cat([token for _, token, _ in heads(model, piece.hidden[0])])
            for name, copy in copies.items():
                model.draft_screen = copy
                drafted = torch.cat([token for _, token, _ in heads(model, piece.hidden[0], drafts=True)])
                alone = model.ops.exit_head(
                    piece.hidden[0], model.weights.final_norm, copy.weight, eps=model.config.rms_norm_eps
                ).token
                same.setdefault((name, last), []).append(drafted == tokens)
                same.setdefault((f"{name} alone", last), []).append(alone == tokens)
        logits = torch.cat([logits for _, _, logits in heads(model, piece.hidden[0])])
        targets = text[piece.start + 1 : piece.stop + 1, None]
        losses.append(-logits.log_softmax(-1).gather(1, targets)[:, 0].double())
        said.append(tokens)
    return torch.cat(losses), torch.cat(said), {key: torch.cat(parts) for key, parts in same.items()}


def measure(model: str, dtype: str, quantization: str | None, texts: list[list[int]]) -> tuple:
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(
        model, dtype=dtype, device="cpu", quantization=quantization, draft_head="shared"
    )
    weights, own = decoder.model.weights, quantization is None
    copies = {name: make_draft_head(name, weights.lm_head) for name in ("int8", "int4")} if own else {}
    found = [read(decoder, ids, copies) for ids in texts]
    losses, said = (torch.cat([part[i] for part in found]) for i in (0, 1))
    same = {f"{name} after {last}": torch.cat([f[2][name, last] for f in found]) for name, last in found[0][2]}
    size = decoder.model.layer_bytes(0, decoder.config.num_layers) + weights.lm_head.nbytes
    return decoder, losses, said, same, size


@torch.inference_mode()
def drafts(model: str, dtype: str, texts: list[list[int]]) -> dict[str, dict[str, float]]:
    """Of the early layers and their copies: shares of tokens, each given all true ones before it."""
    shares: dict[str, dict[str, float]] = {}
    for name in ("int8", "int4"):
        decoder = lk.SelfSpeculativeDecoder.from_pretrained(
            model, dtype=dtype, device="cpu", draft_layers=name, draft_head="shared"
        )
        its, exit_layer, layers = decoder.model, decoder.exit_layer, decoder.config.num_layers
        said: dict[str, list[torch.Tensor]] = {"copies": [], "own": [], "last": []}
        for ids in texts:
            cache = KVCache(its.config, 1, len(ids), its.dtype, its.device)
            for piece in pieces(its, cache, torch.tensor(ids[:-1]), 1):
                copied = piece.hidden.clone()
                piece.run_draft_layers(0, exit_layer, copied)
                said["copies"] += [token for _, token, _ in heads(its, copied[0])]
                for who, first, last in (("own", 0, exit_layer), ("last", exit_layer, layers)):
                    piece.run_layers(first, last)
                    said[who] += [token for _, token, _ in heads(its, piece.hidden[0])]
        copies, own, last = (torch.cat(tokens) for tokens in said.values())
        shares["shared"] = {"as the last layer": float((own == last).double().mean())}
        compared = {"as the layers themselves": own, "as the last layer": last}
        shares[name] = {what: float((copies == tokens).double().mean()) for what, tokens in compared.items()}
    return shares


@click.command()
@click.option("--model", default="demo", help="Folder of a checkpoint, or demo.")
@click.option("--text", type=click.Choice(TEXTS), default="code")
@click.option("--dtype", default="bfloat16")
@click.option("--tokens", default=8192, help="Tokens to read, at least.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path))
def main(model: str, text: str, dtype: str, tokens: int, output: Path | None) -> None:
    tokenizer = lk.SelfSpeculativeDecoder.from_pretrained(model, device="cpu").tokenizer
    texts: list[list[int]] = []
    for one in TEXTS[text]():
        if sum(map(len, texts)) >= tokens:
            break
        texts.append(tokenizer(one)["input_ids"][:LENGTH])
    rows, baseline, settings = {}, None, {}
    for quantization in (None, "int8", "int4"):
        decoder, losses, said, same, size = measure(model, dtype, quantization, texts)
        row = {"perplexity": math.exp(losses.mean()), "bytes": size}
        if baseline is None:
            baseline, settings = (losses, said), environment(decoder)
            agreement = {name: float(equal.double().mean()) for name, equal in same.items()}
        else:
            change = losses - baseline[0]
            row["change"] = math.expm1(change.mean())
            row["standard_error"] = float(change.std() / len(change) ** 0.5)
            row["same_token"] = float((said == baseline[1]).double().mean())
        rows[quantization or dtype] = row
        click.echo(f"{quantization or dtype}: " + ", ".join(f"{name} {value:.6g}" for name, value in row.items()))
    click.echo("heads: " + ", ".join(f"{name} layers {share:.2%}" for name, share in agreement.items()))
    drafted = drafts(model, dtype, texts)
    for name, shares in drafted.items():
        click.echo(f"drafts, {name}: " + ", ".join(f"{what} {share:.2%}" for what, share in shares.items()))
    if output is not None:
        counts = {"text": text, "texts": len(texts), "tokens": len(baseline[0]), "longest": LENGTH}
        content = {"model": Path(model).name, **counts, "weights": rows, "head_agreement": agreement}
        content |= {"drafts": drafted, **settings}
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
