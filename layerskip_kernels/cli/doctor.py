"""`layerskip doctor`: what is installed, what was built, which backend runs here, and why the others don't."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerskip_kernels import __version__
from layerskip_kernels.measure.environment import cpu_model, version

PACKAGES = ("torch", "transformers", "safetensors", "triton")


@click.command(short_help="Show which backends work here, and why the others don't.")
def doctor() -> None:
    """Show what was built, which backends work here and why the others don't."""
    import torch

    from layerskip_kernels.native.info import build_report

    build = build_report()
    console = Console(highlight=False)
    for title, rows in (
        ("Installation", _installation()),
        ("Processor", _processor(build["cpu"])),
        ("GPU", _gpus(torch, build["cuda"])),
        ("Backends", _backends()),
    ):
        console.print(_table(title, ("", ""), rows))
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    console.print(_table("Backend that auto picks", ("op", *map(str, devices)), _choices(torch, devices)))


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns))
    for number, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _installation() -> list[tuple[str, str]]:
    return [
        ("layerskip_kernels", f"{__version__} in {Path(__file__).parents[1]}"),
        *((name, version(name) or "not installed") for name in PACKAGES),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
    ]


def _processor(build: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("model", cpu_model()),
        ("threads", f"{build['threads']} used, {os.cpu_count()} logical processors"),
        ("native library", f"built by {build['compiler']}" if "compiler" in build else build["reason"]),
    ]
    if "active_variant" in build:
        rows.append(("variant in use", f"{build['active_variant']}: {build['active_because']}"))
    elif "compiler" in build:
        rows.append(("variant in use", f"none: {build['reason']}"))
    return rows + [(f"  {name}", missing or "runs here") for name, missing in build.get("variants", {}).items()]


def _gpus(torch: Any, build: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("torch built for CUDA", torch.version.cuda or "no")]
    if "archs" in build:
        rows += [
            ("native library", f"built by {build['compiler']} for {build['archs']}"),
            ("built with CUDA", _cuda_version(build["runtime_version"])),
            (
                "driver supports CUDA",
                _cuda_version(build["driver_version"]) if build["driver_version"] else "no driver",
            ),
            ("runs here", build["reason"] or "yes"),
        ]
    else:
        rows.append(("native library", build["reason"]))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    return rows


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _backends() -> list[tuple[str, str]]:
    from layerskip_kernels.registry import backends

    rows = [
        (backend.name, f"available: {', '.join(backend.ops)}" if backend.available else f"not here: {backend.reason}")
        for backend in backends()
    ]
    if chosen := os.environ.get("LAYERSKIP_BACKEND"):
        rows.append(("LAYERSKIP_BACKEND", f"{chosen}, in place of auto"))
    return rows


def _choices(torch: Any, devices: list[Any]) -> list[tuple[str, ...]]:
    from layerskip_kernels.registry import OP_NAMES

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    choices = {device: {dtype: _auto(device, dtype) for dtype in dtypes} for device in devices}
    return [(op, *(_by_dtype(op, choices[device]) for device in devices)) for op in OP_NAMES]


def _auto(device: Any, dtype: Any) -> dict[str, str]:
    """What serves each op: for decoding's, what `registry.bind` gives a decoder, without its warnings."""
    from layerskip_kernels.registry import _AUTO, DECODE_OPS, OP_NAMES, why_not

    picks = {
        op: next((name for name in _AUTO.get(device.type, ()) if why_not(name, op, device, dtype) is None), "reference")
        for op in OP_NAMES
    }
    if len({picks[op] for op in DECODE_OPS}) > 1:
        picks["decoder_stack"] = "composed of the ops above"
    return picks


def _by_dtype(op: str, choices: dict[Any, dict[str, str]]) -> str:
    dtypes: dict[str, list[str]] = {}
    for dtype, picks in choices.items():
        dtypes.setdefault(picks[op], []).append(str(dtype).removeprefix("torch."))
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "; ".join(f"{backend} ({', '.join(names)})" for backend, names in dtypes.items())
