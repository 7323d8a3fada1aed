"""Instructions of PTX as lines of C++ (ptx_to_cpp.py): a method `op_…` for each that is no infix operator of C++."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

CPP = {
    **{f"{kind}{bits}": f"{'' if kind == 's' else 'u'}int{bits}_t" for kind in "usb" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
BYTES = {name: int(name[1:]) // 8 for name in CPP if name != "pred"}
SPECIAL = {
    **{f"%tid.{axis}": f"shim::current->index.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"blockIdx.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"blockDim.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"gridDim.{axis}" for axis in "xyz"},
}
COMPARISONS = {
    **{"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
    **{"lo": "<", "ls": "<=", "hi": ">", "hs": ">="},
}
INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "div": "/", "rem": "%"}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
ROUND = {"rzi": "std::trunc", "rni": "std::nearbyint", "rmi": "std::floor", "rpi": "std::ceil"}


@dataclass
class Kernel:
    name: str
    symbols: dict[str, str]  # name -> its address in C++
    registers: dict[str, str] = field(default_factory=dict)  # name -> C++ type
    lines: list[str] = field(default_factory=list)
    own_bytes: int = 0


def split(text: str) -> list[str]:
    """Operands: what commas part outside of braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text)] if text else []


def variable(register: str) -> str:
    return register.replace("%", "v_")


