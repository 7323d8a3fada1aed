"""The command `layerskip` as a whole, and `layerskip doctor`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import layerskip_kernels as lk
from layerskip_kernels import registry
from layerskip_kernels.cli import app
from layerskip_kernels.cli.doctor import _auto, _gpus


def test_help_comes_without_torch_and_transformers():
    code = (
        "import sys; from layerskip_kernels.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('heavy:', {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    for arguments in (
        ["--help"],
        ["generate", "--help"],
        ["doctor", "--help"],
        ["train", "--help"],
        ["inspect", "--help"],
        ["correctness", "--help"],
        ["--version"],
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("heavy: set()\n")


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "layerskip_kernels", "--version"], capture_output=True, text=True)
    assert done.stdout == f"layerskip {lk.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "layerskip_kernels", "genrate"], capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        "No such command 'genrate', choose from benchmark, correctness, doctor, eval, generate, inspect, sweep, train, "
        "tune." in done.stderr
    )


def test_doctor_says_what_every_backend_and_op_does_here():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    for backend in lk.backends():
        assert f" {backend.name} " in result.stdout
        assert backend.reason is None or backend.reason in result.stdout
    for op in registry.OP_NAMES:
        assert f" {op} " in result.stdout
    assert lk.__version__ in result.stdout and "torch" in result.stdout and "transformers" in result.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_doctor_names_the_backends_a_decoder_gets(dtype, monkeypatch):
    monkeypatch.setattr(registry, "_warn_reference", lambda op, reasons: None)
    bound = registry.bind(torch.device("cpu"), getattr(torch, dtype), "auto").backends
    shown = _auto(torch.device("cpu"), getattr(torch, dtype))
    bound["decoder_stack"] = bound["decoder_stack"].replace("composed", "composed of the ops above")
    assert {op: shown[op] for op in bound} == bound
    assert shown["early_exit_cross_entropy"] == "cpu"


def test_doctor_tells_a_gpu_build_without_a_driver():
    build = {"compiler": "NVIDIA 13.0.88", "archs": "80;90;100", "runtime_version": 13000, "driver_version": 0}
    rows = dict(_gpus(torch, {**build, "reason": "no CUDA driver"}))
    assert rows["native library"] == "built by NVIDIA 13.0.88 for 80;90;100"
    assert (rows["built with CUDA"], rows["driver supports CUDA"]) == ("13.0", "no driver")
    assert rows["runs here"] == "no CUDA driver"
    assert dict(_gpus(torch, {**build, "driver_version": 12080, "reason": None}))["driver supports CUDA"] == "12.8"
