"""Timing of calls beside their peers in one process, on pinned threads and cold inputs, with a gate against noise.

Every call is measured with 1, 2, 4, ... and all threads and counts with its best number. The order of samples is
A, B, ..., B, A, over calls and numbers of threads alike, so that a slow second of the machine falls on all of them.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from fastdecode.runtime import pin_threads

from . import machine
from .goals import Goal, Measured, Verdict, judge

Call = Callable[..., object]
Inputs = Sequence[tuple[Any, ...]]  # calls get them in turn, as positional arguments

SAMPLE_SECONDS = 2e-3  # a sample repeats the call until it is this long, so that reading the clock does not matter
LEAST_SAMPLES = 4
SLOW_SECONDS = 20e-3  # a call this long needs no warm-up in every sample
VERY_SLOW_SECONDS = 0.2  # two samples are enough of a call this long
GIVE_UP = 3.0  # a number of threads that takes so many times the best one is not measured further
LARGER_WINS = 0.95  # ours is shown at a larger number of threads only where it takes this much of the time
GATE = 0.9  # a row is kept if its threads got this much of the processors they asked for
ATTEMPTS = 3


@dataclass(frozen=True)
class Case:
    """One row: our call and its peers on the same inputs.

    Attributes:
        shape: what is measured, for people.
        elements: logits (or weights), for the nanoseconds per element.
        bytes_moved: what the contract must read and write, not what the code does.
        flops: multiplications and additions of matrices that the contract asks for; counted on a GPU only.
        inputs: copies that do not fit into the caches together, see `bench.inputs.copies`.
    """

    shape: str
    dtype: torch.dtype
    elements: int
    bytes_moved: int
    inputs: Inputs
    ours: Call
    peers: Mapping[str, Call]
    goals: Sequence[Goal] = ()
    flops: int = 0

    def __post_init__(self) -> None:
        for goal in self.goals:
            if goal.peer is not None and goal.peer not in self.peers:
                raise ValueError(f"{self.shape}: goals: expected one of {list(self.peers)}, got {goal.peer!r}")


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median and percentiles over samples.

    Attributes:
        cores: processor time over wall time.
        waited: time that threads stood in the queue of a processor, over wall time; None where the kernel does not
            count it.
    """

    threads: int
    us: float
    p10_us: float
    p25_us: float
    p75_us: float
    p90_us: float
    cores: float
    waited: float | None
    samples: int

    @property
    def undisturbed(self) -> bool:
        """Whether the threads got the processors they asked for; serial parts ask for one."""
        return self.cores > GATE * max(1.0, self.cores + (self.waited or 0.0))

    @property
    def parallel(self) -> bool:
        """Whether all threads ran all the time (those that wait for each other spin): cpu/wall > 1.8 with two."""
        return self.cores > GATE * self.threads


@dataclass(frozen=True)
class Entrant:
    """A call at every number of threads, fewest first."""

    name: str
    expression: str
    best: Timing
    kept: bool
    timings: list[Timing]


@dataclass(frozen=True)
class Ceiling:
    """This machine's limits with so many threads: reading memory, and torch.exp on float32 in cache."""

    threads: int
    read_gb_per_s: float
    exp_ns: float
    kept: bool


@dataclass(frozen=True)
class Row:
    """reads: our time over that of one read of bytes_moved at the ceiling of the same number of threads."""

    shape: str
    dtype: str
    elements: int
    bytes_moved: int
    ours: Entrant
    ns_per_element: float
    gb_per_s: float
    reads: float
    peers: list[Entrant]
    ratios: list[float]  # each peer's time over ours
    goals: list[Verdict]
    kept: bool


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def expression(call: Call) -> str:
    """What is timed, with the arguments that are bound to it."""
    bound = ["*inputs"]
    if isinstance(call, partial):
        bound += map(_show, call.args)
        bound += (f"{key}={_show(value)}" for key, value in call.keywords.items())
    name, code = source(call)
    return f"{name if code else 'fastdecode.ops.' + name}({', '.join(bound)})"


def source(call: Call) -> tuple[str, str]:
    """Name and code of the function that is timed; no code for our ops."""
    function = call.func if isinstance(call, partial) else call
    if function.__module__.startswith("fastdecode.ops"):
        return function.__name__, ""
    return function.__name__, textwrap.dedent(inspect.getsource(function)).strip()


