"""What the commands share."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..generation import CHECKPOINTS
from ..models import Model, Tokenizer, load_model
from ..models.paged_cache import CACHES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class UserError(Exception):
    """A mistake of the user; its text is the one line that is shown."""


def need(*packages: str) -> None:
    """UserError that says how to install the first package that is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this command needs the package {package}: pip install 'fastdecode[cli]'")


def print_json(value: Any) -> None:
    """The only thing a command with --json writes to stdout."""
    print(json.dumps(value, indent=2))


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that says what is being done. It does not move: a spinner would be timed too."""
    shown = sys.stderr.isatty()

    def write(text: str) -> None:
        if shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield write
    finally:
        write("")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that decodes."""
    parser.add_argument("--model", metavar="PATH", help="Hugging Face folder; default: the shipped model")
    parser.add_argument("--draft-model", metavar="PATH", help="folder of a draft model with the same vocabulary")
    parser.add_argument("--draft-length", type=int, metavar="N", help="most drafts per round")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, the default")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights; default float32")
    parser.add_argument(
        "--kv-cache", metavar="NAME", help=f"how keys and values are kept: contiguous, {', '.join(CACHES)}"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the number measured to be fastest")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def model_folder(path: str | None, shipped: str = "tiny-code") -> Path:
    """The folder at `path`; without one, that of a shipped checkpoint."""
    folder = CHECKPOINTS / shipped if path is None else Path(path)
    if not folder.is_dir():
        option = "--draft-model" if "draft" in shipped else "--model"
        got = f"no folder {str(path)!r}" if path is not None else f"no shipped model in {CHECKPOINTS}: name one"
        raise UserError(f"{option}: {got}")
    return folder


def read_model(folder: Path, dtype: str) -> Model:
    """The model in a folder."""
    return load_model(folder, dtype=DTYPES[dtype])


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder."""
    need("tokenizers")
    return Tokenizer.from_folder(folder)


def read_text(path: str) -> str:
    """Contents of a UTF-8 file, of stdin for "-"."""
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path!r}: it is not UTF-8 text") from error
