"""`layerskip doctor`: what is installed, what was built, which backend runs here, and why the others don't."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerskip_kernels import __version__

PACKAGES = ("torch", "transformers", "safetensors", "triton")


@click.command(short_help="Show which backends work here, and why the others don't.")
def doctor() -> None:
    """Show what was built, which backends work here and why the others don't."""
    import torch

    console = Console(highlight=False)
    for title, rows in (
        ("Installation", _installation()),
        ("Processor", _processor(torch)),
        ("GPU", _gpus(torch)),
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
        *((name, _version(name)) for name in PACKAGES),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor(torch: Any) -> list[tuple[str, str]]:
    from layerskip_kernels.native import cpu_library

    rows = [
        ("model", _cpu_model()),
        ("threads", f"{torch.get_num_threads()} used, {os.cpu_count()} logical processors"),
    ]
    library, reason = cpu_library()
    if library is None:
        return [*rows, ("native library", reason)]
    build = library.build_info()
    return [
        *rows,
        ("native library", f"built by {build['compiler']}"),
        ("variant in use", _variant(library, build["variants"])),
        *((f"  {name}", library.why_variant_unsupported(name) or "runs here") for name in build["variants"]),
    ]


def _variant(library: Any, built: list[str]) -> str:
    try:
        active = library.active_variant()
    except ValueError as error:
        return f"none: {error}"
    if os.environ.get("LAYERSKIP_CPU_VARIANT"):
        return f"{active}, chosen by LAYERSKIP_CPU_VARIANT"
    return f"{active}, the fastest of {', '.join(built)} that runs here"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _gpus(torch: Any) -> list[tuple[str, str]]:
    from layerskip_kernels.native import cuda_library

    rows = [("torch built for CUDA", torch.version.cuda or "no")]
    library, reason = cuda_library()
    if library is None:
        rows.append(("native library", reason))
    else:
        build, report = library.build_info(), library.device_report()
        rows += [
            ("native library", f"built by {build['compiler']} for {build['archs']}"),
            ("driver supports CUDA", str(report["driver_version"] or "no driver")),
            ("devices", report["reason"] or str(len(report["devices"]))),
        ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    return rows


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
    """What `registry.bind` gives a decoder, without its warnings."""
    from layerskip_kernels.registry import _AUTO, OP_NAMES, why_not

    picks = {
        op: next((name for name in _AUTO.get(device.type, ()) if why_not(name, op, device, dtype) is None), "reference")
        for op in OP_NAMES
    }
    if len(set(picks.values())) > 1:
        picks["decoder_stack"] = "composed of the ops above"
    return picks


def _by_dtype(op: str, choices: dict[Any, dict[str, str]]) -> str:
    dtypes: dict[str, list[str]] = {}
    for dtype, picks in choices.items():
        dtypes.setdefault(picks[op], []).append(str(dtype).removeprefix("torch."))
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "; ".join(f"{backend} ({', '.join(names)})" for backend, names in dtypes.items())
