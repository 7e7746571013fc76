"""Runs the benchmarks of the ops; shows each as a table, and writes each as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastdecode.runtime import pin_threads, thread_settings

from . import machine
from . import ops as ops_package
from .harness import Case, Ceiling, Entrant, Row, ceilings, measure_case, source, thread_counts

_PREFIX = "bench_"


@dataclass(frozen=True)
class Report:
    """All rows of one op."""

    op: str
    threads: list[int]
    seconds: float
    quick: bool
    ceilings: list[Ceiling]
    sources: dict[str, str]  # of the functions in the rows' expressions
    rows: list[Row]


def ops() -> list[str]:
    """Those with a benchmark."""
    names = (module.name for module in pkgutil.iter_modules(ops_package.__path__))
    return sorted(name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))


def run(
    names: Sequence[str] | None = None,
    *,
    quick: bool = False,
    seconds: float = 0.5,
    threads: int | None = None,
    folder: Path | None = None,
    check: bool = False,
    verbose: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Measure, show, write.

    Args:
        names: of ops; None means all.
        quick: few small shapes instead of those that are quoted.
        seconds: per row, for our call and its peers at all numbers of threads together.
        threads: most threads; None means one for each usable processor.
        folder: where <op>.json is written, made if it is not there.
        check: whether a goal that is not met counts.
        verbose: show the code that was timed.
        progress: is told what happens next.
    Returns:
        1 with check, where a goal was missed or could not be judged; 0 otherwise.
    Raises:
        ValueError: an unknown op, a number out of range.
    """
    chosen = ops() if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in ops():
            raise ValueError(f"bench: --op: expected one of {', '.join(ops())}, got {name!r}")
    if not seconds > 0:
        raise ValueError(f"bench: --seconds: expected more than 0, got {seconds:g}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    failed = False
    with thread_settings() as cpus:
        most = len(cpus) if threads is None else threads
        pin_threads(most, cpus=cpus)  # refuses a number that cannot be had
        for name in chosen:
            before = machine.describe(cpus)
            report = _measure(name, thread_counts(most), cpus, quick, seconds, progress)
            if folder is not None:
                value = {"machine": before, "load_average_after": os.getloadavg(), **asdict(report)}
                (folder / f"{name}.json").write_text(_json(_rounded(value)), encoding="utf-8")
            progress("")
            _show(report, verbose)
            failed |= any(verdict.met is not True for row in report.rows for verdict in row.goals)
    return int(check and failed)


def _measure(
    name: str, counts: list[int], cpus: list[int], quick: bool, seconds: float, progress: Callable[[str], None]
) -> Report:
    module = importlib.import_module(f"{ops_package.__name__}.{_PREFIX}{name}")
    progress(f"{name}: read bandwidth")
    limits = ceilings(counts, cpus, min(0.25 * len(counts), 10 * seconds))
    torch.manual_seed(0)
    rows: list[Row] = []
    sources: dict[str, str] = {}
    cases: Iterator[Case] = module.cases(quick)
    for case in cases:
        sources.update(source(call) for call in (case.ours, *case.peers.values()))
        progress(f"{name}: {case.shape} {str(case.dtype).removeprefix('torch.')}")
        rows.append(measure_case(case, limits, cpus, seconds))
    sources = {function: code for function, code in sources.items() if code}
    return Report(name, counts, seconds, quick, limits, sources, rows)


def _json(value: dict[str, Any]) -> str:
    """Indented, with each row in one line."""
    rows = ",\n  ".join(json.dumps(row) for row in value["rows"])
    return json.dumps({**value, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def _rounded(value: Any) -> Any:
    """Floats to 4 digits; more is noise."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# --- for people -------------------------------------------------------------------------------------------------------


def _show(report: Report, verbose: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    limits = "; ".join(
        f"{_threads(limit.threads)}: read {limit.read_gb_per_s:.1f} GB/s, exp {limit.exp_ns:.2f} ns"
        + ("" if limit.kept else " (!)")
        for limit in report.ceilings
    )
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name, justify in (
        ("case", "left"),
        ("thr", "right"),
        ("us", "right"),
        ("p25..p75", "right"),
        ("ns/el", "right"),
        ("GB/s", "right"),
        ("reads", "right"),
        ("goals", "left"),
        ("peer", "left"),
        ("thr", "right"),
        ("us", "right"),
        ("x ours", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in report.rows:
        best = row.ours.best
        cells = [
            f"{row.shape} {row.dtype}",
            str(best.threads),
            _us(row.ours),
            f"{best.p25_us:.1f}..{best.p75_us:.1f}",
            f"{row.ns_per_element:.3f}",
            f"{row.gb_per_s:.1f}",
            f"{row.reads:.2f}" if row.reads < 100 else "-",
            _goals(row),
        ]
        for peer, ratio in zip(row.peers, row.ratios, strict=True):
            table.add_row(*cells, peer.name, str(peer.best.threads), _us(peer), f"{ratio:.2f}")
            cells = [""] * len(cells)
        if not row.peers:
            table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False, markup=False)
    console.print(f"{report.op} ({limits})", soft_wrap=True)
    console.print(table)
    for row in report.rows:
        for verdict in row.goals:
            if verdict.met is not True:
                what = "not judged" if verdict.met is None else "missed"
                text = f"{what}: {row.shape} {row.dtype}: {verdict.goal}: {row.ours.best.us:.1f} us"
                console.print(f"{text}, limit {verdict.limit_us:.1f} us", soft_wrap=True)
    if not all(row.kept for row in report.rows) or not all(limit.kept for limit in report.ceilings):
        console.print("!  disturbed by other programs: this time does not count")
    if verbose:
        for row in report.rows:
            for entrant in (row.ours, *row.peers):
                console.print(f"{row.shape} {row.dtype}: {entrant.name}: {entrant.expression}", soft_wrap=True)
        for code in report.sources.values():
            console.print(f"\n{code}", soft_wrap=True)
    console.print()


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _us(entrant: Entrant) -> str:
    return f"{entrant.best.us:.1f}" + (" " if entrant.kept else "!")


def _goals(row: Row) -> str:
    verdicts = [{True: "met", False: "missed", None: "?"}[verdict.met] for verdict in row.goals]
    return verdicts[0] if len(set(verdicts)) == 1 else " ".join(verdicts)


def main(file: str) -> NoReturn:
    """The command of one benchmark file: `python -m bench.ops.bench_sample --quick`."""
    from fastdecode.cli.bench import add_options, run_options

    name = Path(file).stem.removeprefix(_PREFIX)
    parser = argparse.ArgumentParser(prog=f"{_PREFIX}{name}", description=f"Benchmark of {name}.")
    add_options(parser)
    sys.exit(run_options(sys.modules[__name__], [name], parser.parse_args()))
