"""A language model that is a table: the next token depends on the last `order` tokens, with probabilities written down.

For tests: its law can be enumerated, so a loop's output law can be compared with it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import KVCache, ModelConfig, Output, Want, check_cache, check_tokens, check_want
from .cache import TokenCache

__all__ = ["TabularLM"]


class TabularLM:
    """Markov model of a given order, following the Model protocol.

    Args:
        table: probabilities, floating [V] * (order + 1); the last dimension is the next token, the one before it the
            last token seen. Rows must be non-negative and sum to 1. Order 0 is a [V] table: every token from one law.
        pad_token_id: stands for the tokens before the first one, so the law of a short history is defined too.
        max_context: most tokens per row.
        eos_token_ids, bos_token_id: reported in `config`; they change nothing here.
    Raises:
        ValueError: a shape that is not [V] * (order + 1), a row that is no distribution.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        pad_token_id: int = 0,
        max_context: int = 4096,
        eos_token_ids: tuple[int, ...] = (),
        bos_token_id: int | None = None,
    ) -> None:
        if table.dim() == 0 or not table.is_floating_point() or len(set(table.shape)) != 1 or table.shape[0] == 0:
            raise ValueError(
                f"TabularLM: table: expected floating [V] * (order + 1), got {table.dtype} {list(table.shape)}"
            )
        vocab_size = table.shape[-1]
        if not 0 <= pad_token_id < vocab_size:
            raise ValueError(f"TabularLM: pad_token_id: expected 0..{vocab_size - 1}, got {pad_token_id}")
        error = (table.sum(-1) - 1).abs().max().item()
        tolerance = 4 * vocab_size * torch.finfo(table.dtype).eps
        if not (bool((table >= 0).all()) and error <= tolerance):
            raise ValueError(f"TabularLM: table: expected rows >= 0 that sum to 1, got a sum off by {error:.3g}")
        self.table = table
        self.order = table.dim() - 1
        self.pad_token_id = pad_token_id
        self.config = ModelConfig(
            vocab_size=vocab_size,
            hidden_size=0,
            num_layers=0,
            max_context=max_context,
            eos_token_ids=tuple(eos_token_ids),
            bos_token_id=bos_token_id,
        )
        self._log_rows = table.reshape(-1, vocab_size).log()  # log 0 = -inf, which is legal in logits
        self._powers = torch.tensor([vocab_size**k for k in reversed(range(self.order))], dtype=torch.int64)

    @classmethod
    def random(
        cls,
        vocab_size: int,
        order: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        *,
        concentration: float = 1.0,
        max_context: int = 4096,
        eos_token_ids: tuple[int, ...] = (),
        bos_token_id: int | None = None,
    ) -> TabularLM:
        """A table of softmaxed Gaussian logits of standard deviation `concentration` (larger: more peaked rows)."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn([vocab_size] * (order + 1), generator=generator, dtype=torch.float64) * concentration
        table = logits.softmax(-1).to(dtype)
        return cls(table, max_context=max_context, eos_token_ids=eos_token_ids, bos_token_id=bos_token_id)

    @property
    def dtype(self) -> torch.dtype:
        """Of the table and the logits."""
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    def new_cache(self, batch: int, capacity: int) -> TokenCache:
        """An empty history for `batch` rows."""
        return TokenCache(batch, capacity, self.config.max_context)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache,
        positions: Tensor | None = None,
        num_tokens: Tensor | Sequence[int] | None = None,
        want: Want = Want.LOGITS,
    ) -> Output:
        """Log-probabilities after each token; see Model.forward. `positions` are accepted and change nothing.

        Returns:
            logits = log(table rows), [B, n, V], -inf where the probability is 0. Want.HIDDEN is a ValueError.
        """
        check_want("TabularLM.forward", want)
        if want & Want.HIDDEN:
            raise ValueError("TabularLM.forward: want: expected LOGITS or LAST_LOGITS, got HIDDEN (there are none)")
        cache = check_cache("TabularLM.forward", cache, TokenCache)
        tokens, counts = check_tokens("TabularLM.forward", tokens, cache.batch, self.config.vocab_size, num_tokens)
        batch, n = tokens.shape
        cache.stage(n, counts)
        rows = []
        for row, length in enumerate(cache.host_lens):
            cache.tokens[row, length : length + n] = tokens[row]
            start = max(0, length - self.order + 1)
            missing = self.order - 1 - (length - start)
            history = cache.tokens[row, start : length + n]
            if missing > 0:
                history = torch.cat((history.new_full((missing,), self.pad_token_id), history))
            rows.append(history)
        if not want & (Want.LOGITS | Want.LAST_LOGITS):
            return Output()
        if not rows:
            return Output(self._log_rows.new_zeros(0, 1 if want & Want.LAST_LOGITS else n, self.config.vocab_size))
        if self.order == 0:
            keys = torch.zeros(batch, n, dtype=torch.int64)
        else:
            keys = (torch.stack(rows).unfold(1, self.order, 1) * self._powers).sum(-1)
        if want & Want.LAST_LOGITS:
            last = torch.tensor([max(0, count - 1) for count in counts or [n] * batch])
            keys = keys.gather(1, last.unsqueeze(1))
        return Output(logits=self._log_rows[keys])
