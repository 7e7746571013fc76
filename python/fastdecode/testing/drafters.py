"""Drafters that no one should use: they know the answer, know nothing, or always lie. And one that breaks the law.

A noisy one, right now and then, is `SmallModel(testing.models.noisy(target))`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..drafters import Context, Drafter, SmallModel, StopRule
from ..types import Draft

__all__ = ["Discarding", "Known", "Random", "ragged"]


class Known(Drafter):
    """Perfect or adversarial: proposes what plain decoding will produce, or always something else.

    Args:
        texts: prompt and plain output of every request, in the order of the prompts.
        vocab_size: V.
        shift: 0 proposes the texts; 1..V-1 the same shifted by so many ids, of which none can be kept.
    """

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int, shift: int = 0) -> None:
        self.texts = list(texts)
        self.vocab_size = vocab_size
        self.shift = shift

    def begin(self, context: Context) -> None:
        """See `Drafter`, as are the other methods of this module."""
        self.rows = list(self.texts)

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def propose(self, context: Context, budget: list[int], stop: StopRule | None) -> Draft:
        chains = []
        for text, length, most in zip(self.rows, context.host_lengths, budget, strict=True):
            chains.append([(token + self.shift) % self.vocab_size for token in text[length : length + most]])
        return ragged(chains)


class Random(Drafter):
    """Random tokens, and fewer than allowed at random: ragged drafts."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, context: Context, budget: list[int], stop: StopRule | None) -> Draft:
        def draw(high: int, n: int) -> list[int]:
            return torch.randint(high, (n,), generator=self.generator).tolist()

        return ragged([draw(self.vocab_size, draw(most + 1, 1)[0]) for most in budget])


class Discarding(SmallModel):
    """A small model that takes back unlikely draws: a negative control, this biases the ratio rule."""

    def propose(self, context: Context, budget: list[int], stop: StopRule | None) -> Draft:
        draft = super().propose(context, budget, stop)
        if draft.probs is None:
            return draft
        likely = draft.probs.gather(-1, draft.tokens.clamp(min=0).unsqueeze(-1))[..., 0] > 0.25
        return Draft(draft.tokens, torch.minimum(draft.lens, likely.int().cumprod(1).sum(1).int()), draft.probs)


def ragged(chains: Sequence[Sequence[int]]) -> Draft:
    """Chains of different lengths, padded with -1."""
    longest = max(map(len, chains))
    tokens = [[*chain, *[-1] * (longest - len(chain))] for chain in chains]
    lens = torch.tensor([len(chain) for chain in chains], dtype=torch.int32)
    return Draft(torch.tensor(tokens, dtype=torch.int64).reshape(len(chains), longest), lens)
