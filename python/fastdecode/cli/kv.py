"""Measure what key-value cache schemes cost and save on a model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from .. import kv_report
from ..models import NativeModel, Tokenizer
from ..runtime import tune_threads
from ..train import corpus
from .common import UserError, model_folder, need, print_json, read_model, read_text, read_tokenizer, status_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to do", metavar="WHAT", required=True, parser_class=type(parser))
    summary = "size, error and held-out perplexity of every scheme"
    report = kinds.add_parser("report", help=summary, description=summary, allow_abbrev=False)
    report.add_argument("--model", metavar="PATH", help="Hugging Face folder; default: the shipped model")
    report.add_argument(
        "--scheme", metavar="NAME", nargs="+", action="extend", help=f"default: {' '.join(kv_report.SCHEMES)}"
    )
    report.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text to score, - for stdin; default: the files of the Python standard library that the shipped "
        "model was not trained on",
    )
    report.add_argument("--tokens", type=int, default=8192, metavar="N", help="to score, at most; default 8192")
    report.add_argument(
        "--context", type=int, metavar="N", help="most tokens read in one piece; default: the model's most, up to 2048"
    )
    report.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="of the weights")
    report.add_argument("--plot", metavar="FILE", help="also draw a picture, PNG or SVG by its suffix")
    report.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(arguments: argparse.Namespace) -> int:
    need("matplotlib", "rich") if arguments.plot else need("rich")
    if arguments.plot and not Path(arguments.plot).absolute().parent.is_dir():
        raise UserError(f"--plot: no folder for {arguments.plot!r}")
    folder = model_folder(arguments.model)
    model = read_model(folder, arguments.dtype)
    assert isinstance(model, NativeModel)
    context = min(model.config.max_context, 2048) if arguments.context is None else arguments.context
    if not 2 <= context <= model.config.max_context:
        raise UserError(f"--context: expected 2..{model.config.max_context}, got {context}")
    if arguments.tokens < 2:
        raise UserError(f"--tokens: expected at least 2, got {arguments.tokens}")
    texts = _texts(read_tokenizer(folder), arguments.text, arguments.tokens, context)
    with status_line() as show:
        tune_threads(model)
        lines = kv_report.report(
            model,
            texts,
            arguments.scheme or kv_report.SCHEMES,
            progress=lambda done: show(f"text {done} of {len(texts)}"),
        )
    if arguments.plot:
        kv_report.plot(lines, Path(arguments.plot))
    if arguments.json:
        print_json([asdict(line) for line in lines])
    else:
        _show(lines)
    return 0


def _texts(tokenizer: Tokenizer, path: str | None, tokens: int, context: int) -> list[list[int]]:
    """Pieces of at most `context` tokens, `tokens` in all; of the standard library, the beginning of each file."""
    if path is None:
        files = [corpus.stdlib_folder() / name for name in corpus.heldout_names()]
        pieces = (tokenizer.encode(read_text(str(file)))[:context] for file in files if file.is_file())
        missing = "no file of the standard library that the shipped model was not trained on is here: give --text"
    else:
        ids = tokenizer.encode(read_text(path))
        pieces = (ids[first : first + context] for first in range(0, len(ids), context))
        missing = f"--text: expected at least 2 tokens, got {len(ids)}"
    texts: list[list[int]] = []
    for piece in pieces:
        piece = piece[:tokens]
        if len(piece) >= 2:
            texts.append(piece)
            tokens -= len(piece)
    if not texts:
        raise UserError(missing)
    return texts


def _show(lines: list[kv_report.SchemeReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        caption=f"tokens scored: {lines[0].tokens}; errors: relative, root mean square (largest single one)",
    )
    table.add_column("scheme", no_wrap=True)
    for name in ("bits /\nvalue", "bytes /\ntoken", "error of\nkeys", "error of\nvalues", "perplexity", "change"):
        table.add_column(name, no_wrap=True, justify="right")
    for line in lines:
        table.add_row(
            line.scheme,
            f"{line.bits_per_value:.2f}",
            f"{line.bytes_per_token:.0f}",
            f"{line.key_error:.5f} ({line.largest_key_error:.3g})",
            f"{line.value_error:.5f} ({line.largest_value_error:.3g})",
            f"{line.perplexity:.4f}",
            f"{100 * line.change:+.3f} %",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
