"""The C++ library by itself: built and installed without torch and Python, found by a program, run under sanitizers."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastdecode

ROOT = Path(__file__).parents[2]
LEVELS = {"x86-64": "1", "x86-64-v3": "3", "x86-64-v4": "4"}  # as Exec counts them
# with these a search for Python or pybind11 is an error, wherever they are installed
NO_PYTHON = ("-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON")
# a null pointer and a wrong object size stop the program anyway, and their checks double the time to compile
SANITIZE = (
    "-DCMAKE_BUILD_TYPE=Debug",
    "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1 -fsanitize=address,undefined -fno-sanitize=null,object-size,vptr "
    "-fno-sanitize-recover=all",
)


def run(*command: object, ok: bool = True) -> str:
    """What the command printed; it must succeed, or fail where not `ok`."""
    ran = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (ran.returncode == 0) == ok, f"{command} ended with {ran.returncode}:\n{ran.stdout[-4000:]}"
    return ran.stdout


def cmake(source: Path, build: Path, *options: str) -> Path:
    run("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
    run("cmake", "--build", build, "--parallel", "2")
    return build


@dataclass(frozen=True)
class Package:
    build: Path
    prefix: Path


def install(folder: Path, *options: str) -> Package:
    build = cmake(ROOT, folder / "build", "-DFASTDECODE_TORCH=OFF", *NO_PYTHON, *options)
    run("cmake", "--install", build, "--prefix", folder / "prefix")
    return Package(build, folder / "prefix")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """With the CUDA kernels where they can be compiled."""
    nvcc = "ON" if shutil.which("nvcc") else "OFF"
    return install(tmp_path_factory.mktemp("package"), f"-DFASTDECODE_CUDA={nvcc}")


def build_against(package: Package, source: str, build: Path, *options: str) -> Path:
    return cmake(ROOT / source, build, f"-DCMAKE_PREFIX_PATH={package.prefix}", *options)


@pytest.mark.slow
def test_the_library_needs_no_torch(package, tmp_path):
    needed = run("nm", "--undefined-only", package.prefix / "lib" / "libfastdecode_cpu.a")
    assert " U memset\n" in needed
    assert not [line for line in needed.splitlines() if any(name in line for name in ("torch", "_Py", "Py_"))]
    # the same options stop a build of the Python package, so they do hide Python
    configured = run("cmake", "-S", ROOT, "-B", tmp_path, "-DFASTDECODE_TORCH=ON", *NO_PYTHON, ok=False)
    assert "Python" in configured


@pytest.mark.slow
def test_the_example_draws_what_the_ops_draw(package, tmp_path):
    program = build_against(package, "examples/cpp", tmp_path) / "sample"
    batch, vocab_size = 4, 32000
    index = torch.arange(batch * vocab_size)
    logits = ((index * index % 10007).float() / 1024).view(batch, vocab_size)
    seed, offset = torch.tensor([1, 2, 3, 4]), torch.tensor([17, 0, 5, 128])
    drawn = fastdecode.ops.sample(logits, temperature=0.8, top_k=50, top_p=0.9, seed=seed, offset=offset)
    stats = fastdecode.ops.row_stats(logits)
    expected = "".join(
        f"row {b}: drew {drawn.tokens[b]}, entropy {stats.entropy[b]:.9g} nats, most likely {stats.argmax[b]}\n"
        for b in range(batch)
    )
    assert len(set(drawn.tokens.tolist())) == batch
    for level in fastdecode.cpu_levels():
        assert run(program, LEVELS[level]) == expected, level
    assert run(program) == expected


@pytest.mark.slow
def test_only_contracts_are_installed(package):
    headers = [path.relative_to(package.prefix / "include") for path in package.prefix.rglob("*.h")]
    folders = {folder.name for folder in (ROOT / "csrc").iterdir()} - {"bind", "host", "simt"}
    assert {path.parts[:-1] for path in headers} == {("fastdecode", folder) for folder in folders}


@pytest.mark.slow
def test_the_cuda_library(package, tmp_path):
    """Every kernel is in it, and the example links; a GPU, where there is one, draws what the CPU draws."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    names = {path.name.removesuffix("_cuda.cu") for path in (ROOT / "csrc").glob("*/*_cuda.cu")}
    defined = run("nm", "--defined-only", "--demangle", package.prefix / "lib" / "libfastdecode_cuda.a")
    assert {name for name in names if f" T fastdecode::cuda::{name}(" in defined} == names
    build = build_against(package, "examples/cpp", tmp_path)
    if not torch.cuda.is_available():
        assert run(build / "sample_cuda", ok=False).startswith("CUDA: ")
        return
    drawn = [line.partition(",")[0] for line in run(build / "sample").splitlines()]
    assert run(build / "sample_cuda").splitlines() == drawn


@pytest.mark.slow
def test_a_component_that_is_missing_is_named(package, tmp_path):
    prefix = tmp_path / "prefix"
    shutil.copytree(package.prefix, prefix)
    for path in prefix.rglob("fastdecode_cuda*.cmake"):
        path.unlink()
    program = (
        "cmake_minimum_required(VERSION 3.25)\nproject(program CXX)\nfind_package(fastdecode REQUIRED COMPONENTS {})\n"
    )
    for component, ok in (("cpu", True), ("cuda", False)):
        (tmp_path / "CMakeLists.txt").write_text(program.format(component))
        printed = run("cmake", "-S", tmp_path, "-B", tmp_path / component, f"-DCMAKE_PREFIX_PATH={prefix}", ok=ok)
        assert ("component cuda: this installation was built without -DFASTDECODE_CUDA=ON" in printed) != ok


def leaks(level: str, objects: list[Path]) -> set[str]:
    """Symbols of a level's objects that the linker might replace by another build's, or give to other code.

    Of several weak definitions it keeps any one: the std::vector<int> of the AVX-512 build could end up in the plain
    build, or in the program. So each must name its level's namespace, itself or in a template argument.
    """
    defined = set()
    for path in objects:
        lines = run("nm", "--defined-only", "--no-sort", path).splitlines()
        defined |= {name for _, kind, name in (line.split(maxsplit=2) for line in lines) if kind in "WwVvu"}
    # a pointer to the exception handler of libstdc++: data, the same in every build
    return {name for name in defined if f"10fastdecode2v{level}" not in name} - {"DW.ref.__gxx_personality_v0"}


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS.values())
def test_no_symbol_leaks_between_levels(package, level):
    folder = package.build / "CMakeFiles" / f"fd_cpu_v{level}.dir"
    objects = list(folder.rglob("*.o"))
    assert len(objects) == len(list((ROOT / "csrc").glob("*/*_cpu.cpp")))
    assert leaks(level, objects) == set()
    another = {"1": "3", "3": "4", "4": "1"}[level]
    assert leaks(another, objects), "the level has weak symbols, and the check tells them from another's"


