"""C++ of the PTX that compilers make of kernels, to run on the CPU under tests/native/cuda_shim.

    python tests/ptx_to_cpp.py FILE.ptx FILE.cpp

A kernel becomes a function of the same (mangled) name and argument: linked with the shim's library it stands in for the
kernel that the C++ compiler made. An instruction is a line, a register a variable, a label a label. What an instruction
does is said in ptx.h; one that is not known is an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ptx_instructions import BYTES, CPP, Kernel, Translator, split, variable

PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w\d+)[^,]* (\w+)(?:\[(\d+)\])?(?=,|$)")


def translate_kernel(name: str, parameters: str, body: str, symbols: dict[str, str]) -> str:
    kernel = Kernel(name, dict(symbols))
    size = 0
    for kind, parameter, count in PARAMETER.findall(parameters):
        size += -size % BYTES[kind]
        kernel.symbols[parameter] = f"reinterpret_cast<uint64_t>(&argument) + {size}"
        size += BYTES[kind] * int(count or 1)
    assert size == 0 or size > 16, "an argument that fits in registers is passed in another way"
    argument = f"ptx::Bytes<{size}> argument" if size else ""
    translator = Translator(kernel)
    for line in body.split("\n"):
        if match := re.fullmatch(r"\s*\{ \.reg \.b\d+ (\w+); (.*;) \}", line):  # a register that nothing reads
            line = re.sub(rf"\b{match[1]}\b", "_", match[2])
        if match := re.match(r"\s*\.reg \.(\w+)\s+(%\w+?)<(\d+)>", line):
            kernel.registers |= {f"{match[2]}{i}": CPP[match[1]] for i in range(int(match[3]))}
        elif match := re.match(r"\s*\.shared \.align (\d+) \.\w(\d+) (\w+)(?:\[(\d+)\])?;", line):
            align = int(match[1])
            kernel.own_bytes += -kernel.own_bytes % align
            kernel.symbols[match[3]] = f"ptx::kOwn + {kernel.own_bytes}"
            kernel.own_bytes += int(match[2]) // 8 * int(match[4] or 1)
        elif re.match(r"\s*\.(pragma|loc)|\s*$", line):
            pass
        elif match := re.fullmatch(r"\s*\$(\w+):", line):
            kernel.lines.append(f"{match[1]}:;")
        elif match := re.fullmatch(r"\s*(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*?);", line):
            negated, guard, opcode, operands = match.groups()
            text = translator.instruction(opcode, split(operands))
            kernel.lines.append(f"if ({negated}{variable(guard)}) {{ {text} }}" if guard else text)
        else:
            raise ValueError(f"line {line!r} in {name}")
    used = set(re.findall(r"\bv_\w+", "\n".join(kernel.lines)))
    declared = "\n".join(
        f"  {cpp} {variable(register)} = {cpp}({'true' if cpp == 'bool' else '-1'});"
        for register, cpp in kernel.registers.items()
        if variable(register) in used
    )
    lines = "\n".join(f"  {line}" for line in kernel.lines)
    return f"""
extern "C" void {name}({argument}) {{
  alignas(128) static unsigned char memory[{kernel.own_bytes or 1}];
  static uint64_t block;
  if (std::exchange(block, shim::blocks_run) != shim::blocks_run) std::memset(memory, 0xff, sizeof memory);  // NaN
  const ptx::Shared own{{memory, {kernel.own_bytes}}};
{declared}
{lines}
}}
"""


def translate(text: str, launcher: bool = False) -> str:
    text = re.sub(r"[ \t]*//.*", "", text)
    symbols = {name: "0" for name in re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", text)}
    kernels = re.findall(r"\.entry (\w+)\(\s*(.*?)\s*\)(?:\n\.\w+ [\d, ]+)*\n\{\n(.*?)\n\}", text, re.S)
    assert len(kernels) == text.count(".entry"), "a kernel was not understood"
    parts = ['#include "ptx.h"\n', *(translate_kernel(*kernel, symbols) for kernel in kernels)]
    if launcher:
        ((name, *_),) = kernels
        parts.append(f"""
extern "C" __attribute__((visibility("default")))
void launch(const void* argument, unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared_bytes) {{
  ptx::launch({name}, argument, dim3(x, y, z), threads, shared_bytes);
}}
""")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(translate(Path(sys.argv[1]).read_text()))
