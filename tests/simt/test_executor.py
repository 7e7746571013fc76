"""The host SIMT executor: its primitives against models, and wrong kernels that it must find, for the right reason.

The kernels stand in primitives.cu and wrong.cu and are built by the host compiler. core.cu holds the pieces of
csrc/core/cuda to models of their own.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SEEDS = 20


def build(directory: Path, *options: str) -> Path:
    subprocess.run(["cmake", "-S", HERE, "-B", directory, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", directory, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("simt_sanitized"), "-DSIMT_SANITIZE=ON")


PROGRAMS = ("primitives", "core")


def check_program(folder: Path, program: str, seed: int) -> None:
    ran = subprocess.run([folder / program, str(seed)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "0 failures\n", "")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("seed", range(5))
def test_programs(plain, seed, program):
    check_program(plain, program, seed)


# ---- wrong kernels ----


def fault(name: str) -> int:
    """The line of wrong.cu with the comment `fault: name`."""
    (line,) = (
        i
        for i, line in enumerate((HERE / "wrong.cu").read_text().splitlines(), 1)
        if line.endswith(f"// fault: {name}")
    )
    return line


def run(programs: Path, case: str, right: bool, poison: int = 0) -> list[str]:
    """What each seed says of the case."""
    ran = subprocess.run(
        [programs / "wrong", case, str(int(right)), str(SEEDS), str(poison)], capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""
    said = ran.stdout.splitlines()
    assert len(said) == SEEDS
    return said


AT = r", block \(0, 0, 0\), thread \(\d+, 0, 0\): "
REPORTS = {
    "diverge": (
        rf"diverge{AT}divergence: it waits in __syncthreads \(wrong.cu:\d+\) while \d+ threads of its block "
        r"wait in __syncthreads \(wrong.cu:\d+\)"
    ),
    "leave": (
        rf"leave{AT}divergence: it (exits while \d+ threads of its block wait in __syncthreads \(wrong.cu:LINE\)|"
        r"waits in __syncthreads \(wrong.cu:LINE\), but \d+ threads of its block have exited)"
    ),
    "deadlock": (
        rf"wait_for_each_other{AT}deadlock: it waits in __shfl_xor_sync mask 0xffffffff \(wrong.cu:LINE\) for "
        r"lane 8, which waits in __syncthreads \(wrong.cu:\d+\)"
    ),
    "inactive": (
        rf"shuffle_outside{AT}inactive lane: __shfl_down_sync \(wrong.cu:LINE\) reads lane 1[6-9], "
        r"which is not in mask 0x0000ffff"
    ),
    "gone": (
        rf"vote_of_gone{AT}(inactive lane: mask 0xffffffff of __ballot_sync \(wrong.cu:LINE\) names lane [23]\d, which "
        r"has exited|divergence: it exits while lane \d+ waits in __ballot_sync mask 0xffffffff \(wrong.cu:LINE\) "
        r"for it)"
    ),
    "caller": rf"vote_without_caller{AT}mask: __any_sync \(wrong.cu:LINE\) has mask 0x7fffffff, which lacks .* lane 31",
    "dynamic": rf"one_past_dynamic{AT}out of bounds: a thread of its block has written byte 512 of a 512-byte .*",
    "large": r"fill_large: dynamic shared memory: expected at most 49152 bytes, got 51200; FD_ALLOW_SHARED allows more",
    "fragment": rf"load_fragment{AT}ldmatrix \(.*mma.cuh:\d+\) needs all 32 lanes of a warp",
    "unwaited": rf"copy_two{AT}asynchronous copies: it exits without having waited for 1 of them",
    "misaligned": rf"load_vectors{AT}misaligned access of 16 bytes at 0x[0-9a-f]*[48c] \(wrong.cu:LINE\)",
}


@pytest.mark.parametrize("case", REPORTS)
def test_reports(plain, case):
    for said in run(plain, case, right=False):
        assert re.fullmatch(REPORTS[case].replace("LINE", str(fault(case))), said), said


@pytest.mark.parametrize("case", ["barrier", "warp", "async"])
def test_races_change_the_result(plain, case):
    """Nothing undefined that the executor itself could see, so the order of the threads must show it."""
    said = run(plain, case, right=False)
    assert set(said) <= {"silent", "result: differs"}
    assert said.count("result: differs") >= SEEDS / 2


def test_second_poison_shows_uninitialised_memory(plain):
    first, second = (run(plain, "uninitialised", right=False, poison=poison) for poison in (0, 1))
    assert first == ["result: differs"] * SEEDS
    assert second == ["silent"] * SEEDS  # why one poison is not enough


CASES = [*REPORTS, "barrier", "warp", "async", "uninitialised", "bounds", "global", "redundant"]


@pytest.mark.parametrize("case", CASES)
def test_corrected_twins_are_silent(plain, case):
    for poison in (0, 1):
        assert run(plain, case, right=True, poison=poison) == ["silent"] * SEEDS


# ---- the C interface ----


@pytest.fixture(scope="module")
def library(plain: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(plain / "libkernels.so"))
    library.run_case.restype = ctypes.c_char_p
    library.fastdecode_simt_configure.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    library.fastdecode_simt_barrier_site.restype = ctypes.c_char_p
    library.fastdecode_simt_barrier_kind.restype = ctypes.c_char_p
    library.fastdecode_simt_barrier_executions.restype = ctypes.c_uint64
    return library


def barriers(library: ctypes.CDLL) -> dict[str, str]:
    """Site -> kind of every barrier so far."""
    return {
        library.fastdecode_simt_barrier_site(i).decode(): library.fastdecode_simt_barrier_kind(i).decode()
        for i in range(library.fastdecode_simt_barrier_count())
    }


def outcomes(library: ctypes.CDLL, case: str) -> set[str]:
    said = set()
    for seed in range(SEEDS):
        library.fastdecode_simt_configure(seed, seed % 2, 4)
        said.add(library.run_case(case.encode(), 1).decode())
    return said


@pytest.mark.parametrize(
    ("case", "kinds", "needed"),
    [("barrier", ["__syncthreads"] * 2, 2), ("warp", ["__syncwarp"] * 2, 2), ("redundant", ["__syncthreads"] * 2, 0)],
)
def test_removed_barriers_are_missed(library, case, kinds, needed):
    before = barriers(library)
    assert outcomes(library, case) == {"silent"}
    seen = {site: kind for site, kind in barriers(library).items() if site not in before}
    assert sorted(seen.values()) == kinds
    assert all(re.fullmatch(r"wrong.cu:\d+", site) for site in seen)
    caught = 0
    for site in seen:
        library.fastdecode_simt_skip_barrier(site.encode())
        caught += outcomes(library, case) != {"silent"}
    assert caught == needed
    library.fastdecode_simt_skip_barrier(b"wrong.cu:1")
    assert outcomes(library, case) == {"silent"}
    library.fastdecode_simt_skip_barrier(None)
    assert outcomes(library, case) == {"silent"}


def test_barriers_are_counted(library):
    assert library.fastdecode_simt_barrier_site(-1) is None
    assert library.fastdecode_simt_barrier_site(library.fastdecode_simt_barrier_count()) is None
    library.run_case(b"leave", 1)
    index = list(barriers(library)).index(f"wrong.cu:{fault('leave')}")
    before = library.fastdecode_simt_barrier_executions(index)
    library.run_case(b"leave", 1)
    assert library.fastdecode_simt_barrier_executions(index) == before + 1


def test_launches_from_several_threads(library):
    said = []

    def launch() -> None:
        for _ in range(50):
            said.append(library.run_case(b"barrier", 1))
            said.append(library.run_case(b"gone", 1))

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [b"silent"] * 400


# ---- other builds ----


@pytest.mark.slow
def test_ucontext(tmp_path):
    programs = build(tmp_path, "-DSIMT_UCONTEXT=ON")
    check_program(programs, "primitives", 0)
    for case in REPORTS:
        for said in run(programs, case, right=False):
            assert re.fullmatch(REPORTS[case].replace("LINE", str(fault(case))), said), said
    for case in CASES:
        assert run(programs, case, right=True) == ["silent"] * SEEDS


# ---- the same programs by nvcc ----


def by_nvcc(directory: Path, program: str, architecture: str) -> Path:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("there is no nvcc")
    flags = ["-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", f"-arch={architecture}"]
    source = ["-I", HERE.parents[1] / "csrc", HERE / f"{program}.cu"]
    subprocess.run([nvcc, *flags, "-Werror", "all-warnings", *source, "-o", directory / program], check=True)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_compile_for_a_gpu(tmp_path, program):
    assert (by_nvcc(tmp_path, program, "sm_90") / program).exists()


@pytest.mark.gpu
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_on_a_gpu(tmp_path, program):
    """The models that the executor is held to are true of the GPU, and so is the PTX of core/cuda/async.cuh."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    check_program(by_nvcc(tmp_path, program, "native"), program, 0)


