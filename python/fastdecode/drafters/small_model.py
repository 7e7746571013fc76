"""Drafting with a smaller model of the same vocabulary (Leviathan et al. 2023, Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..models.base import KVCache, Model, Want
from ..models.prefill import prefill
from ..types import Draft
from .base import Context, Drafter, StopRule

__all__ = ["SmallModel"]


class SmallModel(Drafter):
    """Draws one token after another from a draft model with a cache of its own.

    Between rounds the cache holds a prefix of the committed text, perhaps with rejected drafts behind it: `propose`
    drops those, then feeds what the cache lacks (the target's own token, and the last draft if all were accepted).
    A request whose text has outgrown the draft model's context is no longer drafted for.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._cache: KVCache | None = None
        self._lens: list[int] = []  # tokens in the cache, per request

    def begin(self, context: Context) -> None:
        limit = self.model.config.max_context
        self._lens = [length - 1 if length <= limit else 0 for length in context.host_lengths]
        self._cache = prefill(self.model, context.tokens, self._lens, min(context.tokens.shape[1], limit))

    def select(self, rows: Sequence[int]) -> None:
        if self._cache is not None:
            self._cache.select(rows)
            self._lens = [self._lens[row] for row in rows]

    def propose(self, context: Context, budget: list[int], stop: StopRule | None) -> Draft:
        cache = self._cache
        if cache is None:
            raise ValueError("SmallModel.propose: expected begin() before it")
        lengths, limit = context.host_lengths, self.model.config.max_context
        # the last draft drawn is not fed, so the context's end allows one more
        lens = [max(0, min(most, limit - length + 1)) for most, length in zip(budget, lengths)]
        longest = max(lens)
        if longest == 0:
            return Draft.none(context.batch)
        kept = [min(have, length - 1) for have, length in zip(self._lens, lengths)]
        if kept != self._lens:
            cache.truncate(kept)
            self._lens = kept
        counts = [length - have if most else 0 for length, have, most in zip(lengths, kept, lens)]
        row = self._feed(cache, self._missing(context, counts), counts)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        while True:
            drawn, law = context.draw(row, len(tokens), torch.stack(tokens, 1) if tokens else None)
            tokens.append(drawn)
            if law is not None:
                probs.append(law)
            drafting = [most > len(tokens) for most in lens]
            if not any(drafting):
                break
            fed = drawn if context.greedy else drawn.clamp(min=0)  # -1: no law in the draft's row; cut off at the end
            row = self._feed(cache, fed.unsqueeze(1), [int(more) for more in drafting])
            if stop is not None:
                halted = stop(ops.row_stats(row)).tolist()
                lens = [len(tokens) if more and halt else most for more, halt, most in zip(drafting, halted, lens)]
                if max(lens) == len(tokens):
                    break
        return _draft(tokens, probs, lens, checked=context.greedy)

    def _feed(self, cache: KVCache, tokens: Tensor, counts: list[int]) -> Tensor:
        """Run tokens [B, n] and keep `counts[b]` of them; logits [B, V] after the last."""
        num_tokens = None if min(counts) == tokens.shape[1] else counts
        output = self.model.forward(tokens, cache=cache, num_tokens=num_tokens, want=Want.LAST_LOGITS)
        cache.keep(None, counts)
        self._lens = [have + count for have, count in zip(self._lens, counts)]
        assert output.logits is not None
        return output.logits[:, 0]

    def _missing(self, context: Context, counts: list[int]) -> Tensor:
        """Committed tokens that the cache lacks, [B, max(counts)], right-padded."""
        if len(counts) == 1:
            return context.tokens[:, self._lens[0] : context.host_lengths[0]]
        rows = torch.zeros(len(counts), max(counts), dtype=torch.int64)
        for row, (have, count) in enumerate(zip(self._lens, counts)):
            rows[row, :count] = context.tokens[row, have : have + count]
        return rows


def _draft(tokens: list[Tensor], probs: list[Tensor], lens: list[int], *, checked: bool) -> Draft:
    """A Draft that ends before the first token that could not be drawn (-1: the draft model's row was broken)."""
    chain = torch.stack(tokens, 1)
    if not checked and bool((chain < 0).any()):
        good = (chain >= 0).cumprod(1).sum(1).tolist()
        lens = [min(pair) for pair in zip(lens, good)]
    return Draft(chain, torch.tensor(lens, dtype=torch.int32), torch.stack(probs, 1) if probs else None)
