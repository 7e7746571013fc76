"""List the decoding methods: where each is from, its parts, its parameters and what it guarantees."""

from __future__ import annotations

import argparse

from ..methods import METHODS, Method
from .common import need, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(arguments: argparse.Namespace) -> int:
    if arguments.json:
        keys = ("name", "paper", "parts", "guarantee")
        values = ((m.name, m.paper, list(m.parts), guarantee(m)) for m in METHODS.values())
        print_json([dict(zip(keys, row)) for row in values])
        return 0
    need("rich")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("method", "guarantee", "paper, parts, parameters", show_lines=True)
    for method in METHODS.values():
        parameters = ", ".join(f"{name} = {value}" for name, value in method.parameters.items())
        about = [method.paper, " + ".join(method.parts), parameters]
        row = (method.name, guarantee(method).replace(", ", "\n"), "\n".join(filter(None, about)))
        table.add_row(*map(Text, row))
    Console().print(table)
    return 0


def guarantee(method: Method) -> str:
    """Under greedy decoding and under sampling with each rule: "exact", or "exact (coupled), in law (ratio)"."""
    if not method.rules:
        return method.guarantee()
    return ", ".join(f"{method.guarantee(rule, sampled=True)} ({rule})" for rule in method.rules)
