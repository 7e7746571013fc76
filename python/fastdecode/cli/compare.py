"""Measure methods beside plain decoding, and beside transformers, on the same checkpoint and prompts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import train
from ..compare import Row, compare
from ..methods import find_method
from .common import (
    DTYPES,
    UserError,
    add_model_arguments,
    model_folder,
    need,
    print_json,
    read_text,
    read_tokenizer,
    status_line,
)

PROMPTS = Path(train.__path__[0]) / "data" / "heldout_prompts.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", metavar="A,B,C", help="default: all that bring no cache of their own; plain is always measured"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON list of texts, or of objects with a key prompt; or .txt, a prompt per line; "
        "default: headers of functions held out of tiny-code's training",
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="default: 10, or all of --prompts")
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts decoded together; default 1")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="passes over the prompts; default 1")
    parser.add_argument("--no-peers", action="store_true", help="without transformers")
    parser.add_argument("--out", metavar="FILE", help="write the JSON here too")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.json:
        need("rich")
    methods = arguments.methods.split(",") if arguments.methods else None
    for name in methods or ():
        find_method(name)
    folder = model_folder(arguments.model)
    draft = arguments.draft_model
    if arguments.model is None or draft is not None:
        draft = model_folder(draft, "tiny-code-draft")
    if arguments.out is not None and not Path(arguments.out).absolute().parent.is_dir():
        raise UserError(f"--out: no folder for {arguments.out!r}")  # before a minute of measuring, not after it
    texts = _prompts(arguments.prompts, arguments.num_prompts)
    tokenizer = read_tokenizer(folder)
    with status_line() as progress:
        rows = compare(
            folder,
            [tokenizer.encode(text) for text in texts],
            draft_model=draft,
            methods=methods,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            draft_length=arguments.draft_length,
            batch=arguments.batch,
            repeats=arguments.repeats,
            dtype=DTYPES[arguments.dtype],
            threads=arguments.threads,
            kv_cache=arguments.kv_cache,
            peers=not arguments.no_peers,
            progress=progress,
        )
    values = [{**asdict(row), "spread": list(row.spread)} for row in rows]
    if arguments.out is not None:
        Path(arguments.out).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if arguments.json:
        print_json(values)
    else:
        _show(rows, len(texts))
    return 0


def _prompts(path: str | None, most: int | None) -> list[str]:
    if most is not None and most < 1:
        raise UserError(f"--num-prompts: expected at least 1, got {most}")
    name = str(PROMPTS) if path is None else path
    text = read_text(name)
    if name.endswith(".txt"):
        texts: list[Any] = [line for line in text.splitlines() if line.strip()]
    else:
        try:
            items = json.loads(text)
        except ValueError as error:
            raise UserError(f"--prompts: {name!r} is no JSON: {error}") from error
        items = items if isinstance(items, list) else []
        texts = [item.get("prompt") if isinstance(item, dict) else item for item in items]
    if not texts or not all(isinstance(item, str) and item for item in texts):
        raise UserError(f"--prompts: expected texts in {name!r}, at least one and none empty")
    if most is None:
        return texts[:10] if path is None else texts
    return texts[:most]


def _show(rows: list[Row], num_prompts: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), caption=f"prompts: {num_prompts}; spread: 10th to 90th percentile")
    table.add_column("method", overflow="fold")  # the one that gives way on a narrow terminal
    for name in ("guarantee", "same as\nplain"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens\n/pass", "passes", "tokens\n/s", "spread", "x plain", "distinct\n4-grams"):
        table.add_column(name, no_wrap=True, justify="right")
    same = {True: "yes", False: "NO", None: "-"}
    for row in rows:
        table.add_row(
            row.method,
            row.guarantee,
            same[row.same_as_plain],
            f"{row.tokens_per_pass:.2f}",
            str(row.passes),
            f"{row.tokens_per_s:.0f}",
            "..".join(f"{bound:.0f}" for bound in row.spread),
            f"{row.tokens_per_s / rows[0].tokens_per_s:.2f}",
            f"{row.distinct_4gram:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)
