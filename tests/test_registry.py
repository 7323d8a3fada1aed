import logging
from types import SimpleNamespace

import pytest
import torch

import layerskip_kernels as lk
from layerskip_kernels import ops, registry
from layerskip_kernels.reference.decoder_stack import compose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Fake(SimpleNamespace):
    """A backend whose ops return its name; `down`: why it does not run here; `only`: the dtype it takes."""

    def __init__(self, name, op_names=registry.OP_NAMES, down=None, only=None):
        super().__init__(OPS={op: lambda *a, **k: name for op in op_names})
        self.down, self.only = down, only

    def why_unavailable(self):
        return self.down

    def why_unsupported(self, op, *, device, dtype):
        return None if self.only in (None, dtype) else f"it takes {self.only} only"


@pytest.fixture
def install(monkeypatch):
    """Replaces every backend: `install(cpu=Fake("cpu"), …)`; those not named are not part of the installation."""
    registry._warn_reference.cache_clear()

    def install(**backends):
        installed = {"reference": Fake("reference")} | backends
        monkeypatch.setattr(registry, "_backend", lambda name: installed.get(name, "not part of this version yet"))

    yield install
    registry._warn_reference.cache_clear()


# The backends of this machine


def test_native_cpu_and_reference_run_here():
    rows = {row.name: row for row in lk.backends()}
    assert list(rows) == ["cuda", "triton", "cpu", "reference"]
    assert rows["reference"].available and rows["reference"].ops == registry.OP_NAMES
    assert rows["cpu"].available, rows["cpu"].reason


def test_backends_prints_every_backend_with_its_ops_or_a_reason():
    report = lk.backends()
    lines = str(report).splitlines()
    assert repr(report) == str(report) and len(lines) == len(report)
    for line, row in zip(lines, report, strict=True):
        assert line.startswith(row.name)
        assert row.available == (row.reason is None)
        detail = line[len(row.name) :].strip()
        assert detail == (", ".join(row.ops) if row.available else f"not here: {row.reason}")
        assert len(detail) > 3


def test_backends_without_kernels_or_code(install):
    install(cpu=Fake("cpu", op_names=()), cuda=Fake("cuda", down="no CUDA device"))
    reasons = {row.name: row.reason for row in lk.backends()}
    assert reasons == dict(
        cuda="no CUDA device", triton="not part of this version yet", cpu="it has no kernels yet", reference=None
    )


@pytest.fixture
def other_triton(tmp_path, monkeypatch):
    """Puts the module that is written to this folder under this name in the Triton backend's place."""

    def put(name):
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(registry._MODULES, "triton", name)
        registry._backend.cache_clear()
        return registry.why_not("triton", "swiglu", CPU, torch.float32)

    yield put
    registry._backend.cache_clear()


def test_a_folder_without_code_is_no_backend(tmp_path, other_triton):
    """Python imports a leftover folder as an empty package."""
    (tmp_path / "leftover_backend").mkdir()
    assert other_triton("leftover_backend") == "not part of this version yet"


def test_a_missing_dependency_is_named(tmp_path, other_triton):
    (tmp_path / "backend_needing_more.py").write_text("import a_missing_dependency\n")
    assert other_triton("backend_needing_more") == "the package a_missing_dependency is not installed"


def test_a_dependency_that_is_too_old_is_a_reason(tmp_path, other_triton):
    """As Triton before 3.4, which has no `knobs`."""
    (tmp_path / "backend_ahead.py").write_text("from math import knobs\n")
    reason = other_triton("backend_ahead")
    assert reason.startswith("it can't be imported: cannot import name 'knobs' from 'math'")
    assert {row.name: row.reason for row in lk.backends()}["triton"] == reason


# auto


def test_auto_takes_the_best_for_the_device(install):
    install(**{name: Fake(name) for name in ("cuda", "triton", "cpu")})
    assert registry.select("swiglu", CUDA, torch.float32) == "cuda"
    assert registry.select("swiglu", CPU, torch.float32) == "cpu"
    install(cuda=Fake("cuda", down="driver too old"), triton=Fake("triton"), cpu=Fake("cpu"))
    assert registry.select("swiglu", CUDA, torch.float32) == "triton"
    install(cuda=Fake("cuda", op_names=("rms_norm",)), triton=Fake("triton"), cpu=Fake("cpu"))
    assert registry.select("rms_norm", CUDA, torch.float32) == "cuda"
    assert registry.select("swiglu", CUDA, torch.float32) == "triton"


def test_auto_depends_on_the_dtype(install):
    install(cuda=Fake("cuda", only=torch.bfloat16), triton=Fake("triton"))
    assert registry.select("swiglu", CUDA, torch.bfloat16) == "cuda"
    assert registry.select("swiglu", CUDA, torch.float32) == "triton"


def test_auto_falls_back_to_reference_with_one_warning(install, caplog):
    install(cpu=Fake("cpu", op_names=("rms_norm",)))
    with caplog.at_level(logging.WARNING, logger="layerskip_kernels"):
        for _ in range(3):
            assert registry.select("swiglu", CPU, torch.float32) == "reference"
        assert registry.select("rms_norm", CPU, torch.float32) == "cpu"
    (record,) = caplog.records
    assert record.getMessage() == "swiglu runs on the slow reference backend (cpu: it has no swiglu)"