@pytest.mark.slow
def test_a_leak_is_noticed(tmp_path):
    source, found = tmp_path / "leak.cpp", tmp_path / "leak.o"
    source.write_text("#include <vector>\ntemplate class std::vector<int>;")
    run("c++", "-std=c++20", "-O3", "-c", source, "-o", found)
    assert any("vector" in name for name in leaks("3", [found]))


@pytest.mark.slow
def test_the_benchmark_runs(package):
    """Every row: each checks that it measures what its name says, and reports an error otherwise."""
    command = ["cmake", "-S", str(ROOT), "-B", str(package.build), "-DFASTDECODE_BENCHMARKS=ON"]
    configured = subprocess.run(command, capture_output=True, text=True)
    if configured.returncode != 0:
        assert "needs Google Benchmark" in configured.stderr, configured.stderr
        pytest.skip("Google Benchmark is not installed")
    run("cmake", "--build", package.build, "--parallel", "2")
    program = package.build / "bench" / "cpp" / "bench_ops"
    ran = subprocess.run([program, "--benchmark_min_time=0.001", "--benchmark_format=json"], capture_output=True)
    rows = json.loads(ran.stdout)["benchmarks"]
    assert {row["name"].split("/")[0] for row in rows} >= {"row_stats", "sample", "verify_chain", "commit"}
    assert not [row for row in rows if row.get("error_occurred")]
    assert all(row["real_time"] > 0 for row in rows)


@pytest.mark.slow
def test_kernels_agree_on_hostile_sizes(package, tmp_path):
    printed = run(build_against(package, "tests/cpp", tmp_path) / "kernels")
    # a new op must be added to kernels.cpp
    tested = {line.partition(":")[0] for line in printed.splitlines()}
    shared = {"attend"}  # no op: what paged_attention and prefix_attention call
    assert tested | shared == {path.name.removesuffix("_cpu.cpp") for path in (ROOT / "csrc").glob("*/*_cpu.cpp")}


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    sanitized = install(tmp_path, *SANITIZE)
    program = build_against(sanitized, "tests/cpp", tmp_path / "tests", *SANITIZE) / "kernels"
    for level in fastdecode.cpu_levels():
        number = LEVELS[level]
        assert "heap-buffer-overflow" in run(program, "overrun", number, ok=False)
        assert "heap-buffer-overflow" in run(program, "short-output", number, ok=False)
        assert "runtime error: load of misaligned address" in run(program, "misaligned", number, ok=False)
    run(program)
