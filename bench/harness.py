"""Timing of an op beside its peers, in one process: A, B, B, A order, medians, and this machine's read bandwidth.

Run a benchmark as a module from the repository root: `python -m bench.ops.bench_sample --json out.json`.
Pin the threads (OMP_PROC_BIND=true OMP_PLACES=cores): unpinned spinning threads stack on one core and halve a number.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastdecode

Call = Callable[[int], object]  # gets the number of the input copy to use

_COLD_BYTES = 96 << 20  # more than the last-level caches that we run on
_SAMPLE_SECONDS = 2e-3  # a sample repeats the call until it is this long, so that the clock does not matter


@dataclass(frozen=True)
class Case:
    """One row of the table. `bytes_moved` is what the contract must read and write, not what the code does."""

    shape: str
    bytes_moved: int
    ours: Call
    peers: dict[str, Call]


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the samples; cores = CPU time over wall time, to see a stacked thread."""

    median_us: float
    p10_us: float
    p90_us: float
    cores: float


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    ours: Timing
    gb_per_s: float
    fraction_of_bandwidth: float
    peer: str
    peer_timing: Timing
    ratio: float  # peer's time over ours


def copies(tensor: Tensor) -> list[Tensor]:
    """Enough copies of an input to fall out of the caches when they are used in turn."""
    size = tensor.numel() * tensor.element_size()
    return [tensor.clone() for _ in range(max(2, min(256, -(-_COLD_BYTES // max(size, 1)))))]


def _timing(samples: list[tuple[float, float]]) -> Timing:
    walls = sorted(wall for wall, _ in samples)
    tenths = statistics.quantiles(walls, n=10, method="inclusive")
    cores = sum(cpu for _, cpu in samples) / sum(walls)
    return Timing(statistics.median(walls) * 1e6, tenths[0] * 1e6, tenths[-1] * 1e6, cores)


def measure(calls: Sequence[Call], seconds: float) -> list[Timing]:
    """Times each call, interleaved so that a slow second of the machine falls on all of them."""
    counters = [0] * len(calls)
    samples: list[list[tuple[float, float]]] = [[] for _ in calls]

    def sample(which: int, repeats: int) -> tuple[float, float]:
        call, first = calls[which], counters[which]
        counters[which] += repeats
        wall, cpu = time.perf_counter(), time.process_time()
        for i in range(first, first + repeats):
            call(i)
        return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats

    repeats = []
    for which in range(len(calls)):
        sample(which, 3)
        repeats.append(max(1, int(_SAMPLE_SECONDS / sample(which, 3)[0])))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < 6:
        for which in (*range(len(calls)), *reversed(range(len(calls)))):
            samples[which].append(sample(which, repeats[which]))
    return [_timing(s) for s in samples]


def read_bandwidth(seconds: float = 0.5) -> float:
    """Bytes per second of the fastest plain read at hand: the limit that rows are compared with."""
    buffer = torch.ones(64 << 20, dtype=torch.float32)
    probes: list[Call] = [lambda _: buffer.sum(), lambda _: buffer.max(), lambda _: torch.dot(buffer, buffer)]
    return buffer.numel() * 4 / (min(t.median_us for t in measure(probes, seconds)) * 1e-6)


def environment() -> dict[str, object]:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return result.stdout.strip()

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "device": cpu,
        "threads": torch.get_num_threads(),
        "cpu_levels": list(fastdecode.cpu_levels()),
        "versions": {
            "fastdecode": fastdecode.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--", "../csrc", "../python")),
    }


def _line(row: Row) -> str:
    return (
        f"{row.shape:34} {row.ours.median_us:10.1f} [{row.ours.p10_us:9.1f} {row.ours.p90_us:9.1f}] "
        f"{row.gb_per_s:7.1f} {100 * row.fraction_of_bandwidth:5.0f} % {row.ours.cores:5.2f}   "
        f"{row.peer:26} {row.peer_timing.median_us:10.1f} {row.ratio:7.2f}x"
    )


def main(op: str, cases: Callable[[], Iterator[Case]]) -> None:
    parser = argparse.ArgumentParser(description=f"Benchmark of {op}")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    bandwidth = read_bandwidth()
    print(f"{op}: {options.threads} threads, measured read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(
        f"{'shape':34} {'us':>10} [{'p10':>9} {'p90':>9}] {'GB/s':>7} {'of bw':>7} {'cores':>5}   "
        f"{'peer':26} {'us':>10} {'ratio':>8}"
    )
    rows: list[Row] = []
    for case in cases():
        ours, *peers = measure([case.ours, *case.peers.values()], options.seconds)
        rate = case.bytes_moved / (ours.median_us * 1e-6)
        for name, peer in zip(case.peers, peers, strict=True):
            rows.append(
                Row(op, case.shape, ours, rate / 1e9, rate / bandwidth, name, peer, peer.median_us / ours.median_us)
            )
            print(_line(rows[-1]), flush=True)
    if options.json:
        report = {"op": op, **environment(), "read_gb_per_s": bandwidth / 1e9, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