# ---- under sanitizers ----


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_under_sanitizers(sanitized, program):
    check_program(sanitized, program, 0)
    check_program(sanitized, program, 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_corrected_twins_under_sanitizers(sanitized, case):
    assert run(sanitized, case, right=True) == ["silent"] * SEEDS


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in REPORTS if case not in ("misaligned", "dynamic")])
def test_reports_under_sanitizers(sanitized, case):
    for said in run(sanitized, case, right=False):
        assert re.fullmatch(REPORTS[case].replace("LINE", str(fault(case))), said), said


ASAN = {
    "bounds": ("use-after-poison", "READ of size 4", "one_past"),
    "dynamic": ("use-after-poison", "WRITE of size 4", "one_past_dynamic"),
    "global": ("heap-buffer-overflow", "WRITE of size 4", "one_past_global"),
    "async": ("use-after-poison", "READ of size 4", "copy_and_read"),
}


def check_asan_report(case: str, text: str) -> None:
    """The first frame of the report is the line with the fault."""
    kind, access, kernel = ASAN[case]
    assert f"ERROR: AddressSanitizer: {kind}" in text, text
    assert access in text
    (frame,) = re.findall(r"^ *#0 .*", text, re.M)[:1]
    assert kernel in frame and f"wrong.cu:{fault(case)}" in frame


@pytest.mark.slow
@pytest.mark.parametrize("case", ASAN)
def test_asan_names_the_line(sanitized, case):
    ran = subprocess.run([sanitized / "wrong", case, "0", "1", "0"], capture_output=True, text=True)
    assert ran.returncode != 0
    check_asan_report(case, ran.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("case", ASAN)
def test_asan_inside_python(sanitized, case):
    """As for the whole library: an interpreter without ASan, both run-time libraries preloaded."""
    preload = " ".join(
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    environment = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    for right in (1, 0):
        program = (
            "import ctypes; kernels = ctypes.CDLL('./libkernels.so'); kernels.run_case.restype = ctypes.c_char_p; "
            f"[print(kernels.run_case(b'{case}', {right}).decode()) for _ in range(20)]"
        )
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=sanitized, env=environment, capture_output=True, text=True
        )
        if right:
            assert (ran.returncode, ran.stdout, ran.stderr) == (0, "silent\n" * 20, "")
        else:
            assert ran.returncode != 0
            check_asan_report(case, ran.stderr)
