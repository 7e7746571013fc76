"""The binary interface: what _C_cpu takes from torch, which is what makes one build fit every torch >= 2.10.

golden/torch_symbols.txt lists the functions of torch's stable C interface that it uses. All of them were found in
libtorch_cpu.so of torch 2.10.0, and the headers of torch 2.10.0, 2.13.0 and 2.15.0 lead to the same list. After a
change that uses others:
    python tests/test_symbols.py > tests/golden/torch_symbols.txt
and look for the new ones in what `nm -D --defined-only torch/lib/libtorch_cpu.so` prints for torch 2.10.0: functions
that came later are hidden by TORCH_TARGET_VERSION only where torch's headers mark them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from fastdecode import _lib

GOLDEN = Path(__file__).parent / "golden" / "torch_symbols.txt"
HEADER = "# What _C_cpu takes from torch, as tests/test_symbols.py finds it. torch 2.10.0 must have all of it.\n"


def symbols(library: Path) -> set[str]:
    """What the library needs of others than the toolchain's own libraries."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds_and_names = [line.split() for line in lines]
    assert all(len(pair) == 2 for pair in kinds_and_names), lines
    # w: may be absent when the library is loaded
    needed = {name for kind, name in kinds_and_names if kind != "w"}
    return {name for name in needed if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$", name)}


def listed() -> set[str]:
    return {line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")}


def test_torch_symbols_are_the_listed_ones():
    found, golden = symbols(_lib.folder() / "_C_cpu.so"), listed()
    assert len(golden) > 50
    assert found == golden, (
        f"new: {sorted(found - golden)}, gone: {sorted(golden - found)}; does torch 2.10 have the new ones? "
        "Then run: python tests/test_symbols.py > tests/golden/torch_symbols.txt"
    )


def test_foreign_symbols_are_noticed():
    host = next(_lib.folder().glob("_host*.so"))
    assert any(name.startswith("Py") for name in symbols(host) - listed())


if __name__ == "__main__":
    print(HEADER, *(f"{name}\n" for name in sorted(symbols(_lib.folder() / "_C_cpu.so"))), sep="", end="")
