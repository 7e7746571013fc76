"""What the compiler made of the CUDA kernels: registers, shared and local memory, and how wide loads and stores are.

    python -m bench.cuda_report build/_C_cuda.so --markdown docs/cuda-registers.md

reads a library or object file with `cuobjdump`, of the CUDA toolkit or of Triton's wheel (triton/backends/nvidia/bin).
It needs no GPU.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD = """# What nvcc makes of the kernels

For {architectures}; made by `python -m bench.cuda_report <_C_cuda.so> --markdown docs/cuda-registers.md`, which needs
no GPU. No kernel spills registers: a build with `-DFASTDECODE_STRICT=ON`, as in CI, stops where one would.

- *registers*: per thread. With 64 or fewer an SM of Hopper runs 1024 threads at once, with 128 or fewer 512.
- *shared*: bytes of static shared memory per block, 1024 of them CUDA's own where there are any.
- *local*: instructions that load or store local memory, where arrays go that are indexed by a variable.
- *128-bit*: instructions that move 16 bytes per thread between global memory and registers, or, loading, straight into
  shared memory. They stand beside narrower ones for rows that are not aligned.
"""
COLUMNS = ("op", "kernel", "registers", "shared", "local", "128-bit loads", "128-bit stores")


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture."""

    op: str
    name: str
    architecture: str
    registers: int
    shared: int
    local: int  # instructions that load or store local memory
    wide_loads: int
    wide_stores: int


def sections(text: str) -> Iterator[tuple[str, str, str]]:
    """Source file, architecture and text of each piece of machine code that cuobjdump printed."""
    for part in re.split(r"^Fatbin elf code:\n", text, flags=re.MULTILINE)[1:]:
        architecture = re.search(r"^arch = (\S+)", part, re.MULTILINE)
        source = re.search(r"^identifier = (\S+)", part, re.MULTILINE)
        if architecture:
            yield Path(source[1]).name if source else "", architecture[1], part


def resources(text: str) -> dict[tuple[str, str, str], tuple[int, int]]:
    """Registers and shared memory by source, architecture and mangled name, of `cuobjdump -res-usage`."""
    found = {}
    for source, architecture, part in sections(text):
        for name, usage in re.findall(r"^ *Function (\S+):\n\s*(.*)$", part, re.MULTILINE):
            values = dict(re.findall(r"(REG|SHARED):(\d+)", usage))
            found[source, architecture, name] = int(values["REG"]), int(values["SHARED"])
    return found


def instructions(text: str) -> dict[tuple[str, str, str], Counter[str]]:
    """How often each instruction, with its suffixes, stands in each function, of `cuobjdump -sass`."""
    found = {}
    for source, architecture, part in sections(text):
        pieces = re.split(r"^\s*Function : (\S+)\n", part, flags=re.MULTILINE)
        for name, code in zip(pieces[1::2], pieces[2::2], strict=True):
            words = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
            found[source, architecture, name] = Counter(words)
    return found


def count(words: Counter[str], *names: str, wide: bool = False) -> int:
    return sum(
        number
        for word, number in words.items()
        if word.split(".")[0] in names and (not wide or "128" in word.split("."))
    )


def short(demangled: str) -> str:
    """`topk_kernel<float>` of `void fastdecode::v0::(anonymous namespace)::topk_kernel<float>(Arguments)`."""
    name = re.sub(r"\(anonymous namespace\)::|fastdecode::v\d+::|fastdecode::", "", demangled)
    name = re.sub(r"\((int|bool|long)\)", "", name)  # of a template argument
    return name.removeprefix("void ").partition("(")[0]


def kernels(res_usage: str, sass: str, demangle: dict[str, str]) -> list[Kernel]:
    """All kernels, by op and name.

    Raises:
        ValueError: no kernel in it, or one without code.
    """
    code, found = instructions(sass), []
    for key, (registers, shared) in resources(res_usage).items():
        source, architecture, mangled = key
        if key not in code:
            raise ValueError(f"cuda_report: {mangled}: no code in the disassembly")
        words = code[key]
        found.append(
            Kernel(
                source.removesuffix("_cuda.cu"),
                short(demangle.get(mangled, mangled)),
                architecture,
                registers,
                shared,
                count(words, "LDL", "STL"),
                count(words, "LDG", "LD", "LDGSTS", wide=True),
                count(words, "STG", "ST", wide=True),
            )
        )
    if not found:
        raise ValueError("cuda_report: expected CUDA kernels, found none")
    return sorted(found, key=lambda kernel: (kernel.op, kernel.name, kernel.architecture))


def markdown(found: Sequence[Kernel]) -> str:
    several = len({kernel.architecture for kernel in found}) > 1
    lines = [HEAD.format(architectures=", ".join(sorted({kernel.architecture for kernel in found})))]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * 5]
    for k in found:
        name = f"`{k.name}`" + (f" {k.architecture}" if several else "")
        cells = (f"`{k.op}`", name, k.registers, k.shared, k.local, k.wide_loads, k.wide_stores)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def disassemble(library: Path, cuobjdump: str) -> list[Kernel]:
    def run(*command: str, given: str | None = None) -> str:
        return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout

    usage = run(cuobjdump, "-res-usage", str(library))
    names = [name for _, _, name in resources(usage)]
    readable = run("c++filt", given="\n".join(names)).splitlines()
    return kernels(usage, run(cuobjdump, "-sass", str(library)), dict(zip(names, readable, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_report", description=__doc__.partition("\n")[0])
    parser.add_argument("library", type=Path, help="_C_cuda.so, libfastdecode_cuda.a or an object file")
    parser.add_argument("--cuobjdump", metavar="FILE", help="default: the one on PATH")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, not to the terminal")
    arguments = parser.parse_args()
    cuobjdump = arguments.cuobjdump or shutil.which("cuobjdump")
    if cuobjdump is None:
        print("cuda_report: cuobjdump is not on PATH; --cuobjdump names it", file=sys.stderr)
        return 2
    found = disassemble(arguments.library, cuobjdump)
    table = markdown(found)
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    else:
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
