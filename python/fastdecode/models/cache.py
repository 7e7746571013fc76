"""Book-keeping of caches, and caches with one contiguous stretch of memory per row.

`Rows` keeps the lengths of the KVCache contract, whatever is stored. `RowCache` adds any set of tensors that have a
batch and a token dimension; `ContiguousKVCache` holds keys and values, `TokenCache` just the tokens (for models that
are a function of them). Lengths live on the host: the fast paths of a forward depend on them, and on the CPU reading
them costs nothing. With tensors on another device `keep` and `truncate` therefore read their arguments on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .base import int_list

__all__ = ["ContiguousKVCache", "RowCache", "Rows", "TokenCache"]

RowsT = TypeVar("RowsT", bound="Rows")
Moves = list[tuple[int, list[int]]]  # rows, each with the slots that shall follow its committed tokens


class Rows(ABC):
    """The lengths of the KVCache contract (see models.base.KVCache); subclasses store what the lengths are of.

    A hook that raises must have changed nothing.
    """

    def __init__(self, batch: int, max_context: int) -> None:
        self._lens = [0] * batch
        self._pending = [0] * batch
        self._staged = 0  # slots of the last forward, padded ones included
        self._lens_tensor: Tensor | None = None
        self.max_context = max_context

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def lens(self) -> Tensor:
        """Committed lengths, int32 [B]. A snapshot: changing it changes nothing."""
        if self._lens_tensor is None:
            self._lens_tensor = torch.tensor(self._lens, dtype=torch.int32, device=self.device)
        return self._lens_tensor.clone()

    @property
    def host_lens(self) -> tuple[int, ...]:
        """Committed lengths as Python ints, without reading the device."""
        return tuple(self._lens)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self._lens)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors live."""

    # -- the contract --------------------------------------------------------------------------------------------------

    def keep(self, path: Tensor | None, num_keep: Tensor | Sequence[int]) -> None:
        """Commit `path[b, :num_keep[b]]` of the pending slots of every row b; see KVCache.keep."""
        counts = int_list("KVCache.keep", "num_keep", num_keep, self.batch)
        for count, limit in zip(counts, self._pending, strict=True):
            if not 0 <= count <= limit:
                raise ValueError(f"KVCache.keep: num_keep: expected 0..{limit}, got {count}")
        self._commit(counts, [] if path is None else self._check_path(path, counts))
        for row, count in enumerate(counts):
            self._lens[row] += count
        self._drop_pending()

    def truncate(self, lens: Tensor | Sequence[int]) -> None:
        """Shorten rows to `lens` and drop pending slots; see KVCache.truncate."""
        new = int_list("KVCache.truncate", "lens", lens, self.batch)
        for length, old in zip(new, self._lens, strict=True):
            if not 0 <= length <= old:
                raise ValueError(f"KVCache.truncate: lens: expected 0..{old}, got {length}")
        self._shorten(new)
        self._lens = new
        self._drop_pending()

    def fork(self: RowsT, rows: Tensor | Sequence[int]) -> RowsT:
        """A new cache with copies of these rows; see KVCache.fork."""
        wanted = self._check_rows("KVCache.fork", rows)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._take(wanted, forked=True)
        other._take_lengths(wanted)
        return other

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep only these rows, in this order; see KVCache.select."""
        wanted = self._check_rows("KVCache.select", rows)
        if wanted != list(range(self.batch)):
            self._take(wanted, forked=False)
            self._take_lengths(wanted)

    def reserve(self, n: int) -> None:
        """Make room for n more tokens in every row; see KVCache.reserve."""
        if n < 0:
            raise ValueError(f"KVCache.reserve: n: expected >= 0, got {n}")
        longest = max(self._lens, default=0)
        if longest + n > self.max_context:
            raise ValueError(f"KVCache.reserve: n: expected 0..{self.max_context - longest} (max_context), got {n}")
        self._reserve(n)

    # -- for models ----------------------------------------------------------------------------------------------------

    def stage(self, num_slots: int, num_tokens: Sequence[int] | None = None) -> None:
        """Announce a forward of `num_slots` slots per row, of which `num_tokens[b]` (default all) are valid.

        Makes room for them. Valid tokens may not reach past max_context; padded slots may.
        """
        counts = [num_slots] * self.batch if num_tokens is None else list(num_tokens)
        for length, count in zip(self._lens, counts, strict=True):
            if length + count > self.max_context:
                raise ValueError(
                    f"forward: tokens: expected at most {self.max_context - length} after {length} cached ones "
                    f"(max_context {self.max_context}), got {count}"
                )
        self._make_room(num_slots, counts)
        self._pending = counts
        self._staged = num_slots

    # -- what a subclass stores ----------------------------------------------------------------------------------------

    @abstractmethod
    def _commit(self, counts: list[int], moves: Moves) -> None:
        """Move pending slots to their places; `counts[b]` of row b are about to be committed."""

    @abstractmethod
    def _shorten(self, lens: list[int]) -> None:
        """The rows are about to be cut to these lengths."""

    @abstractmethod
    def _take(self, rows: list[int], *, forked: bool) -> None:
        """Hold these rows instead; forked: in place of a shallow copy of another cache, which stays as it is."""

    @abstractmethod
    def _reserve(self, n: int) -> None:
        """Room for n more tokens in every row."""

    @abstractmethod
    def _make_room(self, num_slots: int, counts: list[int]) -> None:
        """Room for a forward."""

    # -- inside --------------------------------------------------------------------------------------------------------

    def _drop_pending(self) -> None:
        self._pending = [0] * self.batch
        self._staged = 0
        self._lens_tensor = None

    def _check_path(self, path: Tensor, counts: list[int]) -> Moves:
        """The rows that need copying, each with its slots; raises before anything was changed."""
        if path.is_floating_point() or path.dtype == torch.bool:
            raise ValueError(f"KVCache.keep: path: expected an integer dtype, got {path.dtype}")
        if path.dim() != 2 or path.shape[0] != self.batch or path.shape[1] < max(counts, default=0):
            expected = f"[{self.batch}, K'] with K' >= {max(counts, default=0)}"
            raise ValueError(f"KVCache.keep: path: expected {expected}, got {list(path.shape)}")
        moves = []
        for row, (slots, count) in enumerate(zip(path.tolist(), counts, strict=True)):
            slots = slots[:count]
            if any(low >= high for low, high in pairwise(slots)) or (slots and slots[0] != 0):
                raise ValueError(f"KVCache.keep: path: expected increasing slots from 0, got {slots} in row {row}")
            if slots and slots[-1] >= self._pending[row]:
                raise ValueError(
                    f"KVCache.keep: path: expected slots 0..{self._pending[row] - 1}, got {slots[-1]} in row {row}"
                )
            if slots != list(range(count)):
                moves.append((row, slots))
        return moves

    def _check_rows(self, where: str, rows: Tensor | Sequence[int]) -> list[int]:
        wanted = int_list(where, "rows", rows)
        for row in wanted:
            if not 0 <= row < self.batch:
                raise ValueError(f"{where}: rows: expected 0..{self.batch - 1}, got {row}")
        return wanted

    def _take_lengths(self, rows: list[int]) -> None:
        self._lens = [self._lens[row] for row in rows]
        self._pending = [self._pending[row] for row in rows]
        self._lens_tensor = None


class RowCache(Rows):
    """Rows of tensors that share a batch and a token dimension.

    Slots behind a row's committed and pending tokens hold zeros or stale values, which no result depends on. The
    tensors are made outside inference mode wherever that happens: an inference tensor could not be written by a later
    `keep`.
    """

    def __init__(self, stores: Sequence[Tensor], *, batch_dim: int, token_dim: int, max_context: int) -> None:
        super().__init__(stores[0].shape[batch_dim], max_context)
        self._stores = list(stores)
        self._batch_dim = batch_dim
        self._token_dim = token_dim

    @property
    def capacity(self) -> int:
        """Tokens per row that fit without growing."""
        return self._stores[0].shape[self._token_dim]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self._stores[0].device

    def _commit(self, counts: list[int], moves: Moves) -> None:
        for row, slots in moves:
            first = next(i for i, slot in enumerate(slots) if slot != i)
            base = self._lens[row]
            source = torch.tensor([base + slot for slot in slots[first:]], device=self.device)
            for store in self._stores:
                tokens = store.select(self._batch_dim, row)
                dim = self._token_dim - 1  # the batch dimension stands before the token dimension
                # index_select copies before copy_ writes, so source and destination may overlap
                tokens.narrow(dim, base + first, len(slots) - first).copy_(tokens.index_select(dim, source))

    def _shorten(self, lens: list[int]) -> None:
        pass

    def _take(self, rows: list[int], *, forked: bool) -> None:
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        with torch.inference_mode(False):
            self._stores = [store.index_select(self._batch_dim, index) for store in self._stores]

    def _reserve(self, n: int) -> None:
        self._grow(max(self._lens, default=0) + n)

    def _make_room(self, num_slots: int, counts: list[int]) -> None:
        self._grow(max(self._lens, default=0) + num_slots)  # padded slots are written too

    def _grow(self, needed: int) -> None:
        capacity = self.capacity
        if needed <= capacity:
            return
        used = min(capacity, max(self._lens, default=0) + self._staged)
        new_capacity = max(needed, min(2 * capacity, self.max_context))  # doubling: amortised linear copying
        for i, store in enumerate(self._stores):
            shape = list(store.shape)
            shape[self._token_dim] = new_capacity
            with torch.inference_mode(False):
                grown = store.new_zeros(shape)
            grown.narrow(self._token_dim, 0, used).copy_(store.narrow(self._token_dim, 0, used))
            self._stores[i] = grown


class ContiguousKVCache(RowCache):
    """Keys and values as two tensors [num_layers, B, num_kv_heads, capacity, head_dim].

    Tokens of one head are adjacent, so a decode step reads each head as one stream; growing copies what is used.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        max_context: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_capacity(batch, capacity, max_context)
        shape = (num_layers, batch, num_kv_heads, capacity, head_dim)
        # zeros, not empty: a row may read (and mask) slots that another row of the batch has used and it has not
        with torch.inference_mode(False):
            stores = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        super().__init__(stores, batch_dim=1, token_dim=3, max_context=max_context)

    @property
    def k(self) -> Tensor:
        """Keys after position encoding, [num_layers, B, num_kv_heads, capacity, head_dim]; replaced on growth."""
        return self._stores[0]

    @property
    def v(self) -> Tensor:
        """Values, as `k`."""
        return self._stores[1]

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values, unused room included."""
        return sum(store.numel() * store.element_size() for store in self._stores)

    @property
    def bits_per_value(self) -> float:
        """Bits of a cached number."""
        return 8.0 * self.k.element_size()


class TokenCache(RowCache):
    """The tokens themselves, int64 [B, capacity]: the cache of a model that needs no other state."""

    def __init__(self, batch: int, capacity: int, max_context: int) -> None:
        check_capacity(batch, capacity, max_context)
        with torch.inference_mode(False):
            store = torch.zeros(batch, capacity, dtype=torch.int64)
        super().__init__([store], batch_dim=0, token_dim=1, max_context=max_context)

    @property
    def tokens(self) -> Tensor:
        """int64 [B, capacity]; replaced on growth."""
        return self._stores[0]


def check_capacity(batch: int, capacity: int, max_context: int) -> None:
    """ValueError unless a cache of this size makes sense."""
    if batch < 0:
        raise ValueError(f"new_cache: batch: expected >= 0, got {batch}")
    if not 0 <= capacity <= max_context:
        raise ValueError(f"new_cache: capacity: expected 0..{max_context} (max_context), got {capacity}")
