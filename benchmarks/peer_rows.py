"""What `cpu_peers.py` measures: the rows, which turns count, and the figures of a row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS, TRANSFORMERS, LLAMA_CPP, OPENVINO = "ours", "transformers", "llama.cpp", "openvino"


@dataclass(frozen=True)
class Row:
    """One way of decoding. Rows of the same `worker` share a process and the weights in it."""

    peer: str
    weights: str  # "bfloat16", "Q8_0", ...: what the peer calls them
    method: str
    load: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of loading
    same_as: str = ""  # the plain row whose tokens speculation must repeat

    @property
    def name(self) -> str:
        extra = "".join(f" {key}={value}" for key, value in self.load.items() if key != "quantization")
        return f"{self.peer} {self.weights} {self.method}{extra}"

    @property
    def worker(self) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
        return self.peer, self.weights, tuple(self.load.items())


def _ours(weights: str, **load: Any) -> tuple[Row, Row]:
    plain = Row(OURS, weights, "autoregressive", load)
    return plain, Row(OURS, weights, "self_speculative", load, same_as=plain.name)


ROWS = (
    *_ours("bfloat16"),
    Row(OURS, "bfloat16", "autoregressive", {"head_screen": "none"}, same_as="ours bfloat16 autoregressive"),
    *(
        Row(OURS, "bfloat16", "self_speculative", {"draft_head": head}, same_as="ours bfloat16 autoregressive")
        for head in ("shared", "int8", "int4")
    ),
    *(
        Row(OURS, "bfloat16", "self_speculative", {"draft_layers": layers}, same_as="ours bfloat16 autoregressive")
        for layers in ("shared", "int8", "int4")
    ),
    *_ours("int8", quantization="int8"),
    *_ours("int4", quantization="int4"),
    Row(TRANSFORMERS, "float32", "eager"),
    Row(TRANSFORMERS, "float32", "compiled"),
    Row(TRANSFORMERS, "float32", "assistant_early_exit", same_as="transformers float32 eager"),
    Row(TRANSFORMERS, "bfloat16", "eager"),
    Row(TRANSFORMERS, "bfloat16", "assistant_early_exit", same_as="transformers bfloat16 eager"),
    Row(LLAMA_CPP, "BF16", "plain"),
    Row(LLAMA_CPP, "Q8_0", "plain"),
    Row(LLAMA_CPP, "Q4_0", "plain"),
    Row(OPENVINO, "bf16", "plain"),
    Row(OPENVINO, "int8", "plain"),
)
EXACT = "transformers float32 eager"  # whose tokens the others are compared with
BASE = "ours bfloat16 autoregressive"  # whose speed they are


def chosen(names: Sequence[str] | None) -> list[Row]:
    """The rows of these names, or whose names start so; None: all. Raises ValueError for a name that starts none."""
    if names is None:
        return list(ROWS)
    wanted = set()
    for name in names:
        exact = {row for row in ROWS if row.name == name}
        found = exact or {row for row in ROWS if row.name.startswith(name)}
        if not found:
            peers = ", ".join(dict.fromkeys(row.peer for row in ROWS))
            raise ValueError(f"--rows {name!r} begins no row's name, choose from {peers}, or longer: {ROWS[0].name!r}")
        wanted |= found
    return [row for row in ROWS if row in wanted]


def steady(before: float, after: float, limit: float) -> bool:
    """Whether the bandwidth changed by no more than `limit` of the larger one."""
    return abs(before - after) <= limit * max(before, after)


def steady_turn(
    turn: Callable[[], dict[str, Any]], probe: Callable[[], float], limit: float, tries: int
) -> list[dict[str, Any]]:
    """The turns it took to get one during which the bandwidth was steady: all but the last are thrown away.

    After `tries` the last one is thrown away, too, unless it was steady. Each has its `bandwidth` before and after, in
    bytes per second, and whether it was `kept`.
    """
    turns = []
    for _ in range(tries):
        before = probe()
        result = turn()
        after = probe()
        turns.append({**result, "bandwidth": [before, after], "kept": steady(before, after, limit)})
        if turns[-1]["kept"]:
            break
    return turns


def figures(row: Row, turns: Sequence[dict[str, Any]], tokens: dict[str, list[int]], loaded: dict) -> dict[str, Any]:
    """Medians over the kept turns of a row. `tokens`: each row's; `loaded`: what its worker said about the weights.

    `share_of_bandwidth` is of plain weights' bytes per token, also where speculation reads them less often: above 1
    is then possible.
    """
    kept = [turn for turn in turns if turn["kept"]]
    found: dict[str, Any] = {"row": row.name, "turns": len(kept), "thrown_away": len(turns) - len(kept), **loaded}
    if kept:
        speeds = [turn["decode_tokens"] / turn["decode_seconds"] for turn in kept]
        shares = [
            speed * loaded["bytes_per_token"] / statistics.mean(turn["bandwidth"]) for speed, turn in zip(speeds, kept)
        ]
        found |= {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "share_of_bandwidth": statistics.median(shares),
            "prefill_seconds": statistics.median(turn["prefill_seconds"] for turn in kept),
            "bandwidth": statistics.median(statistics.mean(turn["bandwidth"]) for turn in kept),
            "idle_cpu_share": max(turn["idle_cpu_share"] for turn in kept),
        }
        if rates := [turn["acceptance"] for turn in kept if turn.get("acceptance") is not None]:
            found["acceptance"] = statistics.median(rates)
    for key, other in (("same_as_plain", row.same_as), ("same_as_float32", EXACT)):
        if row.name in tokens and other in tokens and other != row.name:
            found[key] = common_prefix(tokens[row.name], tokens[other])
    return found


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before the first difference."""
    different = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(different, min(len(first), len(second)))


def table(rows: Sequence[dict[str, Any]], unavailable: dict[str, str], new_tokens: int, caption: str):
    """A rich table of `figures`; rows without any say why."""
    from rich.table import Table

    columns = ("tok/s", "to ours", "MB/token", "of bandwidth", "prefill s", "accepted", "= plain", "= float32")
    shown = Table("row", *columns, caption=caption)
    base = next((row.get("tokens_per_second") for row in rows if row["row"] == BASE), None)
    for row in rows:
        if "tokens_per_second" not in row:
            shown.add_row(row["row"], f"no steady turn in {row['thrown_away']}")
            continue
        same = [f"{row[key]}/{new_tokens}" if key in row else "" for key in ("same_as_plain", "same_as_float32")]
        shown.add_row(
            row["row"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['tokens_per_second'] / base:.2f}" if base else "",
            f"{row['bytes_per_token'] / 1e6:.0f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['prefill_seconds']:.2f}",
            f"{row['acceptance']:.2f}" if "acceptance" in row else "",
            *same,
        )
    for name in unavailable:
        shown.add_row(name, "-")
    for reason in dict.fromkeys(unavailable.values()):
        names = ", ".join(name for name, its in unavailable.items() if its == reason)
        shown.caption += f"\n{names}: {reason}"
    return shown
