"""benchmarks/gpu.sh without a GPU: what it runs, in which order, and what it leaves behind; Python is pretended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/sh
case "$1" in
-c) echo 90 ;;
-) cat >/dev/null; [ -z "$NO_KERNELS" ] ;;
*)
    echo "$LAYERSKIP_CUDA_ARCHS" "$@" >>"$CALLS"
    case "$*" in
    *"decode_captured.py") [ "${LAYERSKIP_PDL:-1} ${LAYERSKIP_GRAPHS:-1}" = "$WORKS" ] || exit 1 ;;
    *$FAILS*) exit 3 ;;
    *$HANGS*) exec sleep 60 ;;
    esac
    echo "1 passed"
    ;;
esac
"""
SANITIZER = """#!/bin/sh
echo sanitizer "$@" "without caching: $PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$CALLS"
"""
FIRST_DECODES = [f"decode-cuda-1-{shape}-transformers" for shape in ("llama3.2-1b", "llama3-8b")]
pytestmark = pytest.mark.skipif(not shutil.which("timeout"), reason="needs GNU coreutils")


@pytest.fixture
def script(tmp_path):
    """Starts it with these arguments and variables, into tmp_path/out."""
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    nothing = dict.fromkeys(("NO_KERNELS", "LAYERSKIP_CUDA_ARCHS", "LAYERSKIP_PDL", "LAYERSKIP_GRAPHS"), "")
    nothing |= dict(WORKS="1 1")
    usual = dict(PYTHON=str(tmp_path / "python"), CALLS=str(tmp_path / "calls"), OUT=str(tmp_path / "out"))
    usual |= dict(PATH=f"{tmp_path}:{os.environ['PATH']}", FAILS="no call", HANGS="no call")

    def start(*arguments, **variables):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(
            [SCRIPT, *arguments],
            env=os.environ | nothing | usual | variables,
            # where tests run in the background, they may have been started with SIGINT ignored, which bash can't undo
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            **pipes,
        )

    return start


def finish(process):
    output, errors = process.communicate(timeout=100)
    return process.returncode, output, errors


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def kept(tmp_path):
    assert sorted(os.listdir(tmp_path / "out")) == ["results.tgz", "summary.txt"]
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        return {name.removeprefix("./") for name in archive.getnames()}


def test_the_most_telling_comes_first(script, tmp_path):
    code, _, errors = finish(script(str(tmp_path / "out")))
    assert code == 0, errors
    summary = (tmp_path / "out" / "summary.txt").read_text()
    runs = re.findall(r"^(\S+): exit code 0 after", summary, re.MULTILINE)
    decodes = [run for run in runs if run.startswith("decode-")]
    first = ["build", "check", "tests-cuda", "tests-triton", *FIRST_DECODES, "decode-cuda-1-llama3.2-1b-pdl0"]
    first += ["profile", "profile-pdl0", "bench_small_linear", "bench_verify_attention"]
    assert runs[: len(first)] == first
    sanitizer = [f"sanitizer-{tool}" for tool in ("memcheck", "racecheck", "synccheck")]
    assert ["bench_flex_attention", *decodes[3:], *sanitizer] == runs[runs.index("bench_flex_attention") :]
    assert len(decodes) == len(set(decodes)) == 3 * 4 * 2 + 4
    assert "test_kernels_decode.py: 1 passed, exit code 0" in summary
    assert {"tests-triton/test_rms_norm.log", *(f"{run}.log" for run in runs)} <= kept(tmp_path)


