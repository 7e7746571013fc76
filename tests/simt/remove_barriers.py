"""Removes each barrier of each CUDA kernel in turn and demands that the simulation catches it.

    python tests/simt/remove_barriers.py [--seeds N] [--only WORD]

needs _C_simt. For every __syncthreads and __syncwarp that the random calls reach, the executor makes that one do
nothing, and the calls run under one seed after the other until a result differs from what it is with all of them, the
executor reports a fault, or the process dies. Prints where each barrier was caught; one that no seed catches is
redundant, or our calls do not reach what it is for: exit code 1.

A barrier is a line of the source, whatever templates it is compiled into.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import backends
import fastdecode.ops
import random_calls
from support import same_bits

CALLS = 200  # of each op, from which those that reach a barrier are taken
MOST_CALLS = 40  # per barrier
SECONDS = 20  # for one call, which takes milliseconds: more is a loop without end
Call = tuple[str, int]  # op, seed of random_calls


@dataclass
class Barrier:
    site: str  # file:line
    kind: str
    calls: list[Call] = field(default_factory=list)


class Executor:
    """The C interface of csrc/simt/executor.h."""

    def __init__(self) -> None:
        self.simt = backends.Simt(seed=0)
        self.library = self.simt.library
        for name in ("barrier_site", "barrier_kind"):
            getattr(self.library, f"fastdecode_simt_{name}").restype = ctypes.c_char_p
        self.library.fastdecode_simt_barrier_executions.restype = ctypes.c_uint64
        self.ops = backends.Ops(self.simt.once)

    def barriers(self) -> Iterator[tuple[str, str, int]]:
        """Site, kind and number of executions so far."""
        for i in range(self.library.fastdecode_simt_barrier_count()):
            yield (
                self.library.fastdecode_simt_barrier_site(i).decode(),
                self.library.fastdecode_simt_barrier_kind(i).decode(),
                self.library.fastdecode_simt_barrier_executions(i),
            )

    def skip(self, site: str) -> None:
        self.library.fastdecode_simt_skip_barrier(site.encode())

    def expected(self, call: Call) -> list[torch.Tensor]:
        """What the CPU gives; where only nearly the same can be asked, what the executor gives."""
        if call[0] in random_calls.ROUNDED:
            return self.run(call, seed=0)
        return random_calls.outputs(fastdecode.ops, call[0], random_calls.call(*call))

    def run(self, call: Call, seed: int) -> list[torch.Tensor]:
        self.simt.configure(seed, seed % 2)
        return random_calls.outputs(self.ops, call[0], random_calls.call(*call))


def survey(executor: Executor, only: str) -> dict[str, Barrier]:
    """The barriers that the random calls reach, each with calls that do, most executions first."""
    found: dict[str, Barrier] = {}
    weights: dict[tuple[str, Call], int] = {}
    before: dict[str, int] = {}
    for op in random_calls.OPS:
        for number in range(CALLS):
            executor.run((op, number), seed=0)
            for site, kind, count in executor.barriers():
                if count > before.get(site, 0):
                    found.setdefault(site, Barrier(site, kind)).calls.append((op, number))
                    weights[site, (op, number)] = count - before.get(site, 0)
                before[site] = count
    for barrier in found.values():
        by_op: dict[str, list[Call]] = {}
        for call in sorted(barrier.calls, key=lambda call: -weights[barrier.site, call]):
            by_op.setdefault(call[0], []).append(call)
        share = max(2, MOST_CALLS // len(by_op))  # of every op: they use what they share differently
        telling = [call for call in barrier.calls if call[1] < len(random_calls.TELLING.get(call[0], ()))]
        barrier.calls = telling + [call for calls in by_op.values() for call in calls[:share] if call not in telling]
    return {site: barrier for site, barrier in sorted(found.items()) if only in site}


def hunt(
    expected: dict[Call, list[torch.Tensor]],
    seeds: int,
    run: Callable[[Call, int], list[torch.Tensor]],
    tell: Callable[[str], None],
) -> None:
    """Tells what it is about to do, then ends with a verdict that begins with "caught", or with "survived"."""
    for seed in range(seeds):
        for call in expected:
            where = f"{call[0]} #{call[1]}, seed {seed}"
            tell(where)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                out = run(call, seed)
            except RuntimeError as error:
                signal.setitimer(signal.ITIMER_REAL, 0)
                tell(f"caught by {where}: report: {' '.join(str(error).split())}")
                return
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not all(map(same_bits, expected[call], out)):
                tell(f"caught by {where}: other result")
                return
    tell("survived")


def verdict(executor: Executor, barrier: Barrier, seeds: int) -> str:
    """In a process of its own: without the barrier a kernel may write anywhere, or never end."""
    here, there = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        expected = {call: executor.expected(call) for call in barrier.calls}
        executor.skip(barrier.site)
        hunt(expected, seeds, executor.run, there.send)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    there.close()
    last = "nothing"
    try:
        while True:
            last = here.recv()
    except EOFError:
        process.join()
    if process.exitcode == -signal.SIGALRM:
        return f"caught by {last}: never ends"
    if process.exitcode and process.exitcode < 0:
        return f"caught by {last}: {signal.Signals(-process.exitcode).name}"
    if process.exitcode:
        raise RuntimeError(f"the process for {barrier.site} ended with {process.exitcode} after {last}")
    return last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=60, help="orders of threads to try before a barrier survives")
    parser.add_argument("--only", default="", help="barriers whose file:line holds this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    executor = Executor()
    barriers = survey(executor, arguments.only)
    if not barriers:
        raise SystemExit(f"no barrier with {arguments.only!r} in its place")
    # The same hunt with every barrier in place: what it finds then would not be the removed barrier's fault.
    everything = Barrier("none:0", "", sorted({call for barrier in barriers.values() for call in barrier.calls}))
    control = verdict(executor, everything, 2)
    if control != "survived":
        print(f"with all barriers in place: {control}")
        return 1
    survivors = []
    width = max(map(len, barriers))
    for site, barrier in barriers.items():
        start = time.monotonic()
        found = verdict(executor, barrier, arguments.seeds)
        ops = ", ".join(sorted({call[0] for call in barrier.calls}))
        print(f"{site:<{width}}  {barrier.kind:<20} {found} ({time.monotonic() - start:.1f} s; {ops})", flush=True)
        if not found.startswith("caught"):
            survivors.append(site)
    print(f"{len(barriers)} barriers, {len(survivors)} survived: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
