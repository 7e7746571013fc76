"""What a result says about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch

import fastdecode
from fastdecode.runtime import cpu_level

_UNKNOWN_L3 = 64 << 20  # taken where the machine does not tell


def l3_bytes(cpus: list[int], root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """All level 3 caches of these processors together; None where the machine does not tell."""
    found: dict[str, int] = {}  # by the processors that share it
    for cpu in cpus:
        for index in (root / f"cpu{cpu}" / "cache").glob("index*"):
            try:
                level, size, shared = (
                    (index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
                )
            except OSError:
                continue
            if level == "3":
                found[shared] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
    return sum(found.values()) or max(0, _configured("SC_LEVEL3_CACHE_SIZE")) or None


def cold_bytes(cpus: list[int]) -> int:
    """How much memory inputs must take to fall out of the caches when they are used in turn: three times L3."""
    return 3 * (l3_bytes(cpus) or _UNKNOWN_L3)


def cold_bytes_on(device: torch.device, cpus: list[int]) -> int:
    """The same for tensors on a GPU, whose second-level cache it is."""
    if device.type == "cuda":
        return 3 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    return cold_bytes(cpus)


def describe(cpus: list[int]) -> dict[str, Any]:
    """Processor, clocks, caches, versions, commit, date and load."""
    info = _cpu_info()
    clocks = [float(value) for value in info.get("cpu MHz", ())]
    flags = next(iter(info.get("flags", ())), "").split()
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "device": next(iter(info.get("model name", ())), None) or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c", "sse4", "sve"))],
        "clock_mhz": [min(clocks), max(clocks)] if clocks else None,
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "cpus": cpus,
        "l3_bytes": l3_bytes(cpus),
        "memory_bytes": _configured("SC_PAGE_SIZE") * _configured("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "cpu_level": cpu_level(),
        "versions": {
            "fastdecode": fastdecode.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()),
    }


def commit(file: Path = Path(__file__)) -> dict[str, Any]:
    """Of the checkout that `file` belongs to, and whether its sources were changed; None where it is in none."""

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=file.parent)
        except FileNotFoundError:
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    if git("ls-files", "--error-unmatch", file.name) is None:  # a virtual environment may lie inside another checkout
        return {"commit": None, "modified": None}
    root = git("rev-parse", "--show-toplevel")
    changed = git("status", "--porcelain", "--", f"{root}/csrc", f"{root}/python", f"{root}/bench/ops")
    return {"commit": git("rev-parse", "HEAD"), "modified": bool(changed)}


def _configured(name: str) -> int:
    try:
        return os.sysconf(name)
    except (ValueError, OSError):
        return 0


def _cpu_info() -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), []).append(value.strip())
    return values
