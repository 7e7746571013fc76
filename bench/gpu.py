"""The benchmarks on a GPU: `python -m bench.gpu --json bench/results`.

Every call is captured in a CUDA graph and replayed, so that Python is not timed, and is shown beside its peers, an
empty kernel in a graph of the same form, and the copy of a large buffer, all measured in one process:

- *us*: a graph of many calls, whose inputs together take three times the second-level cache and are used in turn, over
  the number of calls.
- *cold*: a graph of one call, after something else was read into the cache; the launch of the graph is in it.
- *floor*: a graph of as many empty kernels, and of one. No call can be faster.
- *copy*: bytes read plus bytes written per second by a device-to-device copy. A row's *limit* is the largest of the
  time that this takes for the bytes of the op's contract, the time that torch's product of large bfloat16 matrices
  takes for its multiplications, and the floor.

A call that cannot be captured is timed as it is, one by one; it is marked `stream`.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from . import gpu_peers, machine
from .harness import Call, Case, Inputs, expression
from .report import _json, _rounded, ops

FAILED, NO_GPU, NO_TRITON = 1, 2, 3  # exit codes
LEAST_CALLS = 64  # of a graph: the next one is launched before it ends
MOST_CALLS = 256
LEAST_SAMPLES = 5
COMPILE_SHARE = 0.5  # of an op's time: after it, peers are no longer compiled


class Gpu(Protocol):
    """What the measurements need of a device."""

    l2_bytes: int

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        """A function that runs them all again, without Python; it raises where they cannot be captured."""

    def time_us(self, run: Callable[[], object], samples: int, *, cold: bool = False) -> list[float]:
        """Microseconds of each of so many runs; cold: something else was read into the second-level cache before."""


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self.l2_bytes: int = properties.L2_cache_size
        self._flush = torch.ones(3 * self.l2_bytes // 4, device="cuda")

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()  # allocates, loads, compiles
            # What waits for the GPU cannot be captured, and must not try: torch's random generator does not recover.
            torch.cuda.set_sync_debug_mode("error")
            try:
                calls[-1]()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay  # type: ignore[no-any-return]

    def time_us(self, run: Callable[[], object], samples: int, *, cold: bool = False) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
        for begin, end in pairs:
            if cold:
                self._flush.sum()  # a read: what is written would have to leave the cache in the time that is taken
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median and quartiles over samples. form: graph or stream."""

    us: float
    p25_us: float
    p75_us: float
    samples: int
    form: str


@dataclass(frozen=True)
class Entrant:
    """One call; error says why there are no times."""

    name: str
    expression: str
    rotated: Timing | None = None
    cold: Timing | None = None
    error: str | None = None


@dataclass(frozen=True)
class Limits:
    """floor_us: an empty kernel in a graph of many; cold_floor_us: in a graph of one."""

    copy_gb_per_s: float
    floor_us: float
    cold_floor_us: float
    l2_bytes: int
    matmul_tflops: float

    def us(self, bytes_moved: int, flops: int = 0) -> float:
        return max(self.floor_us, bytes_moved / self.copy_gb_per_s * 1e-3, flops / self.matmul_tflops * 1e-6)


@dataclass(frozen=True)
class Row:
    """Entrants: ours first. of_limit: the limit over our time, 1 is as fast as it can be; ratios: peers over ours."""

    op: str
    shape: str
    dtype: str
    elements: int
    bytes_moved: int
    flops: int
    entrants: list[Entrant]
    gb_per_s: float | None
    limit_us: float
    of_limit: float | None
    ratios: list[float | None]


@dataclass
class Report:
    device: dict[str, Any]
    limits: Limits
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # for want of time


@dataclass
class _Runner:
    """A captured call and its samples."""

    entrant: Entrant
    run: Callable[[], object] | None = None
    calls: int = 1
    form: str = "graph"
    one: Callable[[], object] | None = None
    rotated: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)

    def done(self) -> Entrant:
        if self.run is None:
            return self.entrant
        both = [_timing(samples, self.form) for samples in (self.rotated, self.cold)]
        return Entrant(self.entrant.name, self.entrant.expression, both[0], both[1])


def _timing(samples: Sequence[float], form: str) -> Timing:
    cuts = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(cuts[1], cuts[0], cuts[2], len(samples), form)


