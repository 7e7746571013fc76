"""Attention masks of chains, as slices of one table."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["AttentionCall", "ChainMask"]

_CHUNK = 256  # slots per attention call in a long prefill: bounds the mask, and skips most of the upper triangle

# slots [first, last) attend to cached tokens [begin, end) under a mask (None: all of them)
AttentionCall = tuple[int, int, int, int, "Tensor | None"]


class ChainMask:
    """Additive masks for a chain: slot i sees tokens up to `before + i`, with a window only the last ones.

    All masks of one window are slices of one table, because a mask entry depends on token minus slot only. Each slot
    stands `group` times: the query heads of a kv head are rows of one product.
    """

    __slots__ = ("_device", "_dtype", "_group", "_origin", "_table", "_window")

    def __init__(self, window: int | None, group: int, dtype: torch.dtype, device: torch.device) -> None:
        self._window, self._group, self._dtype, self._device = window, group, dtype, device
        self._table = torch.empty(0, 0, dtype=dtype, device=device)
        self._origin = 0  # column of "token = before"

    def calls(self, before: int, n: int) -> list[AttentionCall]:
        """The attention calls for n slots behind `before` tokens, equal in all rows."""
        result: list[AttentionCall] = []
        for first in range(0, n, _CHUNK):
            last = min(first + _CHUNK, n)
            begin = 0 if self._window is None else max(0, before + first + 1 - self._window)
            mask = None if last - first == 1 else self._slice(before + first - begin, last - first)
            result.append((first, last, begin, before + last, mask))
        return result

    def ragged(self, slots: Tensor, total: int) -> list[AttentionCall]:
        """One call for rows whose slots stand at different positions, int64 [B, n]."""
        distance = slots.repeat_interleave(self._group, 1).unsqueeze(-1) - torch.arange(total, device=self._device)
        hidden = distance < 0
        if self._window is not None:
            hidden |= distance >= self._window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)
        return [(0, slots.shape[1], 0, total, mask.unsqueeze(1))]

    def _slice(self, before: int, n: int) -> Tensor:
        rows = n * self._group
        if rows > self._table.shape[0] or before > self._origin:
            slots = min(_CHUNK, max(8, 2 * n, self._table.shape[0] // self._group))
            self._origin = max(256, 2 * before if before > self._origin else self._origin)
            columns = torch.arange(-self._origin, slots, device=self._device)
            distance = torch.arange(slots, device=self._device).repeat_interleave(self._group).unsqueeze(1) - columns
            hidden = distance < 0
            if self._window is not None:
                hidden |= distance >= self._window
            self._table = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            self._table.masked_fill_(hidden, -torch.inf)
        start = self._origin - before
        return self._table[:rows, start : start + before + n]
