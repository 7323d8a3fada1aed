"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from layerskip_kernels import __version__

PACKAGES = ("torch", "transformers", "triton", "numpy")


def environment(decoder: Any) -> dict[str, Any]:
    """Versions, machine, and how the model runs on it."""
    import torch

    machine = {"cpu": cpu_model(), "cpu_variant": cpu_variant()}
    machine |= {"logical_processors": os.cpu_count(), "threads": torch.get_num_threads()}
    if decoder.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(decoder.device)
    versions = {name: version(name) for name in PACKAGES}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"layerskip_kernels": __version__, "python": platform.python_version(), **versions},
        "machine": {"system": platform.platform(), **machine},
        "decoder": {
            "device": str(decoder.device),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "layers": decoder.config.num_layers,
            "exit_layer": decoder.exit_layer,
            "num_speculations": decoder.num_speculations,
            "draft_layers": decoder.draft_layers,
            "draft_head": decoder.draft_head,
            "head_screen": decoder.head_screen,
            "max_batch_size": decoder.max_batch_size,
            "backends": dict(decoder.ops.backends),
        },
    }


def version(name: str) -> str | None:
    """Of an installed package; None when it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def cpu_variant() -> str | None:
    """The instruction set that the CPU kernels use; None where their library does not load."""
    from layerskip_kernels.native.info import build_report

    return build_report()["cpu"].get("active_variant")
