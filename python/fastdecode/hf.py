"""Quantised key-value caches for any model of `transformers`: pass one as `past_key_values`.

    cache = fastdecode.hf.KVCache("int4")
    model.generate(**inputs, past_key_values=cache)

The model's own attention reads the keys and values dequantised, one layer at a time: this saves memory, not time. For
attention that reads the codes themselves use `fastdecode.load_model(path, kv_cache="int4")`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._host import KVScheme, Status
from .ops import KVPages
from .ops.kv_pages import default_group, parse_scheme

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
except ImportError as error:
    raise ImportError(
        "fastdecode.hf: expected transformers >= 4.56, got none or an older one: pip install 'fastdecode[hf]'"
    ) from error

__all__ = ["KVCache"]

_PAGE = 64
_STORES = ("k", "v", "k_scale", "v_scale", "k_tail", "v_tail")


class KVCache(Cache):
    """A cache of `transformers` that holds codes.

    Args:
        scheme: a name or member of `fastdecode.KVScheme`: "int8", "int4", "fp8_e4m3", "fp8_e5m2", "kivi4", "kivi2", or
            "plain" (the model's dtype).
        group: channels per scale (for keys of kivi tokens per scale), a divisor of the head size. None: the head size,
            for kivi the largest divisor up to 32 that fits.
        block: kivi: tokens that are coded at once; the newest, fewer than this, stay as they are. A multiple of group.

    Every scheme but kivi codes a token when it comes, and all queries see it coded, in a prompt as in decoding. Kivi
    codes `block` tokens when the last of them has come. The model's attention takes one set of keys for all queries of
    a call: blocks that were complete before the call are coded, everything newer is as it was. So a prompt attends to
    plain keys (as in the paper), and a call of several tokens that completes a block differs from as many calls of one;
    `load_model(path, kv_cache="kivi4")` has no such difference. Values that are not finite are stored as the scheme
    says and set `status`.

    Raises:
        ValueError: an unknown scheme, sizes that do not fit; when a layer first writes, a head size that does not.
    Source: KIVI, Liu et al. 2024; codes in fastdecode.ops.kv_append_ and kv_flush_.
    """

    def __init__(self, scheme: str | KVScheme = "int4", *, group: int | None = None, block: int = 128) -> None:
        where = "hf.KVCache"
        self.scheme = parse_scheme(where, scheme)
        if group is not None and group < 1:
            raise ValueError(f"{where}: group: expected at least 1, got {group}")
        if not isinstance(block, int) or block < 1:
            raise ValueError(f"{where}: block: expected an int of at least 1, got {block!r}")
        super().__init__(layer_class_to_replicate=lambda: _Layer(self.scheme, group, block))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the cache."""
        return sum(layer.nbytes for layer in self._coded())

    @property
    def bits_per_value(self) -> float:
        """Bits of a cached number in the pages, its share of the scales included; counted from the tensors."""
        layers = self._coded()
        return sum(layer.pages.bits_per_value for layer in layers) / len(layers) if layers else 0.0

    @property
    def status(self) -> Status:
        """What coding met so far: NAN, SATURATED, or 0. Reads the device."""
        bits = 0
        for layer in self._coded():
            bits |= int(layer.seen)
        return Status(bits)

    def _coded(self) -> list[_Layer]:
        return [layer for layer in self.layers if isinstance(layer, _Layer) and layer.is_initialized]


class _Layer(CacheLayerMixin):
    """One layer: pages per row, in order; page i of row b is page i * batch + b of the pool."""

    is_sliding = False
    is_croppable = True

    def __init__(self, scheme: KVScheme, group: int | None, block: int) -> None:
        super().__init__()
        self.scheme, self.group, self.block = scheme, group, block
        self.length = self.coded = 0  # tokens; of them in pages, a multiple of block for kivi

    # -- state ---------------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        batch, heads, _, size = key_states.shape
        if value_states is not None and value_states.shape != key_states.shape:
            raise ValueError(
                f"hf.KVCache: value_states: expected {list(key_states.shape)}, as the keys, "
                f"got {list(value_states.shape)}"
            )
        self.dtype, self.device, self.batch = key_states.dtype, key_states.device, batch
        kivi = self.scheme in (KVScheme.KIVI4, KVScheme.KIVI2)
        page = math.gcd(_PAGE, self.block) if kivi else _PAGE
        group = default_group(self.scheme, size, page) if self.group is None else self.group
        if kivi and self.block % group:
            raise ValueError(f"hf.KVCache: block: expected a multiple of the token group {group}, got {self.block}")
        self.pages = KVPages.allocate(
            0,
            -(-_PAGE // group) * group if kivi else _PAGE,
            heads,
            size,
            scheme=self.scheme,
            group=group,
            dtype=self.dtype,
            batch=batch if kivi else 0,
            tail_size=2 * self.block if kivi else 0,
            device=self.device,
        )
        self.seen = torch.zeros((), dtype=torch.int32, device=self.device)
        self.keys = self.values = torch.empty(0, dtype=self.dtype, device=self.device)
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        tensors = (getattr(self.pages, name) for name in _STORES)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # transformers 4

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """Keys that a query sees and the first one's position; transformers 4 gives positions, 5 their number."""
        return self.length + (query.shape[0] if isinstance(query, Tensor) else query), 0

    # -- writing -------------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [B, H, n, D] and return all keys and values, [B, H, length, D], as a query of this step sees them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch:
            raise ValueError(
                f"hf.KVCache: key_states: expected batch {self.batch}, as before, got {key_states.shape[0]}"
            )
        if not self.pages.has_ring:
            self._append(key_states, value_states, 0, key_states.shape[2])
            self.coded = self.length
            return self._read()
        before = self._read()
        count = key_states.shape[2]
        for first in range(0, count, self.block):
            self._append(key_states, value_states, first, min(first + self.block, count))
            whole = self.length // self.block * self.block
            if whole > self.coded:
                begin, end = (
                    torch.full((self.batch,), at, dtype=torch.int32, device=self.device) for at in (self.coded, whole)
                )
                self._note(ops.kv_flush_(self.pages, self._table(), begin, end))
                self.coded = whole
        return torch.cat((before[0], key_states), 2), torch.cat((before[1], value_states), 2)

    def _append(self, key_states: Tensor, value_states: Tensor, first: int, last: int) -> None:
        """Tokens first .. last - 1 of the step: to pages, or to the rings."""
        n = last - first
        self._grow(self.length + n)
        pages = self.pages
        positions = torch.arange(self.length, self.length + n, device=self.device)
        rows = torch.arange(self.batch, device=self.device).unsqueeze(1)
        if pages.has_ring:
            assert pages.k_tail is not None
            ring = pages.k_tail.shape[1]
            slots = rows * ring + positions % ring
        else:
            slots = (positions // pages.page_size * self.batch + rows) * pages.page_size + positions % pages.page_size
        k, v = (t[:, :, first:last].transpose(1, 2).flatten(0, 1) for t in (key_states, value_states))
        self._note(ops.kv_append_(k, v, slots.flatten(), pages))
        self.length += n

    def _note(self, status: Tensor) -> None:
        if status.numel():
            for bit in (int(Status.NAN), int(Status.SATURATED)):
                self.seen |= (status & bit).amax()

    def _read(self) -> tuple[Tensor, Tensor]:
        """All keys and values, [B, H, length, D]."""
        lens = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
        tails = lens - self.coded if self.pages.has_ring else None
        out = ops.kv_dequant(self.pages, self._table(), lens, tail_lens=tails, length=self.length, dtype=self.dtype)
        return out.k.transpose(1, 2), out.v.transpose(1, 2)

    def _table(self) -> Tensor:
        ids = torch.arange(self.pages.num_pages, dtype=torch.int32, device=self.device)
        return ids.view(-1, self.batch).t().contiguous() if self.batch else ids.view(0, 0)

    def _grow(self, tokens: int) -> None:
        """Room for `tokens` per row; doubling, so that copying is linear in all."""
        pages = self.pages
        have = pages.num_pages // max(self.batch, 1)
        need = -(-tokens // pages.page_size)
        if need <= have:
            return
        more = (max(need, 2 * have) - have) * self.batch
        grown: Any = {}
        for name in ("k", "v", "k_scale", "v_scale"):
            store = getattr(pages, name)
            if store is not None:
                order = sorted(range(1, store.dim()), key=lambda dim: -store.stride(dim))
                inner = store.permute(0, *order)  # as it lies in memory
                joined = torch.cat((inner, inner.new_zeros(more, *inner.shape[1:])))
                back = [order.index(dim) + 1 for dim in range(1, store.dim())]
                store = joined.permute(0, *back)
            grown[name] = store
        self.pages = replace(pages, **grown)

    # -- rows and length -----------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens; a positive number is the length to keep, as in transformers 4."""
        left = min(tokens_to_remove, self.length) if tokens_to_remove > 0 else max(0, self.length + tokens_to_remove)
        if not self.is_initialized or left == self.length:
            return
        if self.pages.has_ring and left < self.coded:
            raise ValueError(
                f"hf.KVCache.crop: tokens_to_remove: expected to keep at least {self.coded} of {self.length} "
                f"tokens, which are coded in blocks of {self.block}, got {left}"
            )
        self.length = left
        if not self.pages.has_ring:
            self.coded = left

    def reset(self) -> None:
        self.is_initialized = False
        self.length = self.coded = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows `indices`, in this order; a row may stand repeatedly."""
        if not self.is_initialized:
            return
        rows = torch.arange(self.batch, device=self.device)[indices.to(self.device)]

        def take(name: str) -> Tensor | None:
            store = getattr(self.pages, name)
            if store is None:
                return None
            if "tail" in name:
                return store.index_select(0, rows)
            return store.unflatten(0, (-1, self.batch)).index_select(1, rows).flatten(0, 1)

        stores: Any = {name: take(name) for name in _STORES}
        self.pages = replace(self.pages, **stores)
        self.batch = rows.shape[0]