def test_auto_on_an_unknown_device_type(install, caplog):
    install(cpu=Fake("cpu"))
    with caplog.at_level(logging.WARNING, logger="layerskip_kernels"):
        assert registry.select("swiglu", torch.device("meta"), torch.float32) == "reference"
    assert "no backend for device type 'meta'" in caplog.text


# An explicit choice


@pytest.mark.parametrize(
    ("backends", "reason"),
    [
        ({}, "not part of this version yet"),
        (dict(cpu=Fake("cpu", down="no such instruction")), "no such instruction"),
        (dict(cpu=Fake("cpu", op_names=())), "it has no swiglu"),
        (dict(cpu=Fake("cpu", only=torch.float16)), "it takes torch.float16 only"),
    ],
    ids=["missing", "down", "op", "dtype"],
)
def test_explicit_backend_raises_with_the_reason(install, backends, reason):
    install(**backends)
    x = torch.ones(2, 8)
    message = rf"^backend 'cpu' can't run swiglu \(torch.float32 on cpu\): {reason}$"
    with lk.use_backend("cpu"), pytest.raises(lk.BackendUnavailable, match=message):
        ops.swiglu(x, x)
    with pytest.raises(lk.BackendUnavailable, match=message):
        registry.select("swiglu", CPU, torch.float32, "cpu")


def test_explicit_backend_is_used(install):
    install(cpu=Fake("cpu"), triton=Fake("triton"))
    x = torch.ones(2, 8)
    for name in ("triton", "reference", "cpu"):
        with lk.use_backend(name):
            assert ops.swiglu(x, x) == name
    assert ops.swiglu(x, x) == "cpu"


def test_use_backend_nests_and_ends_with_an_exception(install):
    install(cpu=Fake("cpu"), triton=Fake("triton"))
    with lk.use_backend("triton"):
        with lk.use_backend("reference"):
            assert registry.choice() == "reference"
            with lk.use_backend("auto"):
                assert registry.select("swiglu", CPU, torch.float32) == "cpu"
        with pytest.raises(KeyError), lk.use_backend("cpu"):
            raise KeyError
        assert registry.choice() == "triton"
        assert registry.choice("cpu") == "cpu"
    assert registry.choice() == "auto"


def test_environment_variable(install, monkeypatch):
    install(cpu=Fake("cpu"), triton=Fake("triton"))
    x = torch.ones(2, 8)
    monkeypatch.setenv("LAYERSKIP_BACKEND", "triton")
    assert ops.swiglu(x, x) == "triton"
    with lk.use_backend("reference"):
        assert ops.swiglu(x, x) == "reference"
    assert registry.choice("cpu") == "cpu"
    monkeypatch.setenv("LAYERSKIP_BACKEND", "cuda")
    with pytest.raises(lk.BackendUnavailable, match="not part of this version yet"):
        ops.swiglu(x, x)
    monkeypatch.setenv("LAYERSKIP_BACKEND", "")
    assert registry.choice() == "auto"


def test_unknown_names_list_the_choices(monkeypatch):
    choices = "choose auto, cuda, triton, cpu, reference$"
    with pytest.raises(ValueError, match=f"^backend='gpu': {choices}"), lk.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match=f"^backend='CPU': {choices}"):
        registry.bind(CPU, torch.float32, "CPU")
    monkeypatch.setenv("LAYERSKIP_BACKEND", "fast")
    with pytest.raises(ValueError, match=f"^LAYERSKIP_BACKEND='fast': {choices}"):
        registry.choice()


# bind


def test_bind_resolves_every_op_once(install):
    install(cpu=Fake("cpu"))
    bound = registry.bind(CPU, torch.float32)
    assert bound.backends == dict.fromkeys(registry.DECODE_OPS, "cpu")
    install(triton=Fake("triton"))
    for op in registry.DECODE_OPS:
        assert getattr(bound, op)() == "cpu"
    assert not hasattr(bound, "early_exit_cross_entropy")


def test_bind_composes_where_the_backend_has_no_decoder_stack(install):
    without = [op for op in registry.DECODE_OPS if op != "decoder_stack"]
    install(cpu=Fake("cpu", op_names=without))
    bound = registry.bind(CPU, torch.float32)
    assert bound.backends["decoder_stack"] == "composed"
    assert bound.decoder_stack.func is compose and bound.decoder_stack.args == (bound,)


def test_bind_composes_where_ops_come_from_several_backends(install):
    install(cpu=Fake("cpu", op_names=("rms_norm", "decoder_stack")))
    bound = registry.bind(CPU, torch.float32)
    assert (bound.backends["rms_norm"], bound.backends["swiglu"]) == ("cpu", "reference")
    assert bound.backends["decoder_stack"] == "composed"


def test_bind_to_a_backend_that_lacks_an_op_raises(install):
    install(cpu=Fake("cpu", op_names=("rms_norm",)))
    with pytest.raises(lk.BackendUnavailable, match=r"backend 'cpu' can't run small_linear .*: it has no small_linear"):
        registry.bind(CPU, torch.float32, "cpu")


def test_every_op_is_public_and_in_the_reference():
    assert set(registry.OP_NAMES) == {n for n in ops.__all__ if n[0].islower()} - {
        "quantize",
        "dequantize",
        "head_screen",
    }
    for op in registry.OP_NAMES:
        assert registry.why_not("reference", op, CPU, torch.float32) is None
        assert getattr(ops, op).__doc__
