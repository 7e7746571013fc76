"""Drafting by copying from the request's own text (prompt lookup; Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._host import NgramIndex
from ..types import Draft, is_int
from .base import Context, Drafter, StopRule

__all__ = ["PromptLookup"]


class PromptLookup(Drafter):
    """What followed the most recent earlier occurrence of the longest repeated suffix of min_ngram..max_ngram tokens.

    A copy that reaches the end of the text goes on through its own tokens, so a periodic text is continued with its
    period. No draft where nothing matches. Deterministic: `Draft.probs` is None.
    """

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None:
        for name, value in {"max_ngram": max_ngram, "min_ngram": min_ngram}.items():
            if not is_int(value) or value < 1:
                raise ValueError(f"PromptLookup: {name}: expected an int >= 1, got {value!r}")
        NgramIndex(min(max_ngram, 2**31), min(min_ngram, 2**31))  # raises ValueError on sizes that are too large
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self._indices: list[NgramIndex] = []

    def begin(self, context: Context) -> None:
        self._indices = [NgramIndex(self.max_ngram, self.min_ngram) for _ in range(context.batch)]

    def select(self, rows: Sequence[int]) -> None:
        self._indices = [self._indices[row] for row in rows]

    def propose(self, context: Context, budget: list[int], stop: StopRule | None) -> Draft:
        found = []
        for index, row, length, most in zip(self._indices, context.array, context.host_lengths, budget, strict=True):
            index.extend(row[len(index) : length])
            found.append(index.propose(most))
        lens = [len(copy) for copy in found]
        if len(found) == 1:
            tokens = torch.from_numpy(found[0]).unsqueeze(0)
        else:
            tokens = torch.full((len(found), max(lens)), -1, dtype=torch.int64)
            for filled, copy in zip(tokens, found, strict=True):
                filled[: len(copy)] = torch.from_numpy(copy)
        return Draft(tokens, torch.tensor(lens, dtype=torch.int32))
