"""Measure the ops beside their peers and the limits of this machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .common import UserError, need, status_line

_PACKAGE = "fastdecode.bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True, parser_class=type(parser))
    summary = "every op beside the best expressions of it in torch"
    ops = kinds.add_parser("ops", help=summary, description=summary, allow_abbrev=False)
    ops.add_argument("--op", metavar="NAME", nargs="+", action="extend", help="only these; default: all")
    add_options(ops)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that a single benchmark file takes too."""
    parser.add_argument("--quick", action="store_true", help="few small shapes")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="per row; default 0.5")
    parser.add_argument("--threads", type=int, metavar="N", help="most threads; default: all processors")
    parser.add_argument("--json", metavar="DIR", help="also write DIR/<op>.json")
    parser.add_argument("--check", action="store_true", help="end with code 1 if a goal is not met")
    parser.add_argument("--verbose", action="store_true", help="also show the code that was timed")


def run(arguments: argparse.Namespace) -> int:
    return run_options(benchmarks("report"), arguments.op, arguments)


def run_options(report: ModuleType, ops: list[str] | None, arguments: argparse.Namespace) -> int:
    """Hand the options to `bench.report`."""
    need("rich")
    folder = Path(arguments.json) if arguments.json is not None else None
    with status_line() as progress:
        return report.run(
            ops,
            quick=arguments.quick,
            seconds=arguments.seconds,
            threads=arguments.threads,
            folder=folder,
            check=arguments.check,
            verbose=arguments.verbose,
            progress=progress,
        )


def benchmarks(module: str) -> ModuleType:
    """A module of `fastdecode.bench`: of the installed one, else of the checkout that this file lies in."""
    if importlib.util.find_spec(_PACKAGE) is None:
        file = Path(__file__).parents[3] / "bench" / "__init__.py"
        spec = importlib.util.spec_from_file_location(_PACKAGE, file) if file.is_file() else None
        if spec is None or spec.loader is None:
            raise UserError("bench: this installation has no benchmarks: install fastdecode again")
        package = importlib.util.module_from_spec(spec)
        sys.modules[_PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_PACKAGE}.{module}")
