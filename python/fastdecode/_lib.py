"""Loads the compiled libraries, and says in one sentence what to do where that fails."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

_REINSTALL = "run `pip install --force-reinstall --no-deps .` in fastdecode's folder"
NO_CUDA = (
    "this fastdecode was built without CUDA kernels: where nvcc is, in its folder, "
    "run `pip install --force-reinstall --no-deps --config-settings=cmake.define.FASTDECODE_CUDA=ON .`"
)


def _torch_is_supported() -> None:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError("fastdecode needs torch >= 2.10 and found none: run `pip install torch`") from error
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < (2, 10):
        raise ImportError(f"fastdecode needs torch >= 2.10 and found {torch.__version__}: run `pip install -U torch`")


def folder() -> Path:
    """Where the compiled libraries are: beside `_host`, which an editable install keeps apart from the sources."""
    spec = importlib.util.find_spec("fastdecode._host")
    if spec is None or spec.origin is None:
        raise ImportError(f"fastdecode was not built: its library _host is missing: {_REINSTALL}")
    return Path(spec.origin).parent


def load() -> None:
    """Load `_C_cpu` into torch, and `_C_cuda` where it was built and torch knows CUDA; repeated calls do nothing.

    No GPU and no driver are needed for it: a kernel is looked up when it is first launched.
    """
    _torch_is_supported()
    import torch

    if hasattr(torch.ops.fastdecode, "best_cpu_level"):
        return
    cpu = folder() / "_C_cpu.so"
    if not cpu.is_file():
        raise ImportError(f"fastdecode was not built: its library {cpu.name} is missing: {_REINSTALL}")
    _load(cpu)
    if cuda_is_loaded():
        _load(folder() / "_C_cuda.so")


def _load(library: Path) -> None:
    import torch

    try:
        torch.ops.load_library(os.fspath(library))
    except OSError as error:
        raise ImportError(
            f"fastdecode's library {library.name} does not load with torch {torch.__version__}: {_REINSTALL} "
            f"({error.__cause__ or error})"  # the cause tells the symbol
        ) from error


def cuda_library() -> Path | None:
    """The library of the CUDA kernels; None where it was not built."""
    library = folder() / "_C_cuda.so"
    return library if library.is_file() else None


def cuda_is_loaded() -> bool:
    """Whether `load` takes `_C_cuda`. A torch without CUDA lacks what it needs, and has no CUDA tensors for it."""
    import torch

    return cuda_library() is not None and torch.version.cuda is not None


def simt_library() -> Path | None:
    """The library of the CUDA kernels compiled for the host; None where it was not built. For tests."""
    library = folder() / "_C_simt.so"
    return library if library.is_file() else None


def load_simt() -> None:
    """Load `_C_simt`: torch.ops.fastdecode_simt.*, on CPU tensors. Repeated calls do nothing. For tests."""
    library = simt_library()
    if library is None:
        raise ImportError(
            "fastdecode was built without _C_simt: install it with --config-settings=cmake.define.FASTDECODE_SIMT=ON"
        )
    _load(library)


_REFUSALS: list[object] = []  # torch forgets a registration with its Library


def refuse_cuda(names: Iterable[str]) -> None:
    """Where `_C_cuda` is not loaded: these ops tell who brings CUDA tensors so, not torch with its dispatch keys."""
    import torch

    if cuda_is_loaded() or _REFUSALS:
        return
    library = torch.library.Library("fastdecode", "IMPL")
    for name in names:
        if hasattr(torch.ops.fastdecode, name):  # some are written in torch
            library.impl(name, _refusal(name), "CUDA")
    _REFUSALS.append(library)


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: object) -> NoReturn:
        each = [t for argument in arguments for t in (argument if isinstance(argument, list) else [argument])]
        devices = {str(t.device) for t in each if hasattr(t, "device")}
        raise NotImplementedError(f"{name}: no kernel for {', '.join(sorted(devices))}: {NO_CUDA}")

    return refuse
