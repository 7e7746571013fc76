"""Paged caches of keys and values: storing, coding, reading back (csrc/kvquant)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import check_devices
from .kv_pages import KVPages


class Dequantised(NamedTuple):
    """See `kv_dequant`."""

    k: Tensor
    v: Tensor
    status: Tensor


class KVReport(NamedTuple):
    """See `kv_report`."""

    errors: Tensor
    status: Tensor


def kv_append_(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    pages: KVPages,
    *,
    q: Tensor | None = None,
    rope: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Store new keys and values in `pages`, in the scheme's code; rotate keys and queries first, if asked.

    Codes depend on the token alone: not on the other tokens, nor on whether they come at once or one by one.
    int8, int4: |x - (code * step + offset)| <= step / 2 for the float16 step and offset that are stored, always. Values
    beyond the format saturate; inf is stored as the largest finite value of its group, in fp8 as the format's largest,
    NaN as 0 (fp8: NaN). Plain pages and rings take the nearest number of their dtype, inf and NaN too.

    Args:
        k: float64, float32, float16 or bfloat16 [T, H, D]; strided, last dim contiguous; D at most 1024.
        v: as k.
        slots: int64 [T], page * page_size + offset, none twice; kivi: row * tail_size + position % tail_size, for kivi
            tokens go to the rings alone. -1 stores nothing.
        pages: changed in place.
        q: [T, Hq, D] in the dtype of k, rotated in place, also where nothing is stored. Only with rope.
        rope: float32 (float64 for float64 k) [num_positions, 2, D / 2], contiguous: cosines and sines of the angles.
            Rotated keys and queries are rounded to the dtype of k.
        positions: int64 or int32 [T], rows of rope. Only with rope.
        interleaved: pairs are channels (2i, 2i + 1), not (i, i + D / 2). Only with rope.
    Returns:
        status: int32 [T], bits of `fastdecode.Status`: 1 a stored key or value is NaN or inf, 64 slot or position
        outside, nothing stored and q as it was, 128 a finite value saturated. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; q, positions or interleaved without rope.
    Source: Liu et al. 2024 (KIVI) for the codes; Micikevicius et al. 2022 for fp8; Su et al. 2021 for the rotation.
    Reference: fastdecode.testing.reference.kv.
    """
    return torch.ops.fastdecode.kv_append_.default(k, v, slots, *pages.tensors(), q, rope, positions, interleaved)


@torch.library.register_fake("fastdecode::kv_append_")
def _(k: Tensor, *others: object) -> Tensor:
    check_devices("kv_append_", k, *others)
    return k.new_empty((k.shape[0],), dtype=torch.int32)


