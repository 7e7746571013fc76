"""Attention to a paged cache (csrc/core/kv.h), one query and head at a time, in long double."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..._host import KVScheme, Status
from ...ops.kv_pages import KVPages

__all__ = [
    "Attended",
    "dequantised",
    "keys_and_values",
    "merge_states",
    "paged_attention",
    "prefix_attention",
    "visible",
]

_BITS = {KVScheme.INT8: 8, KVScheme.INT4: 4, KVScheme.KIVI4: 4, KVScheme.KIVI2: 2}
_FP8 = {KVScheme.FP8_E4M3: torch.float8_e4m3fn, KVScheme.FP8_E5M2: torch.float8_e5m2}


class Attended(NamedTuple):
    """As the op returns it: out and lse in long double, status int32."""

    out: np.ndarray
    lse: np.ndarray
    status: np.ndarray


def _codes(data: Tensor, bits: int, run: int) -> Tensor:
    """Unpack the last dimension: of a run of n codes, byte j of n * bits / 8 holds codes j, j + n * bits / 8, ..."""
    runs = data.unflatten(-1, (-1, run * bits // 8)).int()
    parts = [(runs >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(parts, -1).flatten(-2).double()


def _per_token(pages: KVPages, data: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return data.double()
    if pages.scheme in _FP8:
        values = data.view(_FP8[pages.scheme]).double()
        if scale.dim() == 1:
            return values * scale.double()[:, None]
        return values * scale.double().repeat_interleave(pages.group, -1)
    codes = _codes(data, _BITS[pages.scheme], pages.head_dim)
    step, offset = (scale[..., i].double().repeat_interleave(pages.group, -1) for i in (0, 1))
    return codes * step + offset


def dequantised(pages: KVPages) -> tuple[Tensor, Tensor]:
    """Keys and values of all slots of all pages, float64 [P, page_size, H, D]."""
    values = _per_token(pages, pages.v, pages.v_scale)
    if pages.scheme not in (KVScheme.KIVI4, KVScheme.KIVI2):
        return _per_token(pages, pages.k, pages.k_scale), values
    assert pages.k_scale is not None
    codes = _codes(pages.k, _BITS[pages.scheme], pages.group)  # [P, H, D, page_size]
    step, offset = (
        pages.k_scale[:, :, :, i].double().transpose(2, 3).repeat_interleave(pages.group, -1) for i in (0, 1)
    )
    return (codes * step + offset).permute(0, 3, 1, 2), values


def keys_and_values(pages: KVPages, table: Tensor, length: int, b: int = 0, tail_len: int = 0) -> tuple[Tensor, Tensor]:
    """Of one request, float64 [length, H, D]: the last tail_len tokens from ring b, the others from pages."""
    k, v = dequantised(pages)
    coded = length - tail_len
    at = torch.arange(coded)
    page, slot = table[at // pages.page_size].long(), at % pages.page_size
    k, v = k[page, slot], v[page, slot]
    if tail_len:
        assert pages.k_tail is not None and pages.v_tail is not None
        ring = torch.arange(coded, length) % pages.k_tail.shape[1]
        k, v = torch.cat((k, pages.k_tail[b, ring].double())), torch.cat((v, pages.v_tail[b, ring].double()))
    return k, v


def visible(
    length: int, num_nodes: int, tree_mask: Tensor | None = None, causal: bool = True, window: int | None = None
) -> np.ndarray:
    """Which of a request's `length` cached tokens each of its queries sees, bool [num_nodes, length].

    tree_mask: int32 [N, W], the request's own.
    """
    base = length - num_nodes
    keys = np.arange(length)  # their positions
    if tree_mask is None:
        positions = base + np.arange(num_nodes)
        seen = (keys <= positions[:, None]) | (not causal)
    else:
        words = tree_mask.numpy()
        bits = np.array([[words[i, n // 32] >> (n % 32) & 1 for n in range(num_nodes)] for i in range(num_nodes)])
        bits = bits.reshape(num_nodes, num_nodes).astype(bool)
        ancestors = bits & ~np.eye(num_nodes, dtype=bool)
        positions = base + ancestors.sum(1)
        seen = np.concatenate((np.ones((num_nodes, base), bool), bits), 1)
        keys = np.concatenate((keys[:base], positions))
    if window is not None:
        seen &= positions[:, None] - keys < window
    return seen


def _softmax(
    scores: np.ndarray, values: np.ndarray, softcap: float | None, scale: float
) -> tuple[np.ndarray, np.longdouble]:
    scores = scores * np.longdouble(scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if scores.size == 0:
        return np.zeros(values.shape[-1], np.longdouble), np.longdouble(-np.inf)
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), scores.max() + np.log(weights.sum())


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
) -> Attended:
    """Of every query apart: the keys that it sees, one softmax over them."""
    batch, slots, heads, head_dim = q.shape
    out = np.zeros(q.shape, np.longdouble)
    lse = np.full(q.shape[:-1], -np.inf, np.longdouble)
    status = np.zeros(batch, np.int32)
    room = page_table.shape[1] * pages.page_size
    queries = q.double().numpy().astype(np.longdouble)
    per_key = heads // pages.num_kv_heads
    for b in range(batch):
        length = int(kv_lens[b])
        count = slots if num_queries is None else int(num_queries[b])
        tail = 0 if tail_lens is None else int(tail_lens[b])
        ring_size = 0 if pages.k_tail is None else pages.k_tail.shape[1]
        bad = length < 0 or not 0 <= count <= min(slots, length) or not 0 <= tail <= min(length, ring_size)
        coded = [length - tail] * max(count, 1)
        if not bad and coded_lens is not None and count:
            coded = coded_lens[b, :count].tolist()
        if bad or min(coded) < length - tail or max(coded) > min(length, room):
            status[b] = Status.BAD_LENGTH
            continue
        ids = page_table[b, : -(-max(coded) // pages.page_size)]
        if bool(((ids < 0) | (ids >= pages.num_pages)).any()):
            status[b] = Status.BAD_PAGE
            continue
        seen_by = visible(length, count, None if tree_mask is None else tree_mask[b], causal, window)
        for i in range(count):
            if i == 0 or coded[i] != coded[i - 1]:
                keys, values = keys_and_values(pages, page_table[b], length, b, length - coded[i])
                k, v = (t.numpy().astype(np.longdouble) for t in (keys, values))
            seen = seen_by[i]
            for h in range(heads):
                scores = k[seen, h // per_key] @ queries[b, i, h]
                out[b, i, h], lse[b, i, h] = _softmax(
                    scores, v[seen, h // per_key], softcap, head_dim**-0.5 if scale is None else scale
                )
    return Attended(out, lse, status)


def prefix_attention(
    q: Tensor,
    pages: KVPages,
    group_start: Tensor,
    page_table: Tensor,
    prefix_lens: Tensor,
    *,
    softcap: float | None = None,
    scale: float | None = None,
) -> Attended:
    """Each row of a group sees all of its prefix."""
    rows, heads, head_dim = q.shape
    out = np.zeros(q.shape, np.longdouble)
    lse = np.full(q.shape[:-1], -np.inf, np.longdouble)
    groups = len(group_start) - 1
    status = np.zeros(groups, np.int32)
    queries = q.double().numpy().astype(np.longdouble)
    per_key = heads // pages.num_kv_heads
    rising = bool((group_start[1:] >= group_start[:-1]).all())  # else groups may share rows
    for g in range(groups):
        first, end, length = int(group_start[g]), int(group_start[g + 1]), int(prefix_lens[g])
        if not (rising and 0 <= first <= end <= rows and 0 <= length <= page_table.shape[1] * pages.page_size):
            status[g] = Status.BAD_LENGTH
            continue
        ids = page_table[g, : -(-length // pages.page_size)]
        if bool(((ids < 0) | (ids >= pages.num_pages)).any()):
            status[g] = Status.BAD_PAGE
            continue
        keys, values = keys_and_values(pages, page_table[g], length)
        k, v = (t.numpy().astype(np.longdouble) for t in (keys, values))
        for r in range(first, end):
            for h in range(heads):
                out[r, h], lse[r, h] = _softmax(
                    k[:, h // per_key] @ queries[r, h],
                    v[:, h // per_key],
                    softcap,
                    head_dim**-0.5 if scale is None else scale,
                )
    return Attended(out, lse, status)


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """sum w out / sum w and m + log sum w with w = exp(lse - m), m the largest lse; (0, -inf) where all are empty."""
    values = np.stack([t.double().numpy().astype(np.longdouble) for t in outs])
    logs = np.stack([t.double().numpy().astype(np.longdouble) for t in lses])
    largest = logs.max(0)
    shift = np.where(np.isneginf(largest), 0, largest)
    weights = np.exp(logs - shift)
    total = weights.sum(0)
    safe = np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = shift + np.log(total)
    return (weights[..., None] * values).sum(0) / safe[..., None], lse
