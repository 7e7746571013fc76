"""Settings of this process: instruction set of the CPU kernels, threads and their placement.

The environment variable FASTDECODE_CPU_LEVEL names the instruction set to use (see `set_cpu_level`). It is read once,
when fastdecode is imported, and changes no result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from time import perf_counter

import torch

from .models.base import Model, Want

CPU_LEVEL_VARIABLE = "FASTDECODE_CPU_LEVEL"
_LEVELS = {"x86-64": 1, "x86-64-v3": 3, "x86-64-v4": 4}


def cpu_levels() -> list[str]:
    """Instruction-set builds of the CPU kernels that this machine can run, simplest first.

    The last is in use unless FASTDECODE_CPU_LEVEL or `set_cpu_level` names another.
    """
    best = torch.ops.fastdecode.best_cpu_level()
    return [name for name, level in _LEVELS.items() if level <= best]


def cpu_level() -> str:
    """The build of the CPU kernels in use."""
    level = torch.ops.fastdecode.set_cpu_level(1)  # answers with the level before
    torch.ops.fastdecode.set_cpu_level(level)
    return next(name for name, number in _LEVELS.items() if number == level)


@contextmanager
def _restore(level: int) -> Iterator[None]:
    try:
        yield
    finally:
        torch.ops.fastdecode.set_cpu_level(level)


def set_cpu_level(name: str | None = None) -> AbstractContextManager[None]:
    """Run this build of the CPU kernels from now on; all builds give the same bits.

    Args:
        name: one of `cpu_levels()`; None means the one that was in use after the import.
    Returns:
        a context manager; leaving it restores what was set before.
    Raises:
        ValueError: unknown here.
    """
    levels = cpu_levels()
    name = _DEFAULT_LEVEL if name is None else name
    if name not in levels:
        raise ValueError(f"set_cpu_level: name: expected one of {levels}, got {name!r}")
    return _restore(torch.ops.fastdecode.set_cpu_level(_LEVELS[name]))


def _level_from_environment() -> str:
    levels = cpu_levels()
    name = os.environ.get(CPU_LEVEL_VARIABLE) or levels[-1]
    if name not in levels:
        raise ValueError(f"{CPU_LEVEL_VARIABLE}: expected one of {levels} on this machine, got {name!r}")
    return name


_DEFAULT_LEVEL = _level_from_environment()
set_cpu_level(_DEFAULT_LEVEL)


def usable_cpus() -> list[int]:
    """Ids of the processors this process may run on."""
    return sorted(os.sched_getaffinity(0))


def pin_threads(num_threads: int | None = None, *, cpus: Sequence[int] | None = None) -> int:
    """Give torch `num_threads` threads, each bound to a processor of its own.

    Unpinned threads that wait for each other by spinning can be stacked on one processor until the scheduler's next
    tick, which makes short parallel regions two to three times slower. The calling thread is bound too, and threads
    started later inherit its binding: programs call this once, at their start, or inside `thread_settings`; a library
    should not.

    Args:
        num_threads: None means one for each processor.
        cpus: ids of the processors to use; None means the usable ones, which are fewer once the caller is bound.
    Returns:
        the number of threads bound.
    Raises:
        ValueError: more threads than processors.
    """
    cpus = usable_cpus() if cpus is None else cpus
    num_threads = len(cpus) if num_threads is None else num_threads
    if not 1 <= num_threads <= len(cpus):
        raise ValueError(f"pin_threads: num_threads: expected 1..{len(cpus)}, got {num_threads}")
    torch.set_num_threads(num_threads)
    return torch.ops.fastdecode.pin_threads(list(cpus))


@contextmanager
def thread_settings() -> Iterator[list[int]]:
    """Undo at the end what the body does to torch's thread count and to the binding of threads.

    Yields:
        ids of the processors that are usable at the start, for `cpus` of the functions here.
    """
    cpus, num_threads = usable_cpus(), torch.get_num_threads()
    before = _affinities()
    try:
        yield cpus
    finally:
        torch.set_num_threads(num_threads)
        for thread in _affinities():
            with suppress(OSError):  # it has ended meanwhile
                os.sched_setaffinity(thread, before.get(thread, cpus))


def _affinities() -> dict[int, Iterable[int]]:
    """The processors that each thread of this process may run on."""
    found: dict[int, Iterable[int]] = {}
    for name in os.listdir("/proc/self/task"):
        with suppress(OSError):
            found[int(name)] = os.sched_getaffinity(int(name))
    return found


def tune_threads(
    model: Model, *, draft_model: Model | None = None, num_drafts: int = 0, cpus: Sequence[int] | None = None
) -> int:
    """Pin the number of threads with which a decoding round of batch 1 is fastest here and now.

    A round is one pass of `model` over num_drafts + 1 tokens, after num_drafts passes of `draft_model` over one.
    Fewer threads win where the weights are small or the other processors are busy. Takes about 0.1 s per count tried.

    Args:
        cpus: see `pin_threads`.
    Returns:
        the number of threads, now pinned.
    """
    passes: list[Callable[[], object]] = [_forward(model, num_drafts + 1)]
    if draft_model is not None:
        passes += [_forward(draft_model, 1)] * num_drafts

    @torch.inference_mode()
    def decode_round() -> None:
        for forward in passes:
            forward()

    return fastest_threads(decode_round, cpus=cpus)


def _forward(model: Model, num_tokens: int) -> Callable[[], object]:
    """A pass over `num_tokens` behind up to 128 cached tokens, repeatable: nothing is kept."""
    before = max(0, min(128, model.config.max_context - num_tokens))
    num_tokens = min(num_tokens, model.config.max_context)
    cache = model.new_cache(1, before + num_tokens)
    if before:
        model.forward(torch.zeros(1, before, dtype=torch.int64), cache=cache, want=Want(0))
        cache.keep(None, [before])
    tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
    return lambda: model.forward(tokens, cache=cache)


def fastest_threads(step: Callable[[], object], *, cpus: Sequence[int] | None = None, seconds: float = 0.05) -> int:
    """Pin the number of threads, of 1, 2, 4, ... and all, with which `step` runs fastest, by its best time.

    Every count is tried twice, in A, B, ..., B, A order, for `seconds` and three calls after one that is not counted;
    one whose call takes three times the best so far is given up. A larger count must win by 5 %.

    Args:
        cpus: see `pin_threads`.
    Returns:
        the number of threads, now pinned.
    """
    cpus = usable_cpus() if cpus is None else cpus
    counts = [2**i for i in range(len(cpus).bit_length()) if 2**i < len(cpus)] + [len(cpus)]
    best = dict.fromkeys(counts, float("inf"))
    for count in (*counts, *reversed(counts)):
        pin_threads(count, cpus=cpus)
        calls, spent, took = 0, 0.0, 0.0
        while (calls < 4 or spent < seconds) and took < 3 * min(best.values()):
            start = perf_counter()
            step()
            took = perf_counter() - start
            if calls:  # the first one starts the threads and fills the caches
                best[count] = min(best[count], took)
            calls, spent = calls + 1, spent + took
    chosen = counts[0]
    for count in counts[1:]:
        if best[count] < 0.95 * best[chosen]:
            chosen = count
    pin_threads(chosen, cpus=cpus)
    return chosen
