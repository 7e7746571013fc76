"""Settings of this process: instruction set of the CPU kernels, threads and their placement."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LEVELS = {"x86-64": 1, "x86-64-v3": 3, "x86-64-v4": 4}


def cpu_levels() -> list[str]:
    """Instruction-set builds of the CPU kernels that this machine can run, simplest first; the last is the default."""
    best = torch.ops.fastdecode.best_cpu_level()
    return [name for name, level in _LEVELS.items() if level <= best]


@contextmanager
def _restore(level: int) -> Iterator[None]:
    try:
        yield
    finally:
        torch.ops.fastdecode.set_cpu_level(level)


def set_cpu_level(name: str | None = None) -> object:
    """Run this build of the CPU kernels from now on; all builds give the same bits.

    Args:
        name: one of `cpu_levels()`; None means the best one.
    Returns:
        a context manager; leaving it restores what was set before.
    Raises:
        ValueError: unknown here.
    """
    levels = cpu_levels()
    name = levels[-1] if name is None else name
    if name not in levels:
        raise ValueError(f"set_cpu_level: name: expected one of {levels}, got {name!r}")
    return _restore(torch.ops.fastdecode.set_cpu_level(_LEVELS[name]))


def usable_cpus() -> list[int]:
    """Ids of the processors this process may run on."""
    return sorted(os.sched_getaffinity(0))


def pin_threads(num_threads: int | None = None) -> int:
    """Give torch `num_threads` threads, each bound to a processor of its own.

    Unpinned threads that wait for each other by spinning can be stacked on one processor until the scheduler's next
    tick, which makes short parallel regions two to three times slower. The calling thread is bound too, and threads
    started later inherit its binding: programs call this once, at their start; a library should not.

    Args:
        num_threads: None means one for each usable processor.
    Returns:
        the number of threads bound.
    Raises:
        ValueError: more threads than usable processors.
    """
    cpus = usable_cpus()
    num_threads = len(cpus) if num_threads is None else num_threads
    if not 1 <= num_threads <= len(cpus):
        raise ValueError(f"pin_threads: num_threads: expected 1..{len(cpus)}, got {num_threads}")
    torch.set_num_threads(num_threads)
    return torch.ops.fastdecode.pin_threads(cpus)
