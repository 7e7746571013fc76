"""Held-out prompts: headers of functions with the lines before them, from the held-out files; committed as text."""

from __future__ import annotations

import ast
import hashlib
import json
import textwrap
from dataclasses import asdict, dataclass

from . import corpus

NUM_PROMPTS = 50
FILE = corpus.DATA / "heldout_prompts.json"


@dataclass(frozen=True)
class HeldoutPrompt:
    """`prompt` ends with the colon of `header`; both as they stand in `file`, indentation included."""

    file: str
    prompt: str
    header: str


def make(context_chars: int = 500) -> list[HeldoutPrompt]:
    """One function of each held-out file, then second ones, until there are NUM_PROMPTS; chosen by hash."""
    ranked: list[tuple[int, bytes, HeldoutPrompt]] = []
    for name, text in corpus.load("heldout").items():
        lines = text.splitlines(keepends=True)
        found = []
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            header = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).rstrip()
            if not header.endswith(":") or "#" in header:
                continue
            before = "".join(lines[: node.lineno - 1])[-context_chars:]
            before = before[before.index("\n") + 1 :] if "\n" in before else before
            if before.strip():
                found.append(HeldoutPrompt(name, before + header, header))
        found.sort(key=lambda p: hashlib.sha256(p.prompt.encode()).digest())
        ranked += [(i, hashlib.sha256(name.encode()).digest(), p) for i, p in enumerate(found)]
    ranked.sort(key=lambda item: item[:2])
    return [prompt for _, _, prompt in ranked[:NUM_PROMPTS]]


def write() -> None:
    """Write `data/heldout_prompts.json`; run once, by `python -m fastdecode.train lists`."""
    FILE.write_text(json.dumps([asdict(p) for p in make()], indent=1) + "\n")


def read() -> list[HeldoutPrompt]:
    """The committed prompts."""
    return [HeldoutPrompt(**item) for item in json.loads(FILE.read_text())]


def function_text(prompt: HeldoutPrompt, completion: str) -> str:
    """Header and body up to the first line indented no deeper than the header, moved to column 0."""
    indent = len(prompt.header) - len(prompt.header.lstrip())
    first, *rest = completion.split("\n")
    body = []
    for line in rest:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        body.append(line)
    return textwrap.dedent("\n".join([prompt.header + first, *body])) + "\n"