def _show(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() and bool((value == value.flatten()[0]).all()):
        return f"{value.flatten()[0].item():g} as {_name(value.dtype)}{list(value.shape)}"
    return f"{_name(value.dtype)}{list(value.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class _Series:
    """Samples of one call with one number of threads."""

    index: int  # of the call
    call: Call
    inputs: Inputs
    threads: int
    repeats: int = 1
    turn: int = 0
    call_seconds: float = math.inf
    spent: float = 0.0
    samples: list[tuple[float, float, float]] = field(default_factory=list)  # wall and CPU seconds per call, waited

    def sample(self) -> tuple[float, float, float]:
        """Wall and processor seconds per call, and the part of the wall time spent in queues."""
        if self.call_seconds < SLOW_SECONDS:
            self.call(*self._next(1)[0])  # others had the caches and let the threads fall asleep
        call, inputs = self.call, self._next(self.repeats)
        queued = _queued_seconds()
        cpu, wall = process_time(), perf_counter()
        for arguments in inputs:
            call(*arguments)
        wall, cpu = perf_counter() - wall, process_time() - cpu
        self.spent += wall
        return wall / self.repeats, cpu / self.repeats, max(0.0, _queued_seconds() - queued) / wall

    def _next(self, count: int) -> list[tuple[Any, ...]]:
        start, self.turn = self.turn, self.turn + count
        return [self.inputs[i % len(self.inputs)] for i in range(start, start + count)]

    def enough(self, seconds: float) -> bool:
        least = LEAST_SAMPLES if self.call_seconds < VERY_SLOW_SECONDS else 2
        return self.spent >= seconds and len(self.samples) >= least

    def timing(self) -> Timing:
        walls = [wall for wall, _, _ in self.samples]
        cuts = statistics.quantiles([wall * 1e6 for wall in walls], n=20, method="inclusive")
        total = sum(walls)
        waited = sum(wall * queued for wall, _, queued in self.samples) / total
        return Timing(
            threads=self.threads,
            us=cuts[9],
            p10_us=cuts[1],
            p25_us=cuts[4],
            p75_us=cuts[14],
            p90_us=cuts[17],
            cores=sum(cpu for _, cpu, _ in self.samples) / total,
            waited=waited if _QUEUES_COUNTED else None,
            samples=len(walls),
        )


_QUEUES_COUNTED = os.path.exists("/proc/self/schedstat")


def _queued_seconds() -> float:
    """Time that the threads of this process were ready to run and did not."""
    if not _QUEUES_COUNTED:
        return 0.0
    total = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/schedstat", encoding="ascii") as file:
                total += int(file.read().split()[1])
        except OSError:  # it has ended meanwhile
            continue
    return total * 1e-9


@contextmanager
def _quiet() -> Iterator[None]:
    """Without garbage collection and autograd."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        if collecting:
            gc.enable()


def measure(
    calls: Sequence[tuple[Call, Inputs]], counts: Sequence[int], cpus: Sequence[int], seconds: float
) -> list[list[Timing]]:
    """Time calls with each number of threads.

    Args:
        calls: with their inputs.
        counts: numbers of threads, fewest first.
        cpus: processors that the threads are pinned to.
        seconds: for all calls together; each gets an equal part, but at least four samples (two of a very slow one).
    Returns:
        for each call its timings in the order of `counts`, without those given up.
    """
    pinned = 0

    def pin(count: int) -> None:
        nonlocal pinned
        if count != pinned:
            pinned = pin_threads(count, cpus=cpus)

    share = seconds / (len(calls) * len(counts))
    length = min(SAMPLE_SECONDS, share / LEAST_SAMPLES)
    series: list[_Series] = []
    best = [math.inf] * len(calls)
    with _quiet():
        for count in counts:
            pin(count)
            for index, (call, inputs) in enumerate(calls):
                one = _Series(index, call, inputs, count)
                first = one.sample()[0]  # it may allocate, import, compile
                one.call_seconds = one.sample()[0] if first < VERY_SLOW_SECONDS else first
                if one.call_seconds < 10 * length:  # a second look, at a full sample
                    one.repeats = max(1, int(length / one.call_seconds))
                    one.call_seconds = one.sample()[0]
                    one.repeats = max(1, int(length / one.call_seconds))
                one.spent = 0.0
                if one.call_seconds < GIVE_UP * best[index]:
                    series.append(one)
                best[index] = min(best[index], one.call_seconds)
        waiting = series
        while waiting:
            for order in (waiting, waiting[::-1]):
                for one in order:
                    pin(one.threads)
                    one.samples.append(one.sample())
            waiting = [one for one in waiting if not one.enough(share)]
    return [[one.timing() for one in series if one.index == index] for index in range(len(calls))]


def ceilings(counts: Sequence[int], cpus: Sequence[int], seconds: float = 0.5) -> list[Ceiling]:
    """The fastest of several plain reads of a cold buffer, and torch.exp on 32768 numbers per thread."""
    buffer = torch.ones(max(256 << 20, machine.cold_bytes(list(cpus))) // 4)
    matrix, vector = buffer[: buffer.numel() // 4096 * 4096].view(-1, 4096), torch.ones(4096)

    def read_sum(x: Tensor) -> Tensor:
        return x.sum()

    def read_max(x: Tensor) -> Tensor:
        return x.amax()

    def read_dot(x: Tensor) -> Tensor:
        return torch.dot(x, x)

    def read_mv(x: Tensor) -> Tensor:
        return torch.mv(matrix, vector)

    reads = [(call, [(buffer,)]) for call in (read_sum, read_max, read_dot, read_mv)]
    found = []
    for count in counts:
        numbers = torch.rand(count << 15)
        exp: tuple[Call, Inputs] = (lambda x, out: torch.exp(x, out=out), [(numbers, torch.empty_like(numbers))])
        for _ in range(ATTEMPTS):
            *timings, exponential = [t[0] for t in measure([*reads, exp], [count], cpus, seconds / len(counts))]
            fastest = min(timings, key=lambda timing: timing.us)
            if kept := fastest.parallel and exponential.parallel:
                break
        rate = buffer.numel() * 4 / fastest.us * 1e-3
        found.append(Ceiling(count, rate, exponential.us * 1e3 / numbers.numel(), kept))
    return found


def best_of_ours(timings: Sequence[Timing]) -> Timing:
    """The fastest; more threads must win clearly, since we are held to using all that we claim."""
    chosen = timings[0]
    for timing in timings[1:]:
        if timing.us < LARGER_WINS * chosen.us:
            chosen = timing
    return chosen


def measure_case(case: Case, limits: Sequence[Ceiling], cpus: Sequence[int], seconds: float) -> Row:
    """One row; measured again, up to three times, while it is disturbed."""
    calls = [(call, case.inputs) for call in (case.ours, *case.peers.values())]
    counts = [limit.threads for limit in limits]
    least_disturbed: list[Entrant] = []
    for _ in range(ATTEMPTS):
        entrants = [
            _entrant(name, call, timings, ours=index == 0)
            for index, (name, (call, _), timings) in enumerate(
                zip(("ours", *case.peers), calls, measure(calls, counts, cpus, seconds), strict=True)
            )
        ]
        if not least_disturbed or _num_kept(entrants) > _num_kept(least_disturbed):
            least_disturbed = entrants
        if _num_kept(entrants) == len(entrants):
            break
    return _row(case, least_disturbed, limits)


def _num_kept(entrants: Sequence[Entrant]) -> int:
    return sum(entrant.kept for entrant in entrants)


def _entrant(name: str, call: Call, timings: list[Timing], *, ours: bool) -> Entrant:
    best = best_of_ours(timings) if ours else min(timings, key=lambda timing: timing.us)
    kept = all(timing.undisturbed for timing in timings) and (best.parallel or not ours)
    return Entrant(name, expression(call), best, kept, timings)


def _row(case: Case, entrants: list[Entrant], limits: Sequence[Ceiling]) -> Row:
    ours, *peers = entrants
    limit = next(limit for limit in limits if limit.threads == ours.best.threads)
    us = ours.best.us
    measured = Measured(
        read_us=case.bytes_moved / limit.read_gb_per_s * 1e-3,
        elements=case.elements,
        peers_us={peer.name: peer.best.us for peer in peers},
    )
    needed: dict[str | None, bool] = {None: limit.kept}  # by what a goal depends on
    needed.update((peer.name, peer.kept) for peer in peers)
    return Row(
        shape=case.shape,
        dtype=_name(case.dtype),
        elements=case.elements,
        bytes_moved=case.bytes_moved,
        ours=ours,
        ns_per_element=us * 1e3 / case.elements,
        gb_per_s=case.bytes_moved / us * 1e-3,
        reads=us / measured.read_us,
        peers=peers,
        ratios=[peer.best.us / us for peer in peers],
        goals=[judge(goal, us, measured, kept=ours.kept and needed[goal.peer]) for goal in case.goals],
        kept=_num_kept(entrants) == len(entrants),
    )
