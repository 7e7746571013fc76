"""List the decoding methods and acceptance rules: where each is from, its parameters and what it guarantees."""

from __future__ import annotations

import argparse

from ..methods import METHODS, RULES, Method
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
        row = (method.name, guarantee(method).replace("), ", ")\n"), "\n".join(filter(None, about)))
        table.add_row(*map(Text, row))
    rules = Table("rule", "guarantee", "what it keeps, paper, parameters", show_lines=True)
    for rule in RULES.values():
        parameters = ", ".join(f"{name} = {value}" for name, value in rule.parameters.items())
        lines = filter(None, (rule.about, rule.paper, parameters))
        rules.add_row(*map(Text, (rule.name, rule.guarantee, "\n".join(lines))))
    Console().print(table, rules)
    return 0


def guarantee(method: Method) -> str:
    """Under sampling, by rule: "exact (coupled), in law (ratio, block), approximate (typical, top_beta)"."""
    rules: dict[str, list[str]] = {}
    for rule in method.rules + method.lossy_rules:
        rules.setdefault(method.guarantee(rule, sampled=True), []).append(rule)
    return ", ".join(f"{kind} ({', '.join(names)})" for kind, names in rules.items()) or method.guarantee()
