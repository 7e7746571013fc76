"""A cache in pages that rows may share, coded by any scheme of `ops.KVPages`.

A page holds `page_size` tokens of all layers, so copying one is one copy of adjacent memory. A row has a table of page
numbers; `fork` copies tables, not pages, and a page that several tables name is copied when one of them writes to it.

Schemes "plain", "fp8_e4m3", "fp8_e5m2", "int8" and "int4" code every token by itself when it is appended. "kivi4" and
"kivi2" (Liu et al. 2024) code whole groups of tokens, so new tokens wait in a ring of plain ones. What of them a query
sees coded depends on its position alone: the query at position t sees tokens below W * (t // W) coded and the others
plain, W = `flush_block`. So a pass of several tokens and as many passes of one give the same result.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._host import KVScheme, Status
from ..ops import KVPages
from .cache import Moves, Rows, check_capacity
from .prefix import SharedPrefixes, shared_prefixes

__all__ = ["CACHES", "KVCacheConfig", "PagedKVCache", "PagedStep"]

CHUNK = 128  # most slots of one pass through the layers of a kivi cache: bounds its rings
DEVICE_CHUNK = 512  # of any cache off the CPU, where attention's scratch memory grows with the slots

_PLAIN = {
    "plain": None,
    "float64": torch.float64,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_ALIASES = {"fp8": "fp8_e4m3", "bfloat16": "bf16", "float16": "fp16", "fp32": "float32", "fp64": "float64"}
_SCHEMES = tuple(scheme.name.lower() for scheme in KVScheme)
# what `KVCacheConfig.parse` knows
CACHES = (*_PLAIN, *(name for name in _SCHEMES if name != "plain"))


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """How keys and values are kept.

    Attributes:
        scheme: "plain", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "kivi4" or "kivi2".
        dtype: of plain pages, and of the rings of kivi: float64, float32, float16 or bfloat16; None is the model's.
        group: channels that share a scale (a divisor of head_dim), for keys of kivi tokens that do (of the page size
            too); None is head_dim, for kivi 32 or head_dim where that is smaller.
        page_size: tokens per page.
        flush_block: W, tokens that kivi codes at a time, a multiple of the page size.
        prefill: "strict": a prompt is read as everything else, so a cache does not depend on how its text came in.
            "exact": an empty row's first pass attends to plain keys and values, as if it had been coded afterwards; so
            one token more in that pass is not one more pass.
        prefix_attention: read pages that several rows share once for all of them (Hydragen, Juravsky et al. 2024).
            Not for kivi: where a token lies in a ring goes by its place in the whole text.
    Raises:
        ValueError: a value outside its range.
    """

    scheme: str = "plain"
    dtype: torch.dtype | None = None
    group: int | None = None
    page_size: int = 64
    flush_block: int = 128
    prefill: Literal["strict", "exact"] = "strict"
    prefix_attention: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in _SCHEMES:
            raise _wrong("scheme", f"one of {', '.join(_SCHEMES)}", self.scheme)
        if self.dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise _wrong("dtype", "float64, float32, float16, bfloat16 or None", self.dtype)
        if self.dtype is not None and self.scheme != "plain" and not self.has_ring:
            raise _wrong("dtype", f"None for scheme {self.scheme!r}, which keeps no plain values", self.dtype)
        for name in ("page_size", "flush_block", "group"):
            value = getattr(self, name)
            if value is None and name == "group":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _wrong(name, "an int >= 1", value)
        if self.group is not None and self.scheme == "plain":
            raise _wrong("group", "None for scheme 'plain'", self.group)
        if self.has_ring and self.flush_block % self.page_size:
            raise _wrong("flush_block", f"a multiple of the page size {self.page_size}", self.flush_block)
        if self.prefix_attention and self.has_ring:
            raise _wrong("prefix_attention", f"False for scheme {self.scheme!r}", True)
        if self.prefill not in ("strict", "exact"):
            raise _wrong("prefill", "'strict' or 'exact'", self.prefill)

    @staticmethod
    def parse(name: str | KVCacheConfig) -> KVCacheConfig:
        """The configuration of this name: a scheme, or for plain pages a dtype ("bf16", "fp16", "float32", "float64").

        Raises:
            ValueError: an unknown name.
        """
        if isinstance(name, KVCacheConfig):
            return name
        known = _ALIASES.get(name, name) if isinstance(name, str) else None
        if known in _PLAIN:
            return KVCacheConfig(dtype=_PLAIN[known])
        if known not in _SCHEMES:
            raise ValueError(f"kv_cache: expected one of {', '.join((*CACHES, 'fp8', 'contiguous'))}, got {name!r}")
        return KVCacheConfig(scheme=known)

    @property
    def has_ring(self) -> bool:
        """Whether new tokens wait in a ring (kivi)."""
        return self.scheme in ("kivi4", "kivi2")

    @property
    def name(self) -> str:
        """The scheme, or the dtype of plain pages."""
        names = {dtype: name for name, dtype in _PLAIN.items()}
        return names[self.dtype] if self.scheme == "plain" else self.scheme

    def is_lossless(self, dtype: torch.dtype) -> bool:
        """Whether keys and values of this dtype come back as they were."""
        if self.scheme != "plain":
            return False
        return self.dtype is None or torch.promote_types(self.dtype, dtype) == self.dtype


def _wrong(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"KVCacheConfig: {name}: expected {expected}, got {got!r}")


class PagePool:
    """Pages of all layers, and how many tables name each. Grows by doubling; freed pages are used again."""

    def __init__(self, allocate: Callable[[int], KVPages], num_pages: int, num_layers: int) -> None:
        self._allocate = allocate
        self._num_layers = num_layers
        self._counts: list[int] = []
        self._free: list[int] = []
        with torch.inference_mode(False):
            self.pages = allocate(num_pages)
        self._adopt(self.pages)

    @property
    def used(self) -> int:
        """Pages that some table names."""
        return len(self._counts) - len(self._free)

    def count(self, page: int) -> int:
        """Tables that name a page."""
        return self._counts[page]

    def take(self) -> int:
        """A page of one's own, with stale contents."""
        if not self._free:
            self.reserve(max(1, len(self._counts)))
        page = self._free.pop()
        self._counts[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """One more table names these pages."""
        for page in pages:
            self._counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One table less names these pages."""
        for page in pages:
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        """The contents of a page, all layers at once."""
        for tensor in _stores(self.pages):
            tensor[target].copy_(tensor[source])

    def reserve(self, free: int) -> None:
        """At least so many free pages."""
        if len(self._free) >= free:
            return
        have = len(self._counts)
        with torch.inference_mode(False):
            grown = self._allocate(max(2 * have, have + free - len(self._free)))
        for new, old in zip(_stores(grown), _stores(self.pages), strict=True):
            new[:have].copy_(old)
        self._adopt(grown)

    def _adopt(self, pages: KVPages) -> None:
        self.pages = pages
        self.layers = _layers(pages, self._num_layers)
        have = len(self._counts)
        self._counts += [0] * (pages.num_pages - have)
        self._free[:0] = range(pages.num_pages - 1, have - 1, -1)  # lowest numbers are taken first


def _stores(pages: KVPages) -> list[Tensor]:
    return [tensor for tensor in (pages.k, pages.v, pages.k_scale, pages.v_scale) if tensor is not None]


def _layers(pages: KVPages, num_layers: int) -> tuple[KVPages, ...]:
    """Views of each layer's heads."""
    heads = pages.num_kv_heads // num_layers
    kivi = pages.scheme in (KVScheme.KIVI4, KVScheme.KIVI2)

    def narrow(tensor: Tensor | None, dim: int, layer: int) -> Tensor | None:
        return None if tensor is None else tensor.narrow(dim, layer * heads, heads)

    result = []
    for layer in range(num_layers):
        k, v = narrow(pages.k, 1 if kivi else 2, layer), narrow(pages.v, 2, layer)
        assert k is not None and v is not None
        result.append(
            replace(
                pages,
                k=k,
                v=v,
                k_scale=narrow(pages.k_scale, 1 if kivi else 2, layer),
                v_scale=narrow(pages.v_scale, 2, layer),
                k_tail=narrow(pages.k_tail, 2, layer),
                v_tail=narrow(pages.v_tail, 2, layer),
            )
        )
    return tuple(result)


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What the ops of one pass through the layers need, equal for all layers. B rows, n slots.

    Attributes:
        layers: pages of each layer.
        slots: int64 [B * n], where new keys and values go; -1 for padding.
        page_table: int32 [B, pages].
        kv_lens: int32 [B], tokens of each row, those of this pass included.
        num_queries: int32 [B], or None where no slot is padding.
        tail_lens: int32 [B], tokens that are read from the ring; None without one.
        coded_lens: int32 [B, n], tokens that each query reads coded, or None where that is `kv_lens - tail_lens`.
        flush: begin and end, int32 [B] each, of what must be coded before attention, or None.
        base_lens: tokens of each row before this pass.
        prefixes: what rows share, if the configuration asks for it and there is something.
    """

    layers: tuple[KVPages, ...]
    slots: Tensor
    page_table: Tensor
    kv_lens: Tensor
    num_queries: Tensor | None
    tail_lens: Tensor | None
    coded_lens: Tensor | None
    flush: tuple[Tensor, Tensor] | None
    base_lens: list[int]
    prefixes: PrefixStep | None


@dataclass(frozen=True, slots=True)
class PrefixStep:
    """Shared pages of a pass, and what is left to each row (see models.prefix).

    Attributes:
        order, inverse: int64 [B], rows so that groups are adjacent, and back; None where they are.
        levels: of each level group_start int32 [G + 1], counted in slots (n per row), page_table int32 [G, pages] and
            prefix_lens int32 [G].
        page_table, kv_lens: as in PagedStep, without the shared pages.
    """

    order: Tensor | None
    inverse: Tensor | None
    levels: list[tuple[Tensor, Tensor, Tensor]]
    page_table: Tensor
    kv_lens: Tensor


class PagedKVCache(Rows):
    """Keys and values of rows in pages (see the module), behind the KVCache contract.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        batch, capacity: rows, and tokens per row that there is room for at first.
        max_context: most tokens per row.
        config: how they are kept.
        dtype: the model's.
        device: where they live.
    Raises:
        ValueError: sizes that the scheme does not allow; later, for kivi, to cut a row back to a place whose tokens
            have left the ring.
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
        config: KVCacheConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_capacity(batch, capacity, max_context)
        super().__init__(batch, max_context)
        self.config = config = config or KVCacheConfig()
        self._device = torch.device(device)
        self._page_size, self._window = config.page_size, config.flush_block
        ring = self._window + CHUNK if config.has_ring else 0

        def allocate(num_pages: int, batch: int = 0, ring: int = 0) -> KVPages:
            return KVPages.allocate(
                num_pages,
                config.page_size,
                num_layers * num_kv_heads,
                head_dim,
                scheme=config.scheme,
                group=config.group,
                dtype=config.dtype or dtype,
                batch=batch,
                tail_size=ring,
                device=device,
            )

        pages = batch * -(-capacity // self._page_size)
        self._pool = PagePool(allocate, pages, num_layers)
        with torch.inference_mode(False):
            tails = allocate(0, batch if ring else 0, ring)
        self._tails: tuple[Tensor, Tensor] | None = None
        if tails.k_tail is not None and tails.v_tail is not None:
            self._tails = tails.k_tail, tails.v_tail
        self._ring = ring
        self._num_layers = num_layers
        self._layers: tuple[KVPages, ...] | None = None
        self._layers_of: KVPages | None = None
        self._coded = [0] * batch  # kivi: tokens whose codes are valid
        self._written = [0] * batch  # kivi: the ring holds the last of so many tokens
        # kivi: by row, committed tokens of the last block (keys, values) that the pending ones drive out of the ring
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._table_tensor: Tensor | None = None
        self._shared: tuple[SharedPrefixes | None] | None = None  # None: not known; (None,): nothing is shared
        self._status = torch.zeros((), dtype=torch.int32, device=self._device)
        self._tables: list[list[int]] = []
        self._own_tables([[] for _ in range(batch)])

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self._device

    @property
    def pages(self) -> KVPages:
        """Pages of all layers as num_layers * num_kv_heads heads; replaced when the pool grows."""
        return self._with_tails(self._pool.pages)

    @property
    def layers(self) -> tuple[KVPages, ...]:
        """Pages of each layer; replaced when the pool grows."""
        if self._tails is None:
            return self._pool.layers
        if self._layers is None or self._layers_of is not self._pool.pages:
            self._layers_of = self._pool.pages
            self._layers = _layers(self.pages, self._num_layers)
        return self._layers

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """Page numbers of each row, in order."""
        return tuple(map(tuple, self._tables))

    @property
    def num_bytes(self) -> int:
        """Memory of the pages that rows of this cache name, each counted once, and of its rings."""
        used = len({page for table in self._tables for page in table})
        total = sum(used * tensor[0].numel() * tensor.element_size() for tensor in _stores(self._pool.pages))
        return total + sum(tail.numel() * tail.element_size() for tail in self._tails or ())

    @property
    def bits_per_value(self) -> float:
        """Bits of a cached number in the pages, its share of the scales included."""
        return self._pool.pages.bits_per_value

    @property
    def chunk(self) -> int | None:
        """Most slots of one pass through the layers; None where any number will do."""
        if self.config.has_ring:
            return CHUNK
        return None if self._device.type == "cpu" else DEVICE_CHUNK

    @property
    def status(self) -> Status:
        """What coding met so far: NAN, SATURATED, or 0. Of all that was written, kept or not. Reads the device."""
        return Status(int(self._status))

    def depth_room(self) -> list[int]:
        """For every row, the largest depth that a node of a draft tree may have (the root's is 0).

        A kivi cache codes at the multiples of `flush_block`, and a tree may not reach over the next one: the block that
        nodes beyond it would have to see coded is not yet decided.
        """
        if not self.config.has_ring:
            return [self.max_context - 1 - length for length in self._lens]
        return [min(self.max_context, self._next_block(length)) - 1 - length for length in self._lens]

    # -- for models ----------------------------------------------------------------------------------------------------

    def stage_tree(self, num_slots: int, num_nodes: Sequence[int] | None, depths: Sequence[int]) -> None:
        """`stage` for draft trees of `num_nodes[b]` nodes whose deepest one in row b has depth `depths[b]`.

        Raises:
            ValueError: also a tree that is deeper than `depth_room`, or one of more nodes than the ring has room for.
        """
        for row, (depth, room) in enumerate(zip(depths, self.depth_room(), strict=True)):
            if depth > room:
                raise ValueError(f"forward: tree: expected depths 0..{room} in row {row} (flush_block), got {depth}")
        if self.config.has_ring and num_slots > CHUNK:
            raise ValueError(f"forward: tree: expected at most {CHUNK} nodes, got {num_slots}")
        self.stage(num_slots, num_nodes)

    def step(self, first: int, last: int, *, tree: bool = False) -> PagedStep:
        """What the ops need for slots first..last - 1 of the forward that was staged.

        For kivi, steps come in order, each at most `chunk` slots, and the caller does what they say before the next.
        """
        n, size, ring = last - first, self._page_size, self._ring
        base_lens, counts, slots = [], [], []
        for row, (length, pending, table) in enumerate(zip(self._lens, self._pending, self._tables, strict=True)):
            begin = length + min(first, pending)
            count = min(max(pending - first, 0), n)
            base_lens.append(begin)
            counts.append(count)
            if ring:
                slots += [row * ring + position % ring for position in range(begin, begin + count)]
            else:
                slots += _page_slots(table, size, begin, begin + count)
            slots += [-1] * (n - count)
        kv_lens = [length + count for length, count in zip(base_lens, counts)]
        tail_lens = coded_lens = flush = None
        if ring:
            tail_lens, coded_lens, flush = self._coding(base_lens, counts, n, tree=tree)
        return PagedStep(
            layers=self.layers,
            slots=self._tensor(slots, torch.int64),
            page_table=self.page_table(),
            kv_lens=self._tensor(kv_lens),
            num_queries=None if min(counts, default=n) == n else self._tensor(counts),
            tail_lens=tail_lens,
            coded_lens=coded_lens,
            flush=flush,
            base_lens=base_lens,
            prefixes=self._prefix_step(kv_lens, n) if self.config.prefix_attention else None,
        )

    def note(self, statuses: Sequence[Tensor]) -> None:
        """Add what `ops.kv_append_` and `ops.kv_flush_` returned to `status`. Does not synchronise."""
        found = torch.cat([status.flatten() for status in statuses]) if statuses else self._status.view(1)
        if found.numel():
            for bit in (int(Status.NAN), int(Status.SATURATED)):
                self._status = self._status | (found & bit).amax()

    def page_table(self) -> Tensor:
        """Page numbers, int32 [B, most pages of a row, at least 1]; 0 past a row's pages."""
        if self._table_tensor is None:
            self._table_tensor = self._rectangle(self._tables)
        return self._table_tensor

    def dequantise(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Committed keys and values, each [num_layers, B, num_kv_heads, longest row, head_dim], 0 past a row's end.

        What a query behind the last token sees: for kivi whole blocks coded and the rest plain.

        Raises:
            ValueError: pending tokens of a long forward lie where the ring had committed ones; `keep` or `truncate`
                first.
        """
        if self._saved:
            raise ValueError(
                "PagedKVCache.dequantise: expected keep or truncate before it: pending tokens fill the ring "
                f"of {self._ring} tokens, got row {min(self._saved)}"
            )
        tail_lens = None
        if self.config.has_ring:
            tail_lens = self._tensor([length % self._window for length in self._lens])
        found = ops.kv_dequant(
            self.pages,
            self.page_table(),
            self._tensor(self._lens),
            tail_lens=tail_lens,
            length=max(self._lens, default=0),
            dtype=dtype or torch.float32,
        )
        k, v = (tensor.unflatten(2, (self._num_layers, -1)).permute(2, 0, 3, 1, 4) for tensor in (found.k, found.v))
        return k, v

    # -- what Rows asks for --------------------------------------------------------------------------------------------

    def _commit(self, counts: list[int], moves: Moves) -> None:
        new_lens = [length + count for length, count in zip(self._lens, counts)]
        window = self._window
        coded = list(self._coded)
        starts, paths = list(self._lens), list[list[int]]([] for _ in counts)
        for row, slots in moves:
            # from the last slot that stays: the places before it may have left the ring
            last = next(i for i, slot in enumerate(slots) if slot != i) - 1
            starts[row] += last
            paths[row] = [slot - last for slot in slots[last:]]
            coded[row] = min(coded[row], (starts[row] + 1) // window * window)
        if self.config.has_ring:
            ends = [length // window * window for length in new_lens]
            for row, (have, end, length) in enumerate(zip(coded, ends, new_lens)):
                first = min(have, end, starts[row]) if len(paths[row]) > 1 else min(have, end)
                if counts[row] or row not in self._saved:
                    self._check_ring("KVCache.keep: num_keep", row, first, length)
            self._restore([row for row in self._saved if not counts[row]])
        if moves:
            if not self.config.has_ring:
                for row, _ in moves:
                    self._make_writable(row, starts[row] + 1, new_lens[row], pending=True)
            status = ops.kv_keep_(
                self.pages,
                self._rectangle(paths),
                self._tensor(list(map(len, paths))),
                self._tensor(starts),
                page_table=None if self.config.has_ring else self.page_table(),
            )
            assert not status.any(), "KVCache.keep: the op refused what was checked"
        if self.config.has_ring:
            if any(have < end for have, end in zip(coded, ends)):
                for row, (have, end) in enumerate(zip(coded, ends)):
                    self._make_writable(row, have, end)
                self.note([ops.kv_flush_(self.pages, self.page_table(), self._tensor(coded), self._tensor(ends))])
            self._coded = ends
        for row, length in enumerate(new_lens):
            self._trim(row, length)

    def _shorten(self, lens: list[int]) -> None:
        if self.config.has_ring:
            ends = [length // self._window * self._window for length in lens]
            saved = [row for row in self._saved if ends[row] == self._lens[row] // self._window * self._window]
            for row, (end, length) in enumerate(zip(ends, lens)):
                if row not in saved:
                    self._check_ring("KVCache.truncate: lens", row, end, length)
            self._restore(saved)
        for row, length in enumerate(lens):
            self._trim(row, length)

    def _take(self, rows: list[int], *, forked: bool) -> None:
        tables = [list(self._tables[row]) for row in rows]
        for table in tables:
            self._pool.share(table)
        if forked:
            self._own_tables(tables)
        else:
            for table in self._tables:
                self._pool.release(table)
            self._tables[:] = tables
            self._forget_table()
        self._coded = [self._coded[row] for row in rows]
        self._written = [self._written[row] for row in rows]
        self._saved = {new: self._saved[row] for new, row in enumerate(rows) if row in self._saved}
        if self._tails is not None:
            index = self._tensor(rows, torch.int64)
            with torch.inference_mode(False):
                # a transposed view, so that heads stay before tokens in memory
                k, v = (tail.transpose(1, 2).index_select(0, index).transpose(1, 2) for tail in self._tails)
            self._tails, self._layers = (k, v), None

    def _reserve(self, n: int) -> None:
        needed = [self._pages_for(length + n) - len(table) for length, table in zip(self._lens, self._tables)]
        self._pool.reserve(sum(max(0, pages) for pages in needed))

    def _make_room(self, num_slots: int, counts: list[int]) -> None:
        if self.config.has_ring:
            self._restore(list(self._saved))
            for row, (length, count) in enumerate(zip(self._lens, counts)):
                if length % self._window and count > self._ring - length % self._window:
                    self._save(row, length)
        for row, (length, count) in enumerate(zip(self._lens, counts)):
            if self.config.has_ring:
                # codes of blocks that this pass may complete; its tokens themselves go to the ring
                self._trim(row, length)
                self._coded[row] = min(self._coded[row], length // self._window * self._window)
                self._make_writable(row, self._coded[row], (length + count) // self._window * self._window)
                self._written[row] = max(self._written[row], length + count)
            else:
                self._trim(row, length + count)
                self._make_writable(row, length, length + count)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _own_tables(self, tables: list[list[int]]) -> None:
        """Hold these tables, whose pages are counted already, until this cache is gone."""
        self._tables = tables
        self._forget_table()
        weakref.finalize(self, _release, self._pool, tables).atexit = False

    def _forget_table(self) -> None:
        """Tables have changed."""
        self._table_tensor = self._shared = None

    def _with_tails(self, pages: KVPages) -> KVPages:
        return pages if self._tails is None else replace(pages, k_tail=self._tails[0], v_tail=self._tails[1])

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _rectangle(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows padded with 0, int32 [rows, longest, at least 1]."""
        array = np.zeros((len(rows), max(map(len, rows), default=0) or 1), dtype=np.int32)
        for line, row in zip(array, rows):
            line[: len(row)] = row
        return torch.from_numpy(array).to(self._device)

    def _prefix_step(self, kv_lens: list[int], n: int) -> PrefixStep | None:
        if self._shared is None:
            whole = [length // self._page_size for length in self._lens]
            self._shared = (shared_prefixes(self._tables, whole),)
        (shared,) = self._shared
        if shared is None:
            return None
        size = self._page_size
        order = inverse = None
        if shared.order != sorted(shared.order):
            order = self._tensor(shared.order, torch.int64)
            inverse = order.argsort()
        skipped = self._tensor([pages * size for pages in shared.skipped])
        return PrefixStep(
            order=order,
            inverse=inverse,
            levels=[
                (
                    self._tensor([start * n for start in level.starts]),
                    self._rectangle(level.pages),
                    self._tensor([len(pages) * size for pages in level.pages]),
                )
                for level in shared.levels
            ],
            page_table=self._rectangle([table[pages:] for table, pages in zip(self._tables, shared.skipped)]),
            kv_lens=self._tensor(kv_lens) - skipped,
        )

    def _pages_for(self, length: int) -> int:
        """Pages of a row of so many tokens."""
        if self.config.has_ring:
            length = length // self._window * self._window
        return -(-length // self._page_size)

    def _next_block(self, position: int) -> int:
        return (position // self._window + 1) * self._window

    def _check_ring(self, where: str, row: int, first: int, length: int) -> None:
        """Whether the ring still holds tokens first..length - 1 of a row."""
        oldest = max(0, self._written[row] - self._ring)
        if first < oldest and first < length:
            raise ValueError(
                f"{where}: expected a length whose last block still waits in the ring of {self._ring} tokens "
                f"(from {oldest} on), got {length} in row {row}"
            )

    def _save(self, row: int, length: int) -> None:
        """Copy the tokens of the last block that are not coded yet."""
        assert self._tails is not None
        index = self._ring_slots(length // self._window * self._window, length)
        k, v = (tail[row, index] for tail in self._tails)
        self._saved[row] = k, v

    def _restore(self, rows: list[int]) -> None:
        """Put back what was saved of these rows, and forget the rest: pending tokens are about to be settled."""
        for row in rows:
            assert self._tails is not None
            begin = self._lens[row] // self._window * self._window
            index = self._ring_slots(begin, self._lens[row])
            for tail, tokens in zip(self._tails, self._saved[row]):
                tail[row, index] = tokens
            self._written[row] = begin + self._ring  # nothing before them is left
        self._saved = {}

    def _ring_slots(self, begin: int, end: int) -> Tensor:
        return self._tensor([position % self._ring for position in range(begin, end)], torch.int64)

    def _trim(self, row: int, length: int) -> None:
        """Give back the pages past a row's length."""
        table, keep = self._tables[row], self._pages_for(length)
        if len(table) > keep:
            self._pool.release(table[keep:])
            del table[keep:]
            self._forget_table()

    def _make_writable(self, row: int, begin: int, end: int, *, pending: bool = False) -> None:
        """A row's pages of tokens begin..end - 1: there, and nobody else's.

        A page that is copied has the tokens before `begin`, or all of them if pending ones are still to be moved.
        """
        if begin >= end:
            return
        table, pool, size = self._tables[row], self._pool, self._page_size
        for i in range(begin // size, -(-end // size)):
            if i == len(table):
                table.append(pool.take())
            elif pool.count(table[i]) > 1:
                page = pool.take()
                if begin > i * size or pending:
                    pool.copy(table[i], page)
                pool.release(table[i : i + 1])
                table[i] = page
            else:
                continue
            self._forget_table()

    def _coding(
        self, base_lens: list[int], counts: list[int], n: int, *, tree: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """tail_lens, coded_lens and flush of a step (see PagedStep); books what the flush will have coded."""
        window = self._window
        lows = [base // window * window for base in base_lens]  # what the first query sees coded
        tails = [base + count - low for base, count, low in zip(base_lens, counts, lows)]
        if tree:  # no deeper than the next block: all nodes see the same
            return self._tensor(tails), None, None
        ends = [(base + max(count, 1) - 1) // window * window for base, count in zip(base_lens, counts)]
        flush = coded_lens = None
        begins = self._coded
        if any(begin < end for begin, end in zip(begins, ends)):
            flush = self._tensor(begins), self._tensor([max(pair) for pair in zip(begins, ends)])
            self._coded = [max(pair) for pair in zip(begins, ends)]
        if any(low < end for low, end in zip(lows, ends)):
            seen = [[min((base + i) // window * window, end) for i in range(n)] for base, end in zip(base_lens, ends)]
            coded_lens = self._tensor(seen)
        return self._tensor(tails), coded_lens, flush


def _page_slots(table: list[int], size: int, begin: int, end: int) -> list[int]:
    """Slots of tokens begin..end - 1."""
    slots: list[int] = []
    while begin < end:
        stop = min(end, (begin // size + 1) * size)
        start = table[begin // size] * size + begin % size
        slots += range(start, start + stop - begin)
        begin = stop
    return slots


def _release(pool: PagePool, tables: list[list[int]]) -> None:
    for table in tables:
        pool.release(table)
