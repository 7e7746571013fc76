"""What a trained model is worth: held-out bits per byte, and its completions of held-out function headers."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import generate
from ..compare import distinct_ngrams
from ..models import load_model
from ..types import Results
from . import checkpoint, prompts
from .model import TINY_CODE, Llama

SAMPLING = {"sampled": (0.8, 0.95), "greedy": (0.0, None)}  # temperature, top_p


def parses(source: str) -> bool:
    """Whether `ast.parse` takes it."""
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def evaluate(folder: Path, max_new_tokens: int = 200) -> dict[str, Any]:
    """Scores of the tiny-code checkpoint in `folder`.

    Returns:
        bits_per_byte on the held-out files; for "sampled" (temperature 0.8, top_p 0.95, seed 0) and "greedy":
        parse_share (completions of the held-out headers, cut at the first dedent, that ast.parse takes) and
        distinct_4gram (mean over completions of `max_new_tokens` tokens).
    """
    model, given = load_model(folder), prompts.read()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    scores: dict[str, Any] = {
        "bits_per_byte": checkpoint.bits_per_byte(checkpoint.load(Llama(TINY_CODE), folder), tokenizer)
    }
    ids = [tokenizer.encode(p.prompt).ids for p in given]
    for name, (temperature, top_p) in SAMPLING.items():
        results = generate(
            model, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=0, ignore_eos=True
        )
        assert isinstance(results, Results)
        texts = [tokenizer.decode(r.tokens) for r in results]
        parsed = [parses(prompts.function_text(p, text)) for p, text in zip(given, texts, strict=True)]
        distinct = [distinct_ngrams(r.tokens) for r in results]
        scores[name] = {
            "parse_share": sum(parsed) / len(parsed),
            "distinct_4gram": sum(distinct) / len(distinct),
        }
    return scores


def main(folder: Path) -> None:
    """Print the scores as JSON."""
    print(json.dumps(evaluate(folder), indent=2))
