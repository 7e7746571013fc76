"""How NativeModel attends: one pass through its blocks over a contiguous or a paged cache.

A pass holds what all blocks share and is called once per block, with that block's queries, keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .cache import ContiguousKVCache
from .paged_cache import PagedKVCache, PagedStep, PrefixStep

if TYPE_CHECKING:
    from .native import Block, NativeModel

__all__ = ["ContiguousPass", "PagedPass", "check_positions"]


def check_positions(
    positions: Tensor, batch: int, n: int, counts: list[int] | None, max_context: int
) -> tuple[Tensor, int]:
    """Positions int64 [B, n] with 0 in padded slots, and the largest; ValueError for wrong shape, dtype or values."""
    where = "NativeModel.forward"
    if positions.dtype not in (torch.int64, torch.int32) or positions.shape not in ((batch, n), (n,)):
        raise ValueError(
            f"{where}: positions: expected int64 [{batch}, {n}], got {positions.dtype} {list(positions.shape)}"
        )
    positions = positions.expand(batch, n)
    if counts is not None:
        limit = torch.tensor(counts, device=positions.device).unsqueeze(1)
        positions = positions.masked_fill(torch.arange(n, device=positions.device) >= limit, 0)
    low, high = (int(bound) for bound in torch.aminmax(positions)) if positions.numel() else (0, 0)
    if low < 0 or high >= max_context:
        raise ValueError(f"{where}: positions: expected 0..{max_context - 1}, got {low if low < 0 else high}")
    return positions.long(), high


class ContiguousPass:
    """Attention over a ContiguousKVCache: views of the cache, rotation factors, masks.

    With equal lengths in all rows (always at batch 1) writes are slices and masks come from a table. Otherwise keys are
    scattered to per-row positions, and shorter rows are masked, their unused slots cleared (0 * NaN would not be 0).
    """

    __slots__ = (
        "batch",
        "cache_dtype",
        "calls",
        "factors",
        "factors_k",
        "factors_q",
        "k",
        "k_new",
        "model",
        "n",
        "slots",
        "v",
        "v_new",
    )

    def __init__(
        self,
        model: NativeModel,
        cache: ContiguousKVCache,
        n: int,
        positions: tuple[Tensor, int] | None,
    ) -> None:
        lens = cache.host_lens
        self.model, self.batch, self.n = model, len(lens), n
        self.cache_dtype = cache.k.dtype
        before = max(lens, default=0)
        total = before + n
        self.k = cache.k.narrow(3, 0, total).unbind(0)
        self.v = cache.v.narrow(3, 0, total).unbind(0)
        equal = self.batch == 1 or all(length == before for length in lens)
        if equal:
            self.slots = None
            new = cache.k.unflatten(-1, (-1, 2)).narrow(3, before, n)
            self.k_new = (new if self.cache_dtype == torch.bfloat16 else torch.view_as_complex(new)).unbind(0)
            self.v_new = cache.v.narrow(3, before, n).unbind(0)
            self.calls = {window: mask.calls(before, n) for window, mask in model.masks.items()}
        else:
            self.k_new = self.v_new = ()
            own = torch.tensor(lens, device=model.device).unsqueeze(1)
            slots = own + torch.arange(n, device=model.device)
            self.slots = (torch.arange(self.batch, device=model.device).unsqueeze(1), slots)
            for row, length in enumerate(lens):
                if length + n < total:
                    cache.k[:, row, :, length + n : total].zero_()
                    cache.v[:, row, :, length + n : total].zero_()
            self.calls = {window: mask.ragged(slots, total) for window, mask in model.masks.items()}
        self.factors = self._rotation(positions, before, equal)
        self.factors_k = self.factors.transpose(1, 2)
        self.factors_q = self.factors_k.unsqueeze(3)

    def _rotation(self, positions: tuple[Tensor, int] | None, before: int, equal: bool) -> Tensor:
        """Complex [1 or B, n, 1, head_dim / 2]."""
        model, n = self.model, self.n
        if positions is None and equal:
            return model.rope.upto(before + n)[before : before + n].view(1, n, 1, -1)
        if positions is None:
            assert self.slots is not None
            return model.rope.upto(before + n)[self.slots[1]].unsqueeze(2)
        places, high = positions
        return model.rope.upto(high + 1)[places].unsqueeze(2)

    def attend(self, index: int, block: Block, qkv: Tensor) -> Tensor:
        """Store keys and values of a block; attention [B * n, num_q_heads * head_dim].

        `qkv` is fresh and contiguous, so strided views are taken directly: one call each instead of three.
        """
        config = self.model.native_config
        batch, n, dim = self.batch, self.n, config.head_dim
        q_heads, kv_heads = config.num_q_heads, config.num_kv_heads
        group = q_heads // kv_heads
        half, rotated = dim // 2, (q_heads + kv_heads) * dim
        row = rotated + kv_heads * dim
        v = qkv.as_strided((batch, kv_heads, n, dim), (n * row, dim, row, 1), rotated)
        qk = qkv
        if block.qk_norm is not None:
            heads = qkv.as_strided((batch * n, q_heads + kv_heads, dim), (row, dim, 1), 0)
            qk, row = self.model.rms_norm(heads, block.qk_norm), rotated
        if qk.dtype == torch.bfloat16:  # there are no bfloat16 complex numbers
            qk, row = qk.as_strided((batch * n, rotated), (row, 1), 0).float(), rotated
        pairs = torch.view_as_complex(qk.view(batch * n, row // 2, 2))
        row //= 2
        # queries of one kv head over all slots are rows of one product
        q = pairs.as_strided((batch, kv_heads, n, group, half), (n * row, group * half, row, half, 1), 0)
        q = torch.mul(q, self.factors_q, out=torch.empty_like(q, memory_format=torch.contiguous_format))
        if self.slots is None:
            k = pairs.as_strided((batch, kv_heads, n, half), (n * row, half, row, 1), q_heads * half)
            if self.cache_dtype == torch.bfloat16:
                self.k_new[index].copy_(torch.view_as_real(k * self.factors_k))
            else:
                torch.mul(k, self.factors_k, out=self.k_new[index])
            self.v_new[index].copy_(v)
        else:
            k = pairs.as_strided((batch, n, kv_heads, half), (n * row, row, half, 1), q_heads * half)
            rows, slots = self.slots
            self.k[index][rows, :, slots] = torch.view_as_real(k * self.factors).flatten(-2).to(self.cache_dtype)
            self.v[index][rows, :, slots] = v.transpose(1, 2)
        queries = torch.view_as_real(q).to(self.cache_dtype).view(batch, kv_heads, n * group, dim)
        calls = self.calls[block.window]
        keys, values = self.k[index], self.v[index]
        if len(calls) == 1:
            _, _, begin, _, mask = calls[0]
            if begin:
                keys, values = keys[:, :, begin:], values[:, :, begin:]
            out = F.scaled_dot_product_attention(queries, keys, values, mask)
        else:
            parts = [
                F.scaled_dot_product_attention(
                    queries[:, :, first * group : last * group], keys[:, :, begin:end], values[:, :, begin:end], mask
                )
                for first, last, begin, end, mask in calls
            ]
            out = torch.cat(parts, 2)
        return out.unflatten(2, (n, group)).transpose(1, 2).reshape(batch * n, q_heads * dim)


class PagedPass:
    """Attention over slots first..last - 1 of what was staged in a PagedKVCache.

    Args:
        cache: staged.
        first, last: which slots of the forward.
        positions: int64 [B, last - first] and the largest, or None for the places in the text.
        tree_mask: of `ops.tree_mask`, or None for a chain.
        plain: an uncoded cache, of whose rows those that are empty in `cache` are staged alike: they attend to it, and
            `cache` is only written.
    """

    __slots__ = ("_first", "_model", "_n", "_plain", "_positions", "_rope", "_step", "_tree_mask", "statuses")

    def __init__(
        self,
        model: NativeModel,
        cache: PagedKVCache,
        first: int,
        last: int,
        *,
        positions: tuple[Tensor, int] | None = None,
        tree_mask: Tensor | None = None,
        plain: PagedKVCache | None = None,
    ) -> None:
        self._model, self._n, self._tree_mask = model, last - first, tree_mask
        tree = tree_mask is not None
        self._step = step = cache.step(first, last, tree=tree)
        self.statuses: list[Tensor] = []  # of what was written to `cache`
        self._plain: PagedStep | None = None
        self._first: Tensor | None = None  # [B, 1, 1, 1], rows that attend to plain pages; None: all
        if plain is not None:
            self._plain = plain.step(first, last, tree=tree)
            if any(cache.host_lens):
                self._first = torch.tensor([not length for length in cache.host_lens], device=model.device)
                self._first = self._first.view(-1, 1, 1, 1)
        if positions is None:
            places = [range(base, base + last - first) for base in step.base_lens]
            limit = model.config.max_context - 1  # padding may reach past it
            flat = [min(place, limit) for row in places for place in row]
            self._positions = torch.tensor(flat, device=model.device)
            highest = max(flat, default=0)
        else:
            self._positions, highest = positions[0].reshape(-1), positions[1]
        self._rope = model.rope.halves(highest + 1)

    def attend(self, index: int, block: Block, qkv: Tensor) -> Tensor:
        """Store keys and values of a block; attention [B * n, num_q_heads * head_dim]."""
        config = self._model.native_config
        dim, q_heads, kv_heads = config.head_dim, config.num_q_heads, config.num_kv_heads
        rotated = (q_heads + kv_heads) * dim
        rows, row = qkv.shape
        v = qkv.as_strided((rows, kv_heads, dim), (row, dim, 1), rotated)
        qk = qkv
        if block.qk_norm is not None:
            heads = qkv.as_strided((rows, q_heads + kv_heads, dim), (row, dim, 1), 0)
            qk, row = self._model.rms_norm(heads, block.qk_norm), rotated
        q = qk.as_strided((rows, q_heads, dim), (row, dim, 1), 0)
        k = qk.as_strided((rows, kv_heads, dim), (row, dim, 1), q_heads * dim)
        self.statuses += self._append(self._step, index, k, v, q)  # rotates q
        queries = q.unflatten(0, (-1, self._n))
        if self._plain is None:
            out = self._read(self._step, index, block, queries)
        else:
            self._append(self._plain, index, k, v, None)
            out = self._read(self._plain, index, block, queries)
            if self._first is not None:
                coded = self._read(self._step, index, block, queries)
                out = torch.where(self._first, out.view_as(queries), coded.view_as(queries))
        return out.view(rows, q_heads * dim)

    def _read(self, step: PagedStep, index: int, block: Block, queries: Tensor) -> Tensor:
        """Attention to the pages of a step."""
        shared = step.prefixes if block.window is None else None
        own = ops.paged_attention(
            queries,
            step.layers[index],
            (shared or step).page_table,
            (shared or step).kv_lens,
            num_queries=step.num_queries,
            tail_lens=step.tail_lens,
            coded_lens=step.coded_lens,
            tree_mask=self._tree_mask,
            window=block.window,
        )
        return own.out if shared is None else _with_prefixes(queries, step.layers[index], shared, own)

    def _append(self, step: PagedStep, index: int, k: Tensor, v: Tensor, q: Tensor | None) -> list[Tensor]:
        pages = step.layers[index]
        rope, places = self._rope, self._positions
        found = [ops.kv_append_(k, v, step.slots, pages, q=q, rope=rope, positions=places, interleaved=True)]
        if step.flush is not None:
            found.append(ops.kv_flush_(pages, step.page_table, *step.flush))
        return found


def _with_prefixes(q: Tensor, pages: ops.KVPages, shared: PrefixStep, own: ops.Attention) -> Tensor:
    """Attention [B, n, num_q_heads, head_dim] to what rows share and to what is a row's own (Hydragen, section 3)."""
    ordered = q if shared.order is None else q[shared.order]
    outs, lses = [own.out.flatten(0, 1)], [own.lse.flatten(0, 1)]
    for group_start, page_table, prefix_lens in shared.levels:
        part = ops.prefix_attention(ordered.flatten(0, 1), pages, group_start, page_table, prefix_lens)
        for parts, tensor in ((outs, part.out), (lses, part.lse)):
            if shared.inverse is not None:
                tensor = tensor.view(*q.shape[:2], *tensor.shape[1:])[shared.inverse].flatten(0, 1)
            parts.append(tensor)
    return ops.merge_states(outs, lses).out
