"""Models whose output or law can be written down; more of them: `fastdecode.models.TabularLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import Output, TabularLM, TokenCache, Want

__all__ = ["Broken", "Chain", "noisy"]


def noisy(model: TabularLM, noise: float = 0.7, seed: int = 5, **options: Any) -> TabularLM:
    """A draft model: the same table with Gaussian noise on its logits, so that it is right now and then.

    Args:
        model: the target; unchanged.
        noise: standard deviation; 0 gives a perfect draft model, 0.7 one whose drafts are kept about half the time.
        seed: of the noise.
        options: of the new `TabularLM`.
    """
    generator = torch.Generator().manual_seed(seed)
    bumps = torch.randn(model.table.shape, generator=generator, dtype=torch.float64)
    return TabularLM((model.table.log() + noise * bumps).softmax(-1), **options)


class Chain(TabularLM):
    """After token t comes t + 1 (mod V), almost surely: outputs can be written down."""

    def __init__(self, vocab_size: int, **options: Any) -> None:
        law = torch.full((vocab_size, vocab_size), 1e-3, dtype=torch.float64)
        law[torch.arange(vocab_size), (torch.arange(vocab_size) + 1) % vocab_size] = 1
        super().__init__(law / law.sum(-1, keepdim=True), **options)


class Broken:
    """A model whose rows are NaN from position `first` on, for texts that begin with token `marked`."""

    def __init__(self, model: TabularLM, marked: int, first: int) -> None:
        self.model, self.marked, self.first = model, marked, first
        self.config, self.new_cache = model.config, model.new_cache

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: TokenCache,
        positions: Tensor | None = None,
        num_tokens: Tensor | Sequence[int] | None = None,
        want: Want = Want.LOGITS,
    ) -> Output:
        """See Model.forward."""
        output = self.model.forward(tokens, cache=cache, num_tokens=num_tokens, want=want)
        if output.logits is not None:
            for row, length in enumerate(cache.host_lens):
                if int(cache.tokens[row, 0]) == self.marked:
                    output.logits[row, max(0, self.first - length) :] = float("nan")
        return output
