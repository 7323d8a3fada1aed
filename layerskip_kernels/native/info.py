"""What was built, and what of it runs here."""

from __future__ import annotations

import os

import torch

from layerskip_kernels.native import cpu, cpu_library, cuda, cuda_library


def build_report() -> dict:
    """Facts for `layerskip doctor`.

    Returns:
        {"cpu": {"available", "reason", "version", "compiler", "flags", "active_variant", "active_because", "threads",
                 "variants": {name: None or why it does not run here}},
         "cuda": {"available", "reason", "built", "compiler", "archs", "runtime_version", "driver_version", "devices"}}
        Keys about a library that does not load are absent.
    """
    return {"cpu": _cpu_report(), "cuda": _cuda_report()}


def _cpu_report() -> dict:
    reason = cpu.why_unavailable()
    report = {"available": reason is None, "reason": reason, "threads": torch.get_num_threads()}
    library, _ = cpu_library()
    if library is None:
        return report
    built = library.build_info()
    report.update({key: built[key] for key in ("version", "compiler", "flags")})
    report["variants"] = {name: library.why_variant_unsupported(name) or None for name in built["variants"]}
    if reason is None:
        named = os.environ.get("LAYERSKIP_CPU_VARIANT")
        report["active_variant"] = library.active_variant()
        report["active_because"] = (
            f"LAYERSKIP_CPU_VARIANT={named}" if named else "the fastest variant this processor and operating system run"
        )
    return report


def _cuda_report() -> dict:
    reason = cuda.why_unavailable()
    report = {"available": reason is None, "reason": reason}
    if cpu_library()[0] is not None:
        report["built"] = cpu_library()[0].build_info()["cuda"]
    library, _ = cuda_library()
    if library is not None:
        built, found = library.build_info(), library.device_report()
        report.update({"compiler": built["compiler"], "archs": built["archs"]})
        report.update({key: found[key] for key in ("runtime_version", "driver_version", "devices")})
    return report