def in_turn(call: Call, inputs: Inputs) -> list[Callable[[], object]]:
    """Calls for one graph: all inputs equally often."""
    rounds = max(1, -(-LEAST_CALLS // len(inputs)))
    return [partial(call, *arguments) for arguments in list(inputs)[:MOST_CALLS] * rounds]


def _prepare(gpu: Gpu, name: str, call: Call, inputs: Inputs) -> _Runner:
    entrant = Entrant(name, expression(call))
    calls = in_turn(call, inputs)
    try:
        calls[0]()
    except Exception as error:  # a peer of another version must not end the run; the row shows what it said
        return _Runner(Entrant(entrant.name, entrant.expression, error=f"{type(error).__name__}: {error}"))
    try:
        return _Runner(entrant, gpu.capture(calls), len(calls), "graph", gpu.capture(calls[:1]))
    except Exception:  # whatever capture refuses, it can still be timed

        def everything() -> None:
            for one in calls:
                one()

        return _Runner(entrant, everything, len(calls), "stream", calls[0])


def measure(gpu: Gpu, calls: dict[str, tuple[Call, Inputs]], seconds: float) -> list[Entrant]:
    """Time calls A, B, ..., B, A, for `seconds` together, but at least LEAST_SAMPLES each."""
    runners = [_prepare(gpu, name, call, inputs) for name, (call, inputs) in calls.items()]
    able = [runner for runner in runners if runner.run is not None]
    end, rounds = perf_counter() + seconds, 0
    while able and (rounds < LEAST_SAMPLES or perf_counter() < end):
        for runner in able if rounds % 2 == 0 else able[::-1]:
            assert runner.run is not None and runner.one is not None
            runner.rotated += [us / runner.calls for us in gpu.time_us(runner.run, 2)[1:]]  # the first one warms up
            runner.cold += gpu.time_us(runner.one, 1, cold=True)
        rounds += 1
    return [runner.done() for runner in runners]


def copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def limits(gpu: Gpu, nothing: Call, seconds: float, copy_bytes: int = 1 << 30, size: int = 8192) -> Limits:
    """The floor by `nothing`, a call that launches an empty kernel; the ceilings by a buffer and by square matrices."""
    pair = torch.ones(copy_bytes, dtype=torch.uint8), torch.zeros(copy_bytes, dtype=torch.uint8)
    matrices = tuple(torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    calls: dict[str, tuple[Call, Inputs]] = {
        "empty kernel": (nothing, [()]),
        "copy": (copy, [pair]),
        "matmul": (matmul, [matrices]),
    }
    floor, copied, product = found = measure(gpu, calls, seconds)
    if floor.rotated is None or floor.cold is None or copied.rotated is None or product.rotated is None:
        raise RuntimeError("bench.gpu: " + "; ".join(f"{entrant.name}: {entrant.error}" for entrant in found))
    copy_gb_per_s = 2 * copy_bytes / copied.rotated.us * 1e-3
    tflops = 2 * size**3 / product.rotated.us * 1e-6
    return Limits(copy_gb_per_s, floor.rotated.us, floor.cold.us, gpu.l2_bytes, tflops)


def row_of(op: str, case: Case, entrants: list[Entrant], limit: Limits) -> Row:
    us = entrants[0].rotated.us if entrants[0].rotated else None
    bound = limit.us(case.bytes_moved, case.flops)
    return Row(
        op=op,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        elements=case.elements,
        bytes_moved=case.bytes_moved,
        flops=case.flops,
        entrants=entrants,
        gb_per_s=case.bytes_moved / us * 1e-3 if us else None,
        limit_us=bound,
        of_limit=bound / us if us else None,
        ratios=[peer.rotated.us / us if peer.rotated and us else None for peer in entrants[1:]],
    )


def entrants_of(op: str, case: Case, compiled: bool) -> dict[str, tuple[Call, Inputs]]:
    """Ours, torch as it is, torch compiled, and the peers written for GPUs."""
    calls: dict[str, tuple[Call, Inputs]] = {"fastdecode": (case.ours, case.inputs)}
    for name, peer in case.peers.items():
        calls[name] = peer, case.inputs
        if compiled and name.startswith("torch"):
            calls[f"{name}, compiled"] = gpu_peers.compiled(peer), case.inputs
    for name, peer in gpu_peers.of(op, case).items():
        calls[name] = peer, case.inputs
    return calls


def run(
    gpu: Gpu,
    names: Sequence[str],
    *,
    device: dict[str, Any],
    quick: bool = False,
    seconds: float = 0.2,
    limit_seconds: float = 540.0,
    progress: Callable[[str], None] = lambda text: None,
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Measure ops on the default device.

    Args:
        seconds: per row, once everything is compiled.
        limit_seconds: of all; an op that has used up its part leaves out what is left of it, which the report names.
        save: is given the report after every op.
    """
    start = perf_counter()
    report = Report(device, limits(gpu, gpu_peers.nothing, seconds))
    for i, name in enumerate(names):
        begin = perf_counter()
        share = (start + limit_seconds - begin) / (len(names) - i)
        cases = importlib.import_module(f".ops.bench_{name}", __package__).cases(quick)
        for case in cases:
            spent = perf_counter() - begin
            label = f"{name}: {case.shape} {str(case.dtype).removeprefix('torch.')}"
            if spent > share:
                report.left_out.append(label)
                continue
            progress(label)
            found = measure(gpu, entrants_of(name, case, spent < COMPILE_SHARE * share), seconds)
            report.rows.append(row_of(name, case, found, report.limits))
        save(report)
    return report


def table(report: Report) -> str:
    """For people."""
    limit = report.limits
    lines = [
        f"{report.device.get('device')}: copy {limit.copy_gb_per_s:.0f} GB/s (read + written), empty kernel "
        f"{limit.floor_us:.2f} us in a graph of many, {limit.cold_floor_us:.2f} us in a graph of one, products of "
        f"bfloat16 matrices {limit.matmul_tflops:.0f} TFLOP/s",
        f"{'':44} {'us':>9} {'cold':>9} {'GB/s':>7} {'limit':>8} {'of it':>6} {'x ours':>7}",
    ]
    for row in report.rows:
        for i, entrant in enumerate(row.entrants):
            name = f"{row.op} {row.shape} {row.dtype}" if i == 0 else f"  {entrant.name}"
            if entrant.rotated is None or entrant.cold is None:
                lines.append(f"{name:44} {entrant.error}")
                continue
            line = f"{name:44} {entrant.rotated.us:9.2f} {entrant.cold.us:9.2f}"
            if i == 0 and row.gb_per_s is not None and row.of_limit is not None:
                line += f" {row.gb_per_s:7.0f} {row.limit_us:8.2f} {row.of_limit:6.2f}"
            elif i > 0 and (ratio := row.ratios[i - 1]) is not None:
                line += f" {ratio:31.2f}"
            lines.append(line + ("" if entrant.rotated.form == "graph" else "  stream"))
    lines += [f"left out for want of time: {label}" for label in report.left_out]
    return "\n".join(lines)


def failures(report: Report) -> list[Row]:
    """Rows that our call could not run; a peer's failure stands in its row and is no failure of ours."""
    return [row for row in report.rows if row.entrants[0].error is not None]


def describe() -> dict[str, Any]:
    """The GPU, its clocks as they are now, versions, commit."""
    properties = torch.cuda.get_device_properties()
    value = machine.describe([])
    versions = {**value["versions"], "cuda": torch.version.cuda, **gpu_peers.versions()}
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": gpu_peers.smi("driver_version"),
        "clock_mhz": {"sm": gpu_peers.smi("clocks.sm"), "memory": gpu_peers.smi("clocks.mem")},
        "host": value["device"],
        "versions": versions,
        **{key: value[key] for key in ("commit", "modified", "date")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="The ops on a GPU, beside their peers.")
    parser.add_argument("--op", metavar="NAME", nargs="+", choices=ops(), default=ops(), help="default: all")
    parser.add_argument("--quick", action="store_true", help="few small shapes")
    parser.add_argument("--seconds", type=float, default=0.2, metavar="S", help="per row; default 0.2")
    parser.add_argument("--limit", type=float, default=540.0, metavar="S", help="of all rows; default 540")
    parser.add_argument("--json", type=Path, metavar="DIR", help="also write DIR/gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: there is no GPU that torch can use", file=sys.stderr)
        return NO_GPU
    if not gpu_peers.has_triton():
        print("bench.gpu: expected Triton beside torch: pip install triton", file=sys.stderr)
        return NO_TRITON
    folder = arguments.json
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def save(report: Report) -> None:
        if folder is not None:
            (folder / "gpu.json").write_text(_json(_rounded(asdict(report))), encoding="utf-8")

    torch.manual_seed(0)
    torch.set_default_device("cuda")
    with torch.inference_mode():
        report = run(
            Cuda(),
            arguments.op,
            device=describe(),
            quick=arguments.quick,
            seconds=arguments.seconds,
            limit_seconds=arguments.limit,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
            save=save,
        )
    print(table(report))
    return FAILED if failures(report) else 0


if __name__ == "__main__":
    sys.exit(main())
