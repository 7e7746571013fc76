"""Check the installation and this machine, and say what to do about what is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import _lib, ops, runtime
from ..generation import CHECKPOINTS
from ..models.checkpoint import read_configs
from .common import print_json

OPTIONAL = {"safetensors": "cli", "tokenizers": "cli", "rich": "cli", "transformers": "hf", "matplotlib": "viz"}
NEEDED = ("safetensors", "tokenizers", "rich")  # by the command line itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(arguments: argparse.Namespace) -> int:
    report, problems, advice = examine()
    if arguments.json:
        print_json({**report, "problems": problems, "advice": advice})
    else:  # without rich, which may be what is missing
        for section, value in report.items():
            print(f"{section:<15}{_line(value)}")
        for problem in problems:
            print(f"BROKEN         {problem}")
        for line in advice:
            print(f"advice         {line}")
        if not problems:
            print("all that is needed works")
    return 1 if problems else 0


def examine() -> tuple[dict[str, Any], list[str], list[str]]:
    """What was found; what is broken; what could be better."""
    problems: list[str] = []
    advice: list[str] = []
    with runtime.thread_settings() as cpus:
        report = {
            "versions": _versions(problems, advice),
            "libraries": _libraries(problems),
            "cpu": {
                "model": _cpu_model(),
                "usable": len(cpus),
                "levels": runtime.cpu_levels(),
                "level": runtime.cpu_level(),
                "level_from": runtime.CPU_LEVEL_VARIABLE if _forced_level() else "this machine",
            },
            "threads": _threads(cpus, advice),
            "read_bandwidth": {"gb_per_s": round(_read_bandwidth(cpus), 1)},
            "checkpoints": _checkpoints(problems),
            "cuda": _cuda(problems, advice),
        }
    best = runtime.cpu_levels()[-1]
    if _forced_level() and runtime.cpu_level() != best:
        advice.append(f"{runtime.CPU_LEVEL_VARIABLE}={_forced_level()} is set: unset it, and the kernels use {best}")
    if best == "x86-64":
        advice.append("this CPU lacks AVX2: expect the kernels to be several times slower than on newer ones")
    return report, problems, advice


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return {None: "missing", True: "yes", False: "no"}.get(value, str(value)) if not _is_number(value) else f"{value:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(problems: list[str], advice: list[str]) -> dict[str, str | None]:
    found = {"fastdecode": _version("fastdecode"), "python": platform.python_version(), "torch": torch.__version__}
    for package, extra in OPTIONAL.items():
        found[package] = _version(package)
        if found[package] is None:
            where = problems if package in NEEDED else advice
            where.append(f"{package} is not installed: pip install 'fastdecode[{extra}]'")
    return found


def _libraries(problems: list[str]) -> dict[str, str]:
    """Where the compiled libraries are, and whether all builds of a kernel agree."""
    logits = torch.linspace(-3, 3, 5000).sin().repeat(4, 1)
    drawn = {}
    for level in runtime.cpu_levels():
        with runtime.set_cpu_level(level):
            drawn[level] = ops.sample(logits, top_p=0.9, seed=1, offset=7).tokens.tolist()
    if any(tokens != drawn["x86-64"] for tokens in drawn.values()):
        problems.append(f"the builds of the CPU kernels disagree: sample gave {drawn}")
    # without them the import of fastdecode would have failed
    return {"folder": str(_lib.folder()), "_host": "loaded", "_C_cpu": "loaded"}


def _forced_level() -> str | None:
    return os.environ.get(runtime.CPU_LEVEL_VARIABLE) or None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _threads(cpus: list[int], advice: list[str]) -> dict[str, Any]:
    """Does a parallel region of two pinned threads get two processors?"""
    if len(cpus) < 2:
        advice.append("only one processor is usable: every command runs with one thread")
        return {"processors_for_two": None}
    runtime.pin_threads(2, cpus=cpus)
    matrix = torch.ones(512, 512)
    _seconds(lambda: matrix @ matrix)
    wall, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < 0.2:
        _ = matrix @ matrix
    got = (time.process_time() - used) / (time.perf_counter() - wall)
    if got < 1.8:
        advice.append(
            f"two threads got {got:.1f} processors instead of 2: other programs are running, or a CPU quota is set; "
            "measure again when the machine is idle, or use --threads 1"
        )
    return {"processors_for_two": round(got, 2)}


def _read_bandwidth(cpus: list[int]) -> float:
    """GB/s of a float32 matrix-vector product over 256 MB, as decoding reads weights; with one thread or all."""
    matrix, vector = torch.ones(16384, 4096), torch.ones(4096)
    best = float("inf")
    for count in {1, len(cpus)}:
        runtime.pin_threads(count, cpus=cpus)
        best = min(best, *(_seconds(lambda: torch.mv(matrix, vector)) for _ in range(3)))
    return matrix.numel() * 4 / best / 1e9


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _checkpoints(problems: list[str]) -> dict[str, bool]:
    found = {}
    for name in ("tiny-code", "tiny-code-draft"):
        folder = CHECKPOINTS / name
        try:
            read_configs(folder)
            files = ("model.safetensors", "tokenizer.json") if name == "tiny-code" else ("model.safetensors",)
            found[name] = all((folder / file).is_file() for file in files)
        except ValueError:
            found[name] = False
        if not found[name]:
            problems.append(f"the shipped model {name} is missing or not whole: reinstall fastdecode, or use --model")
    return found


def _cuda(problems: list[str], advice: list[str]) -> dict[str, Any]:
    """Which kernels were built, and whether one of them runs on each GPU."""
    built, available = _lib.cuda_library() is not None, torch.cuda.is_available()
    if available and not built:
        advice.append(f"there is a GPU, but {_lib.NO_CUDA}")
    if built and torch.version.cuda is None:
        advice.append("the CUDA kernels are not used: this torch was built without CUDA")
    gpus = []
    for index in range(torch.cuda.device_count()) if available else ():
        major, minor = torch.cuda.get_device_capability(index)
        gpus.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
        if _lib.cuda_is_loaded():
            problems.extend(_broken_gpu(index))
    return {
        "kernels": "built" if built else "not built",
        "torch": torch.version.cuda or "none",
        "gpus": gpus,
        "host_simulation": "built" if _lib.simt_library() is not None else "not built",
    }


def _broken_gpu(index: int) -> list[str]:
    logits = torch.linspace(-3, 3, 5000).sin()[None]
    try:
        drawn = ops.sample(logits.to(f"cuda:{index}"), top_p=0.9, seed=1, offset=7).tokens.item()
    except RuntimeError as error:  # built for another architecture, say
        return [f"the CUDA kernels do not run on cuda:{index}: {str(error).splitlines()[0]}"]
    expected = ops.sample(logits, top_p=0.9, seed=1, offset=7).tokens.item()
    return [] if drawn == expected else [f"sample gives {drawn} on cuda:{index} and {expected} on the CPU"]
