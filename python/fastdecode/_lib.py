"""Loads the compiled libraries, and says in one sentence what to do where that fails."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_REINSTALL = "run `pip install --force-reinstall --no-deps .` in fastdecode's folder"


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
    """Load `_C_cpu` into torch, once; repeated calls do nothing."""
    _torch_is_supported()
    import torch

    if hasattr(torch.ops.fastdecode, "best_cpu_level"):
        return
    library = folder() / "_C_cpu.so"
    if not library.is_file():
        raise ImportError(f"fastdecode was not built: its library {library.name} is missing: {_REINSTALL}")
    try:
        torch.ops.load_library(os.fspath(library))
    except OSError as error:
        raise ImportError(
            f"fastdecode's library {library.name} does not load with torch {torch.__version__}: {_REINSTALL} ({error})"
        ) from error