def kv_flush_(pages: KVPages, page_table: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Code tokens begin[b] .. end[b] - 1 of each request from its ring into its pages. For kivi.

    Codes are a function of the tokens alone. The rings keep them.

    Args:
        pages: of scheme kivi4 or kivi2, with a ring for each of the B requests; changed in place.
        page_table: int32 [B, max_pages]; rows may be strided.
        begin: int32 [B], multiples of the group.
        end: int32 [B], multiples of the group, at most tail_size after begin; <= begin: nothing to do.
    Returns:
        status: int32 [B], bits of `fastdecode.Status`: 32 begin or end is neither, or behind the page table, 64 a page
        outside the cache: nothing stored for this request; 1 a NaN or inf among the tokens, 128 a finite value
        saturated. Does not synchronise.
    Raises:
        ValueError: another scheme; wrong rank, shape, dtype, layout or device.
    Source: Liu et al. 2024 (KIVI). Reference: fastdecode.testing.reference.kv.
    """
    return torch.ops.fastdecode.kv_flush_.default(*pages.tensors(), page_table, begin, end)


@torch.library.register_fake("fastdecode::kv_flush_")
def _(k_cache: Tensor, *others: object) -> Tensor:
    check_devices("kv_flush_", k_cache, *others)
    begin = others[-2]
    assert isinstance(begin, Tensor)
    return torch.empty_like(begin)


def kv_dequant(
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    tail_lens: Tensor | None = None,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Dequantised:
    """The cached keys and values as plain tensors, rounded once from what the codes mean.

    Args:
        pages: of any scheme.
        page_table: int32 [B, max_pages]; rows may be strided.
        kv_lens: int32 [B], tokens of each request, 0..length.
        tail_lens: int32 [B], how many of them, the newest, lie in the ring; None means 0. Only kivi.
        length: of the outputs; None means max_pages * page_size.
        dtype: of the outputs; values beyond it become its largest.
    Returns:
        k, v: [B, length, H, D], zero behind kv_lens and where status is not 0; status: int32 [B], 32 a length outside
        its range, 64 a page outside the cache. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; tail_lens for another scheme than kivi.
    Reference: fastdecode.testing.reference.kv.
    """
    if length is None:
        length = page_table.shape[-1] * pages.page_size
    return Dequantised(
        *torch.ops.fastdecode.kv_dequant.default(
            *pages.tensors(), page_table, kv_lens, tail_lens, pages.head_dim, length, dtype
        )
    )


@torch.library.register_fake("fastdecode::kv_dequant")
def _(k_cache: Tensor, v_cache: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("kv_dequant", k_cache, v_cache, *others)
    kv_lens, (head_dim, length, dtype) = others[-5], others[-3:]
    assert isinstance(kv_lens, Tensor) and isinstance(head_dim, int) and isinstance(length, int)
    assert isinstance(dtype, torch.dtype)
    shape = (kv_lens.shape[0], length, v_cache.shape[2], head_dim)
    return v_cache.new_empty(shape, dtype=dtype), v_cache.new_empty(shape, dtype=dtype), torch.empty_like(kv_lens)


def kv_report(
    k: Tensor, v: Tensor, pages: KVPages, page_table: Tensor, kv_lens: Tensor, *, tail_lens: Tensor | None = None
) -> KVReport:
    """How far the cache is from the keys and values that were put into it, without a dequantised copy.

    Args:
        k: float64, float32, float16 or bfloat16 [B, length, H, D], rotated if the cache was given rotated keys;
            strided, last dim contiguous.
        v: as k.
        pages: of any scheme.
        page_table: int32 [B, max_pages]; rows may be strided.
        kv_lens: int32 [B], tokens of each request, 0..length.
        tail_lens: int32 [B], how many of them, the newest, lie in the ring; None means 0. Only kivi.
    Returns:
        errors: float64 [2, B, H, 3]: of keys and of values the sum of squared errors, the sum of squared values, the
        largest error; NaN where status is not 0, or where k, v or the cache is not finite; sums in one order
        everywhere. status: int32 [B], 32 a length outside its range, 64 a page outside the cache. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; tail_lens for another scheme than kivi.
    Reference: fastdecode.testing.reference.kv.
    """
    return KVReport(*torch.ops.fastdecode.kv_report.default(k, v, *pages.tensors(), page_table, kv_lens, tail_lens))


@torch.library.register_fake("fastdecode::kv_report")
def _(k: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    check_devices("kv_report", k, *others)
    batch, _, heads, _ = k.shape
    return k.new_empty((2, batch, heads, 3), dtype=torch.float64), k.new_empty((batch,), dtype=torch.int32)


def kv_keep_(
    pages: KVPages, path: Tensor, num_keep: Tensor, base_lens: Tensor, *, page_table: Tensor | None = None
) -> Tensor:
    """Move the accepted rows of a draft tree to the end of the committed ones: base_lens + path[i] to base_lens + i.

    Bytes move, scales with them; nothing is coded again. Rows behind the last one keep what they held.

    Args:
        pages: changed in place.
        path: int32 [B, max_keep], slots of the step, rising; behind num_keep not read; rows may be strided.
        num_keep: int32 [B], 0..max_keep.
        base_lens: int32 [B], tokens of each request before the step.
        page_table: int32 [B, max_pages]; rows may be strided. None for kivi, whose tokens move in the rings.
    Returns:
        status: int32 [B], 32 a length outside its range or a path that does not rise or leaves page table or ring, 64 a
        page outside the cache: nothing moved for this request. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; a page_table for kivi, or none for another scheme.
    Reference: fastdecode.testing.reference.kv.
    """
    return torch.ops.fastdecode.kv_keep_.default(
        *pages.tensors(), pages.head_dim, path, num_keep, page_table, base_lens
    )


@torch.library.register_fake("fastdecode::kv_keep_")
def _(k_cache: Tensor, *others: object) -> Tensor:
    check_devices("kv_keep_", k_cache, *others)
    base_lens = others[-1]
    assert isinstance(base_lens, Tensor)
    return torch.empty_like(base_lens)