def test_what_is_called(script, tmp_path):
    code, _, errors = finish(script("", "tests", "decode", "sanitizer", JOBS="1"))
    assert code == 0, errors
    *others, memcheck, _, _ = calls(tmp_path)
    assert all(call.startswith("90 ") for call in others)  # the GPU's, as no architecture was asked for
    *tests, decode, _, _ = others
    assert " --backend cuda " in tests[0] and " --backend triton " in tests[-1]
    tests = [call.split()[-1] for call in tests]
    assert tests[: len(tests) // 2] == tests[len(tests) // 2 :]
    assert tests[:2] == ["tests/test_kernels_decode.py", "tests/test_decode_captured.py"]
    files = {f"tests/{path.name}" for path in Path(ROOT, "tests").glob("test_*.py") if "\nOP = " in path.read_text()}
    assert files - {"tests/test_exit_head_screen.py"} <= set(tests)  # which is about the CPU alone
    assert "--shape llama3.2-1b --device cuda --backend cuda --batch 1 --peers transformers --num_spec" in decode
    assert memcheck.startswith("sanitizer --tool memcheck") and memcheck.endswith(" without caching: 1")


def test_a_failure_ends_nothing_but_itself(script, tmp_path):
    code, _, errors = finish(script("", "benchmarks", FAILS="bench_small_linear"))  # OUT names the folder
    assert (code, errors) == (1, "failed: bench_small_linear\n")
    assert len(calls(tmp_path)) > 5
    code, _, errors = finish(script("", "tests", FAILS="cuda --junitxml"))
    assert (code, errors) == (1, "failed: tests-cuda\n")


@pytest.mark.parametrize(
    ("works", "tried", "left"),
    [
        ("1 1", ["check"], ""),
        ("0 1", ["check", "check-pdl0"], "-pdl0"),
        ("1 0", ["check", "check-pdl0", "check-graphs0"], "-graphs0"),
    ],
)
def test_what_decoding_fails_with_is_left_off(script, tmp_path, works, tried, left):
    """`works`: the values of LAYERSKIP_PDL and LAYERSKIP_GRAPHS with which it does, if another does not."""
    code, _, _ = finish(script("", "check", "decode", WORKS=works))
    assert code == (0 if len(tried) == 1 else 1)
    runs = re.findall(r"^(\S+): exit code", (tmp_path / "out" / "summary.txt").read_text(), re.MULTILINE)
    assert runs[: len(tried)] == tried
    assert runs[len(tried)] == f"decode-cuda-1-llama3.2-1b-transformers{left}"


def test_what_hangs_is_cut(script, tmp_path):
    code, _, errors = finish(script("", "decode", "profile", HANGS="llama3.2-1b*--batch", DECODE_SECONDS="0.5"))
    assert (code, errors) == (1, "failed: decode-cuda-1-llama3.2-1b-transformers decode-cuda-1-llama3.2-1b-pdl0\n")
    assert len(calls(tmp_path)) == 5
    code, output, errors = finish(script("", "tests", HANGS="cuda*test_kernels_decode", TESTS_SECONDS="0.5"))
    assert (code, errors) == (1, "failed: tests-cuda\n")
    assert re.search(r"^test_kernels_decode.py: .*exit code 124$", output, re.MULTILINE)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_killed_call_keeps_what_was_done(script, tmp_path, how):
    process = script("", "profile", "decode", HANGS="llama3-8b")
    while len(calls(tmp_path)) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    assert finish(process)[0] == 128 + how
    assert {"profile.log", *(f"{run}.log" for run in FIRST_DECODES)} <= kept(tmp_path)


def test_without_the_cuda_kernels_nothing_runs(script, tmp_path):
    assert finish(script("", "build", "tests", NO_KERNELS="1"))[0] == 1
    assert [call.split()[1] for call in calls(tmp_path)] == ["setup.py"]
    assert "build.log" in kept(tmp_path)


def test_says_what_is_missing(script, tmp_path):
    no_gpu = script("", PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert finish(no_gpu) == (1, "", "gpu.sh: torch finds no CUDA device\n")
    assert finish(script(OUT="")) == (2, "", "gpu.sh: name a folder for the results\n")
    code, _, errors = finish(script("", "test"))
    assert code == 2 and errors.startswith("gpu.sh: no step test, choose build, check, tests, ")
    assert not (tmp_path / "out").exists()