class Translator:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def value(self, operand: str, kind: str) -> str:
        """An operand as a C++ value of PTX type `kind`."""
        cpp = CPP[kind]
        if operand.startswith("!"):
            return f"!{self.value(operand[1:], kind)}"
        if operand in SPECIAL:
            return f"ptx::as<{cpp}>({SPECIAL[operand]})"
        if operand.startswith("%"):
            same = self.kernel.registers[operand] == cpp
            return variable(operand) if same else f"ptx::as<{cpp}>({variable(operand)})"
        if match := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", operand):
            return f"ptx::as<{cpp}>(uint{32 if match[1] == 'f' else 64}_t(0x{match[2]}))"
        if re.fullmatch(r"-?\d+|-?0x[0-9A-Fa-f]+U?", operand):
            return f"{cpp}({operand.rstrip('U')}{'ll' if operand.startswith('-') else 'ull'})"
        if operand in self.kernel.symbols:
            return f"{cpp}({self.kernel.symbols[operand]})"
        raise ValueError(f"operand {operand!r} in {self.kernel.name}")

    def store(self, register: str, kind: str, value: str) -> str:
        if register == "_":
            return f"(void)({value});"
        cpp = self.kernel.registers[register]
        return f"{variable(register)} = {value if cpp == CPP[kind] else f'ptx::as<{cpp}>({CPP[kind]}({value}))'};"

    def address(self, operand: str, space: str, size: int, filled: str = "") -> str:
        """A pointer to `size` bytes, of which `filled` are read."""
        base, _, offset = operand.strip("[]").replace(" ", "").partition("+")
        if space == "shared":
            return f"own.at({self.value(base, 'u32')}{f' + uint32_t({offset})' if offset else ''}, {size})"
        at = f"{self.value(base, 'u64')}{f' + int64_t({offset})' if offset else ''}"
        return f"ptx::source({at}, {size}, {filled})" if filled else f"ptx::global({at}, {size})"

    def vector(self, operand: str) -> list[str]:
        return split(operand[1:-1]) if operand.startswith("{") else [operand]

    def instruction(self, opcode: str, operands: list[str]) -> str:
        name, *rest = opcode.split(".")
        handler: Callable | None = getattr(self, f"op_{name}", None)
        if handler is not None:
            return handler(rest, operands)
        if name in INFIX:
            return self.infix(name, rest, operands)
        raise ValueError(f"instruction {opcode} {operands} in {self.kernel.name}")

    def infix(self, name: str, rest: list[str], operands: list[str]) -> str:
        kind = rest[-1]
        if kind == "f32x2":
            assert rest == ["rn", "f32x2"], rest
            return self.both(f"a {INFIX[name]} b", operands)
        if kind in HALVES and rest[:-1] == ["rn"]:
            assert name == "add", name
            one, bits = kind.removesuffix("x2"), "u32" if kind.endswith("x2") else "u16"
            return self.call(f"ptx::add_halves<lk::{one}>", bits, operands)
        if kind in HALVES:
            assert (name, rest[:-1]) == ("add", ["rn", "f32"]), (name, rest)
            d, a, c = operands
            return self.store(d, "f32", f"{self.half(a, kind)} + {self.value(c, 'f32')}")
        assert set(rest[:-1]) <= {"rn", "lo", "wide", "full"} or (name, rest) == ("add", ["rz", "f32"]), (name, rest)
        d, a, b = operands
        if "rz" in rest:
            return self.store(d, kind, f"ptx::add_rz({self.value(a, kind)}, {self.value(b, kind)})")
        if "wide" in rest:
            wide = self.wide(kind)
            return self.store(d, wide, f"{CPP[wide]}({self.value(a, kind)}) * {CPP[wide]}({self.value(b, kind)})")
        # Signed sums and products wrap around.
        work = kind.replace("s", "u") if name in ("add", "sub", "mul") else kind
        return self.store(d, work, f"{self.value(a, work)} {INFIX[name]} {self.value(b, work)}")

    def op_mul(self, rest, operands):
        if rest[0] == "hi":
            return self.call("ptx::mul_hi", rest[-1], operands)
        return self.infix("mul", rest, operands)

    def call(self, function: str, kind: str, operands: list[str], kinds: tuple[str, ...] = ()) -> str:
        d, *sources = operands
        kinds = kinds or (kind,) * len(sources)
        return self.store(
            d, kind, f"{function}({', '.join(self.value(s, k) for s, k in zip(sources, kinds, strict=True))})"
        )

    def op_mov(self, rest, operands):
        kind, (d, a) = rest[-1], operands
        if a.startswith("{"):
            parts = self.vector(a)
            part = f"u{int(kind[1:]) // len(parts)}"
            joined = " | ".join(
                f"{CPP['u' + kind[1:]]}({self.value(p, part)}) << {i * int(part[1:])}" for i, p in enumerate(parts)
            )
            return self.store(d, "u" + kind[1:], joined)
        if d.startswith("{"):
            parts = self.vector(d)
            part = f"u{int(kind[1:]) // len(parts)}"
            whole = self.value(a, "u" + kind[1:])
            return " ".join(self.store(p, part, f"{whole} >> {i * int(part[1:])}") for i, p in enumerate(parts))
        return self.store(d, kind, self.value(a, kind))

    def op_cvta(self, rest, operands):
        assert rest == ["to", "global", "u64"], rest
        return self.op_mov(["u64"], operands)

    def op_cvt(self, rest, operands):
        (d, *sources), (*how, to, source) = operands, rest
        if to in HALVES:  # one value, or two, the second one below
            assert (how, source) == (["rn"], "f32"), rest
            values = [f"lk::from_float<lk::{to.removesuffix('x2')}>({self.value(s, 'f32')}).bits" for s in sources]
            return self.store(d, "u32" if len(values) == 2 else "u16", " << 16 | ".join(values))
        (a,) = sources
        if source in HALVES:
            assert not how and to == "f32", rest
            return self.store(d, "f32", self.half(a, source))
        value = self.value(a, source)
        if how == ["sat"]:
            assert to == source == "f32", rest
            value = f"ptx::saturate({value})"
        elif source[0] == "f" and how and how[0] in ROUND:
            value = f"{ROUND[how[0]]}({value})"
        else:
            assert how in ([], ["rn"]), rest
        return self.store(d, to, value)

    def op_setp(self, rest, operands):
        comparison, kind, (d, a, b) = rest[0], rest[-1], operands
        assert len(rest) == 2, rest
        a, b = self.value(a, kind), self.value(b, kind)
        if comparison in ("num", "nan"):
            unordered = f"({a} != {a} || {b} != {b})"
            return self.store(d, "pred", unordered if comparison == "nan" else f"!{unordered}")
        if kind[0] == "f":
            if comparison == "ne":
                return self.store(d, "pred", f"{a} < {b} || {a} > {b}")
            if comparison.endswith("u") and comparison[:-1] in COMPARISONS:
                base = comparison[:-1]
                return self.store(d, "pred", f"({a} != {a}) || ({b} != {b}) || {a} {COMPARISONS[base]} {b}")
        return self.store(d, "pred", f"{a} {COMPARISONS[comparison]} {b}")

    def op_selp(self, rest, operands):
        kind, (d, a, b, p) = rest[-1], operands
        return self.store(d, kind, f"{self.value(p, 'pred')} ? {self.value(a, kind)} : {self.value(b, kind)}")

    def op_not(self, rest, operands):
        kind, (d, a) = rest[-1], operands
        return self.store(d, kind, f"{'!' if kind == 'pred' else '~'}{self.value(a, kind)}")

    def op_neg(self, rest, operands):
        kind, (d, a) = rest[-1], operands
        return self.store(
            d, kind, f"-{self.value(a, kind)}" if kind[0] == "f" else f"0 - {self.value(a, 'u' + kind[1:])}"
        )

    def op_abs(self, rest, operands):
        assert rest[:-1] in ([], ["ftz"]), rest
        (d, a), kind = operands, rest[-1]
        return self.store(d, kind, f"std::fabs({self.flushed(a) if 'ftz' in rest else self.value(a, kind)})")

    def op_shl(self, rest, operands):
        return self.call("ptx::shl", rest[-1], operands, (rest[-1], "u32"))

    def op_shr(self, rest, operands):
        return self.call("ptx::shr", rest[-1], operands, (rest[-1], "u32"))

    def op_min(self, rest, operands):
        return self.extreme("min", rest, operands)

    def op_max(self, rest, operands):
        return self.extreme("max", rest, operands)

    def extreme(self, name: str, rest: list[str], operands: list[str]) -> str:
        kind, (d, first, *others) = rest[-1], operands
        assert len(rest) == 1, rest
        value = self.value(first, kind)
        for other in others:
            value = f"{f'std::f{name}' if kind[0] == 'f' else name}({value}, {self.value(other, kind)})"
        return self.store(d, kind, value)

    def op_mad(self, rest, operands):
        kind, (d, a, b, c) = rest[-1], operands
        to = self.wide(kind) if rest[0] == "wide" else kind
        a, b = (f"{CPP[to]}({self.value(operand, kind)})" for operand in (a, b))
        work = CPP[to.replace("s", "u")]
        return self.store(d, to, f"{work}({a}) * {work}({b}) + {self.value(c, to.replace('s', 'u'))}")

    def wide(self, kind: str) -> str:
        return f"{kind[0]}{2 * int(kind[1:])}"

    def half(self, operand: str, kind: str) -> str:
        return f"lk::to_float(lk::{kind}{{{self.value(operand, 'u16')}}})"

    def both(self, expression: str, operands: list[str]) -> str:
        """An expression of a, b, … on the two floats of each 64-bit register."""
        d, *sources = operands
        parameters = ", ".join(f"float {name}" for name in "abc"[: len(sources)])
        values = ", ".join(self.value(source, "u64") for source in sources)
        return self.store(d, "u64", f"ptx::both([]({parameters}) {{ return {expression}; }}, {values})")

    def op_fma(self, rest, operands):
        how, kind = rest[:-1], rest[-1]
        if kind == "f32x2":
            return self.both("std::fma(a, b, c)", operands)
        if kind in HALVES:
            d, a, b, c = operands
            product = f"{self.half(a, kind)}, {self.half(b, kind)}"
            if how == ["rn", "f32"]:
                return self.store(d, "f32", f"std::fma({product}, {self.value(c, 'f32')})")
            assert how == ["rn"], rest
            return self.store(d, "u16", f"lk::from_float<lk::{kind}>(std::fma({product}, {self.half(c, kind)})).bits")
        if how == ["rn", "ftz"]:
            d, *sources = operands
            return self.store(d, kind, f"ptx::flush(std::fma({', '.join(self.flushed(s) for s in sources)}))")
        assert how == ["rn"] or rest == ["rm", "f32"], rest
        return self.call("ptx::fma_rm" if how == ["rm"] else "std::fma", kind, operands)

    def flushed(self, operand: str) -> str:
        return f"ptx::flush({self.value(operand, 'f32')})"

    def op_sqrt(self, rest, operands):
        assert rest[0] == "rn", rest
        return self.call("std::sqrt", rest[-1], operands)

    def op_rcp(self, rest, operands):
        kind, (d, a) = rest[-1], operands
        value = f"1 / {self.value(a, kind)}"
        return self.store(d, kind, f"ptx::flush({value})" if "ftz" in rest else value)

    def op_rsqrt(self, rest, operands):
        assert rest == ["approx", "ftz", "f32"], rest
        d, a = operands
        return self.store(d, "f32", f"1 / std::sqrt({self.flushed(a)})")

    def op_ex2(self, rest, operands):
        (d, a), flush = operands, "ptx::flush" if "ftz" in rest else ""
        return self.store(d, "f32", f"{flush}(std::exp2({flush}({self.value(a, 'f32')})))")

    def op_copysign(self, rest, operands):
        d, a, b = operands  # the sign of a
        return self.store(d, "f32", f"std::copysign({self.value(b, 'f32')}, {self.value(a, 'f32')})")

    def op_brev(self, rest, operands):
        return self.call("ptx::brev", "u32", operands)

    def op_bfi(self, rest, operands):
        return self.call("ptx::bfi", "u32", operands)

    def op_bfe(self, rest, operands):
        return self.call("ptx::bfe", rest[0], operands, (rest[0], "u32", "u32"))

    def op_prmt(self, rest, operands):
        assert rest == ["b32"], rest
        return self.call("ptx::prmt", "u32", operands)

    def op_popc(self, rest, operands):
        return self.call("__builtin_popcount", "u32", operands)

    def op_redux(self, rest, operands):
        assert rest[0] == "sync" and rest[1] in ("add", "min", "max") and len(rest) == 3, rest
        return self.call(f"ptx::redux<ptx::Fold::{rest[1]}>", rest[2], operands, (rest[2], "u32"))

    def op_shf(self, rest, operands):
        assert rest == ["l", "wrap", "b32"], rest
        return self.call("ptx::shf_l_wrap", "u32", operands)

    def op_bfind(self, rest, operands):
        assert rest == ["shiftamt", "u32"], rest
        return self.call("ptx::bfind_shiftamt", "u32", operands)

    def op_ld(self, rest, operands):
        space, kind, (targets, source) = rest[0], rest[-1], operands
        space = space if space in ("global", "shared", "param") else "generic"
        assert set(rest[1:-1]) <= {"nc", "v2", "v4", "L1::no_allocate", "L2::256B"}, rest
        registers = self.vector(targets)
        size = BYTES[kind]
        at = self.address(source, space, size * len(registers))
        loads = [self.store(r, kind, f"ptx::load<{CPP[kind]}>(at + {i * size})") for i, r in enumerate(registers)]
        return f"{{ const char* at = static_cast<char*>({at}); {' '.join(loads)} }}"

    def op_st(self, rest, operands):
        space, kind, (target, sources) = rest[0], rest[-1], operands
        assert set(rest[1:-1]) <= {"v2", "v4"}, rest
        registers = self.vector(sources)
        size = BYTES[kind]
        at = self.address(target, space, size * len(registers))
        stores = [f"ptx::store<{CPP[kind]}>(at + {i * size}, {self.value(r, kind)});" for i, r in enumerate(registers)]
        return f"{{ char* at = static_cast<char*>({at}); {' '.join(stores)} }}"

    def op_atom(self, rest, operands):
        assert rest == ["shared", "add", "u32"], rest
        d, at, value = operands
        address = f"static_cast<uint32_t*>({self.address(at, 'shared', 4)})"
        return self.store(d, "u32", f"atomicAdd({address}, {self.value(value, 'u32')})")

    def op_cp(self, rest, operands):
        assert rest[0] == "async", rest
        if rest[1] == "commit_group":
            return "lk::cuda::copy_async_commit();"
        if rest[1] == "wait_group":
            return f"lk::cuda::copy_async_wait<{operands[0]}>();"
        assert rest[1] in ("ca", "cg") and rest[2:4] == ["shared", "global"], rest
        to, source, size = operands[0], operands[1], int(operands[2], 0)
        filled = self.value(operands[3] if len(operands) > 3 else operands[2], "u32")
        to, source = self.address(to, "shared", size), self.address(source, "global", size, filled)
        return f"shim::current->copies.push_back({{{to}, {source}, {size}, int({filled})}});"

    def op_shfl(self, rest, operands):
        assert rest[0] == "sync" and rest[2] == "b32", rest
        (d, _, p), sources = operands[0].partition("|"), [self.value(o, "u32") for o in operands[1:]]
        sources += [f"&{variable(p)}"] if p else []
        return self.store(d, "u32", f"ptx::shfl<ptx::Lane::{rest[1]}>({', '.join(sources)})")

    def op_vote(self, rest, operands):
        assert rest == ["sync", "ballot", "b32"], rest
        return self.call("ptx::ballot", "u32", operands, ("pred", "u32"))

    def op_bar(self, rest, operands):
        assert rest in (["sync"], ["warp", "sync"]), rest
        return f"ptx::bar_{'_'.join(rest)}({self.value(operands[0], 'u32')});"

    def op_griddepcontrol(self, rest, operands):
        wait = rest == ["wait"]
        assert wait or rest == ["launch_dependents"], rest
        return f"lk::cuda::{'wait_for_previous_kernels' if wait else 'allow_next_kernel'}();"

    def op_mma(self, rest, operands):
        assert rest[:5] == ["sync", "aligned", "m16n8k16", "row", "col"], rest
        assert rest[5] == rest[8] == "f32" and rest[6] == rest[7] in ("f16", "bf16"), rest
        d, a, b, c = map(self.vector, operands)
        sources = [
            f"{{{', '.join(self.value(r, kind) for r in registers)}}}"
            for registers, kind in ((a, "u32"), (b, "u32"), (c, "f32"))
        ]
        results = " ".join(self.store(r, "f32", f"d[{i}]") for i, r in enumerate(d))
        return f"{{ float d[4]; ptx::mma_m16n8k16<lk::{rest[6]}>(d, {', '.join(sources)}); {results} }}"

    def op_ldmatrix(self, rest, operands):
        assert rest[:3] == ["sync", "aligned", "m8n8"] and rest[-2:] == ["shared", "b16"], rest
        registers = self.vector(operands[0])
        assert rest[3] == f"x{len(registers)}", rest
        results = " ".join(self.store(r, "u32", f"d[{i}]") for i, r in enumerate(registers))
        transposed = "true" if "trans" in rest else "false"
        at = self.address(operands[1], "shared", 16)
        return f"{{ uint32_t d[4]; lk::cuda::load_matrices<{transposed}>(d, {at}); {results} }}"

    def op_stmatrix(self, rest, operands):
        registers = self.vector(operands[1])
        assert rest == ["sync", "aligned", "m8n8", f"x{len(registers)}", "shared", "b16"], rest
        at, values = self.address(operands[0], "shared", 16), ", ".join(self.value(r, "u32") for r in registers)
        return f"ptx::stmatrix<{len(registers)}>({at}, {{{values}}});"

    def op_bra(self, rest, operands):
        return f"goto {operands[0].replace('$', '')};"

    def op_ret(self, rest, operands):
        return "return;"
