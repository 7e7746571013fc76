"""The binary interface: what _C_cpu and _C_cuda take from torch, which is what makes one build fit every torch >= 2.10.

golden/torch_symbols.txt lists the functions of torch's stable C interface that _C_cpu uses. All of them were found in
libtorch_cpu.so of torch 2.10.0, and the headers of torch 2.10.0, 2.13.0 and 2.15.0 lead to the same list.
golden/torch_symbols_cuda.txt lists those that _C_cuda uses beside them. All were found in torch 2.14.1, built for CUDA
13.0, where the library built against 2.13.0 loads; they were not looked for in 2.10.0.
After a change that uses others:
    python tests/test_symbols.py
and look for the new ones in what `nm -D --defined-only torch/lib/libtorch_cpu.so` prints for torch 2.10.0: functions
that came later are hidden by TORCH_TARGET_VERSION only where torch's headers mark them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fastdecode import _lib

GOLDEN = Path(__file__).parent / "golden"
CPU, CUDA = GOLDEN / "torch_symbols.txt", GOLDEN / "torch_symbols_cuda.txt"
HEADERS = {
    CPU: "# What _C_cpu takes from torch, as tests/test_symbols.py finds it. torch 2.10.0 must have all of it.\n",
    CUDA: "# What _C_cuda takes from torch beyond torch_symbols.txt, as tests/test_symbols.py finds it.\n",
}


def symbols(library: Path) -> set[str]:
    """What the library needs of others than the toolchain's own libraries."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds_and_names = [line.split() for line in lines]
    assert all(len(pair) == 2 for pair in kinds_and_names), lines
    # w: may be absent when the library is loaded
    needed = {name for kind, name in kinds_and_names if kind != "w"}
    return {name for name in needed if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$", name)}


def listed(golden: Path) -> set[str]:
    return {line for line in golden.read_text().splitlines() if not line.startswith("#")}


def more(cuda_library: Path) -> set[str]:
    """What _C_cuda needs that _C_cpu does not."""
    return symbols(cuda_library) - listed(CPU)


def assert_listed(found: set[str], golden: Path) -> None:
    known = listed(golden)
    assert found == known, (
        f"new: {sorted(found - known)}, gone: {sorted(known - found)}; does torch 2.10 have the new ones? "
        "Then run: python tests/test_symbols.py"
    )


def test_torch_symbols_are_the_listed_ones():
    assert len(listed(CPU)) > 50
    assert_listed(symbols(_lib.folder() / "_C_cpu.so"), CPU)


def test_torch_symbols_of_the_cuda_kernels_are_the_listed_ones():
    library = _lib.cuda_library()
    if library is None:
        pytest.skip("_C_cuda is not built")
    assert_listed(more(library), CUDA)
    assert len(symbols(library) & listed(CPU)) > 50


def test_foreign_symbols_are_noticed():
    host = next(_lib.folder().glob("_host*.so"))
    assert any(name.startswith("Py") for name in symbols(host) - listed(CPU))


if __name__ == "__main__":
    CPU.write_text(HEADERS[CPU] + "".join(f"{name}\n" for name in sorted(symbols(_lib.folder() / "_C_cpu.so"))))
    if (library := _lib.cuda_library()) is not None:
        CUDA.write_text(HEADERS[CUDA] + "".join(f"{name}\n" for name in sorted(more(library))))
