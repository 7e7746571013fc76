"""Attention to a paged cache, and joining what was attended to apart (csrc/attention)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import check_devices, value_dtype
from .kv_pages import KVPages


class Attention(NamedTuple):
    """See `paged_attention`."""

    out: Tensor
    lse: Tensor
    status: Tensor


class Merged(NamedTuple):
    """See `merge_states`."""

    out: Tensor
    lse: Tensor


def paged_attention(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    num_queries: Tensor | None = None,
    tail_lens: Tensor | None = None,
    coded_lens: Tensor | None = None,
    tree_mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Attention:
    """Attention of a step's queries to their requests' cached keys, which hold the step's own already.

    Query i of request b stands at position kv_lens[b] - num_queries[b] + depth, where depth is i, or in a tree the
    number of proper ancestors. A row's bits depend neither on other rows, nor on how many there are, nor on threads.

    Args:
        q: queries, float64, float32, float16 or bfloat16 [B, N, Hq, D], D a multiple of 16 up to 256; any strides, last
            dim contiguous. Hq is a multiple of the cache's heads H; head h reads kv head h // (Hq // H).
        pages: the cache, see KVPages; plain pages may have another dtype than q.
        page_table: int32 [B, max_pages]; token t of request b lies in page page_table[b, t // page_size].
        kv_lens: int32 [B], cached tokens, the step's own included, 0..max_pages * page_size.
        num_queries: int32 [B], 0..N and at most kv_lens; None means N. Slots behind have out 0, lse -inf.
        tail_lens: int32 [B], kivi only and needed there: how many of the newest tokens lie in the ring.
        coded_lens: int32 [B, N], kivi only: query i reads keys below it from pages, the others from the ring, whose
            last tail_lens tokens must hold them. None means kv_lens - tail_lens.
        tree_mask: int32 [B, N, ceil(N / 32)], contiguous: bit j & 31 of word j >> 5 of row i says whether node i sees
            node j of the step (see `tree_mask`). None: a chain.
        causal: False: queries of a chain see all kv_lens keys.
        window: keys at least so many positions back are not seen. None: no limit.
        softcap: scores become softcap * tanh(score / softcap). None: they do not.
        scale: of the scores; None: 1 / sqrt(D).
    Returns:
        out: like q, contiguous; lse: [B, N, Hq], natural logarithm of the sum of exp(score), float32, float64 for
        float64 q; (0, -inf) where a query sees nothing, and for the whole request where status is not 0. status: int32
        [B]: 32 a length outside its range, 64 a page of the request's tokens outside the cache. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device, or arguments that the scheme does not have.
    Source: Dao 2023 (FlashAttention-2), Dao et al. 2023 (Flash-Decoding), Miao et al. 2024 (tree attention).
    Reference: fastdecode.testing.reference.attention.
    """
    _check_window("paged_attention", window)
    _check_softcap("paged_attention", softcap)
    return Attention(
        *torch.ops.fastdecode.paged_attention.default(
            q,
            *pages.tensors(),
            page_table,
            kv_lens,
            num_queries,
            tail_lens,
            coded_lens,
            tree_mask,
            causal,
            window or 0,
            softcap or 0.0,
            _scale(q, scale),
        )
    )


@torch.library.register_fake("fastdecode::paged_attention")
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("paged_attention", q, *others)
    lse = q.new_empty(q.shape[:-1], dtype=value_dtype(q))
    return q.new_empty(q.shape), lse, q.new_empty(q.shape[:1], dtype=torch.int32)


def prefix_attention(
    q: Tensor,
    pages: KVPages,
    group_start: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    *,
    softcap: float | None = None,
    scale: float | None = None,
) -> Attention:
    """Attention of many requests' queries to prefixes that groups of them share; the keys are read once per group.

    There is no mask. Join it with attention to the rest by `merge_states`.

    Args:
        q: queries, float64, float32, float16 or bfloat16 [R, Hq, D], D a multiple of 16 up to 256; any strides, last
            dim contiguous. Rows of a group stand together.
        pages: the cache, see KVPages; of kivi only what lies in pages is read.
        group_start: int32 [G + 1], rising: group g is rows group_start[g] .. group_start[g + 1] - 1. Rows of no group
            have out 0, lse -inf.
        page_table: int32 [G, max_pages].
        prefix_lens: int32 [G], 0..max_pages * page_size.
        softcap: scores become softcap * tanh(score / softcap). None: they do not.
        scale: of the scores; None: 1 / sqrt(D).
    Returns:
        out: like q, contiguous; lse: [R, Hq], as paged_attention gives it; status: int32 [G]: 32 a length or start
        outside its range, 64 a page of the prefix outside the cache. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device.
    Source: Juravsky et al. 2024 (Hydragen). Reference: fastdecode.testing.reference.attention.
    """
    _check_softcap("prefix_attention", softcap)
    return Attention(
        *torch.ops.fastdecode.prefix_attention.default(
            q, *pages.tensors(), group_start, page_table, prefix_lens, softcap or 0.0, _scale(q, scale)
        )
    )


@torch.library.register_fake("fastdecode::prefix_attention")
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("prefix_attention", q, *others)
    group_start = others[8]
    assert isinstance(group_start, Tensor)
    lse = q.new_empty(q.shape[:-1], dtype=value_dtype(q))
    return q.new_empty(q.shape), lse, q.new_empty((group_start.shape[0] - 1,), dtype=torch.int32)


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Merged:
    """Join attention over disjoint sets of keys into attention over all of them.

    With m the largest lse and w = exp(lse - m): out = sum w out / sum w, lse = m + log sum w. A state (0, -inf) changes
    nothing; an attention sink is a state of its own, out 0 and lse the sink's logit.

    Args:
        outs: 1 to 16 tensors, float64, float32, float16 or bfloat16 [R, Hq, D], contiguous.
        lses: as many of [R, Hq], float32, float64 for float64 outs, contiguous.
    Returns:
        out: [R, Hq, D] in the dtype of outs; lse: [R, Hq]. Does not synchronise.
    Raises:
        ValueError: wrong number, rank, shape, dtype, layout or device.
    Source: Dao et al. 2023 (Flash-Decoding). Reference: fastdecode.testing.reference.attention.
    """
    if not outs:  # an op without a tensor has no device
        raise ValueError("merge_states: outs: expected 1 to 16 tensors, got 0")
    return Merged(*torch.ops.fastdecode.merge_states.default(list(outs), list(lses)))


@torch.library.register_fake("fastdecode::merge_states")
def _(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    for name, tensors in (("outs", outs), ("lses", lses)):
        for tensor in tensors:
            if tensor.device != outs[0].device:
                raise ValueError(f"merge_states: {name}: expected {outs[0].device}, got {tensor.device}")
    return torch.empty_like(outs[0]), torch.empty_like(lses[0])


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None:
        return float(scale)
    return 1.0 / math.sqrt(q.shape[-1]) if q.dim() and q.shape[-1] else 1.0


def _check_window(op: str, window: int | None) -> None:
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise ValueError(f"{op}: window: expected an int of at least 1 or None, got {window!r}")


def _check_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap: expected more than 0 or None, got {softcap}")
