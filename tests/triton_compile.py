"""Compile the Triton kernels for GPUs that need not be there, and measure what came out.

    python tests/triton_compile.py OP …        compiles every case of tests/triton_cases/OP.py, prints a JSON report

Runs in a process of its own: where TRITON_INTERPRET is set, kernels can't be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes per block (CUDA programming guide, table 27)
MATRIX = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}
TOUCHES = r"\b(ld|st|atom|red)\.global|\bcp\.async|\bbra\b|\bret\b"  # memory, or leaves
WIDE = r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.c[ag]\.shared\.global.*0x10|cp\.async\.bulk"


@dataclass
class Case:
    """One specialisation of a kernel, as a launcher makes it."""

    name: str
    fn: object  # the @triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "fp32"; what is left out is constexpr
    constexprs: dict[str, object]
    divisible: tuple[str, ...] = ()  # arguments whose values divide by 16
    num_warps: int = 4
    num_stages: int = 3
    mma: bool = False  # products run on matrix instructions
    wide: bool = False  # global memory is read 16 bytes at a time
    ones: tuple[str, ...] = ()  # integer arguments that are 1 (Triton makes constants of them)
    enable_fp_fusion: bool = False
    stack: int = 0  # bytes of values that registers may lack room for
    without: str = ""  # instructions that it must not have, a regular expression


def build(case: Case, arch: int):
    """The compiled kernel of `case` for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.fn.arg_names
    constexprs = {**case.constexprs, **{n: 1 for n in case.ones}}
    if "OVERLAP" in names:  # as `launch.round_options` has it
        constexprs["OVERLAP"] = arch >= 90
    signature = {n: "constexpr" if n in constexprs else case.signature[n] for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible if n not in constexprs}
    source = ASTSource(case.fn, signature, constexprs=constexprs, attrs=attrs)
    options = dict(num_warps=case.num_warps, num_stages=case.num_stages, enable_fp_fusion=case.enable_fp_fusion)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def specialisations(case: Case) -> Iterator[Case]:
    """What Triton may make of `case` for other values: alignment gained or lost, integers of 1, strides of 64 bits."""
    params = {p.name: p for p in case.fn.params}
    free = [n for n in case.signature if not params[n].do_not_specialize]
    pointers = [n for n in free if case.signature[n].startswith("*")]
    integers = [n for n in case.signature if case.signature[n] in ("i32", "i64")]
    if movable := [n for n in free if n in case.divisible]:
        kept = tuple(n for n in case.divisible if n not in movable)
        yield replace(case, name=f"{case.name}, nothing aligned", divisible=kept)
    if other := [n for n in (*pointers, *(n for n in integers if n in free)) if n not in case.divisible]:
        yield replace(case, name=f"{case.name}, everything aligned", divisible=(*case.divisible, *other))
    if ones := tuple(n for n in integers if n in free):
        yield replace(case, name=f"{case.name}, ones", ones=ones)
    wide = {n: "i64" if n.startswith("stride") else kind for n, kind in case.signature.items()}
    if wide != case.signature:
        yield replace(case, name=f"{case.name}, 64-bit strides", signature=wide)


def arithmetic(kernel) -> dict[str, int]:
    """What decides a result's bits: how often each floating-point operation occurs, and for those that combine several
    elements (reductions, scans, matrix products) the layout, which is the order of the sum."""
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    found: Counter[str] = Counter()
    region = None  # of a reduction: its operations, until the line with its type
    for line in text.splitlines():
        line = line.split(" loc(")[0]
        operation = re.search(r"\"?((?:arith|math|tt|ttng)\.[\w.]+)\"?", line)
        name = operation.group(1) if operation else ""
        if name in ("tt.reduce", "tt.scan"):
            region = [name + " " + re.search(r"axis = (\d+)", line).group(1)]
        elif region is not None and line.lstrip().startswith("})"):
            # Maxima and integer sums have no order, nor has a sum of one or two terms.
            terms = _reduced_size(line, region)
            if terms > 2 and any(op in ("arith.addf", "arith.mulf", "math.fma") for op in region):
                found[" ".join(region) + _with_layouts(line, layouts)] += 1
            else:
                found[" ".join(region) + f" of {terms}"] += 1
            region = None
        elif region is not None:
            region.append(name)
        elif name in ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma"):
            found[name + _with_layouts(line, layouts)] += 1
        elif re.match(r"arith\.(add|sub|mul|div|rem|max|min|trunc|ext|maximum|minimum|maxnum|minnum)f$", name) or (
            name.startswith("math.") or name == "tt.extern_elementwise"
        ):
            found[name] += 1
    return dict(found)


def _reduced_size(line: str, region: list[str]) -> int:
    """How many elements each result of the reduction, whose last line this is, combines."""
    shape = re.search(r"tensor<((?:\d+x)+)", line[line.rfind(" : ") :]).group(1).split("x")
    return int(shape[int(region[0].rsplit(" ", 1)[1])])


def _with_layouts(line: str, layouts: dict[str, str]) -> str:
    """The type part of `line` with its layouts spelled out."""
    return re.sub(r"#\w+", lambda m: layouts.get(m.group(), m.group()), line[line.rfind(" : ") :])


def resources(kernel, folder: str) -> dict[str, int]:
    """REG, STACK, LOCAL of the binary, from the cuobjdump that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary = Path(folder) / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([tool, "--dump-resource-usage", binary], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def report(op: str) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in import_module(f"triton_cases.{op}").CASES:
            for arch in ARCHS:
                kernel = build(case, arch)
                ptx = kernel.asm["ptx"]
                row = dict(op=op, case=case.name, arch=arch, **resources(kernel, folder), shared=kernel.metadata.shared)
                row["mma"], row["wide"] = len(re.findall(MATRIX[arch], ptx)), len(re.findall(WIDE, ptx))
                row["problems"] = problems(case, row)
                if "OVERLAP" in case.fn.arg_names:
                    wait, touched = ptx.find("griddepcontrol.wait"), re.search(TOUCHES, ptx).start()
                    if not (0 <= wait < touched if arch >= 90 else wait < 0):
                        row["problems"].append("it does not wait for the kernels in front first")
                if case.without and (found := re.search(case.without, ptx)):
                    row["problems"].append(f"it has {found.group()}")
                if arch == 90:
                    mine = arithmetic(kernel)
                    for other in specialisations(case):
                        if (theirs := arithmetic(build(other, arch))) != mine:
                            changed = sorted(set(mine.items()) ^ set(theirs.items()))
                            row["problems"].append(f"{other.name}: other arithmetic, {changed}")
                rows.append(row)
    return rows


def problems(case: Case, row: dict) -> list[str]:
    found = []
    if row["STACK"] > case.stack or row["LOCAL"]:
        found.append(f"spills: STACK {row['STACK']}, LOCAL {row['LOCAL']}")
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory, the part has {SHARED_LIMIT[row['arch']]}")
    if case.mma and not row["mma"]:
        found.append("no matrix instruction")
    if case.wide and not row["wide"]:
        found.append("no 16-byte load")
    return found


if __name__ == "__main__":
    # The cases import `triton_compile`: that must be this module, not a second copy of it.
    sys.modules["triton_compile"] = sys.modules["__main__"]
    json.dump([row for op in sys.argv[1:] for row in report(op)], sys.stdout, indent=1)
