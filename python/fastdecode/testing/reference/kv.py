"""Paged caches, one number at a time: exact fractions, tables of all numbers of a format, plain loops."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from math import inf, isfinite, nan

import numpy as np
import torch
from torch import Tensor

from ..._host import KVScheme
from ...ops.kv_pages import KVPages

__all__ = ["append", "dequant", "flush", "fp8_values", "keep", "nearest_fp8", "report", "step_and_offset"]

NAN_OR_INF, BAD_LENGTH, BAD_PAGE, SATURATED = 1, 32, 64, 128
BITS = {KVScheme.INT8: 8, KVScheme.INT4: 4, KVScheme.KIVI4: 4, KVScheme.KIVI2: 2}
FP8 = {KVScheme.FP8_E4M3: "e4m3", KVScheme.FP8_E5M2: "e5m2"}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
HALVES = sorted({float(x) for x in np.arange(2**16, dtype=np.uint16).view(np.float16) if isfinite(x)})
FLOAT32 = np.finfo(np.float32)


def fp8_values(kind: str) -> list[float]:
    """What each of the 256 codes of "e4m3" or "e5m2" means."""
    mantissa_bits, bias = (3, 7) if kind == "e4m3" else (2, 15)

    def value(code: int) -> float:
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & (1 << mantissa_bits) - 1
        if kind == "e4m3" and code & 0x7F == 0x7F:
            return nan
        if kind == "e5m2" and exponent == 31:
            return nan if mantissa else sign * inf
        fraction = mantissa / (1 << mantissa_bits)
        return sign * (fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))

    return [value(code) for code in range(256)]


_POSITIVE = {kind: [x for x in fp8_values(kind)[:0x80] if isfinite(x)] for kind in LARGEST}


def nearest_fp8(value: float, kind: str) -> tuple[int, bool]:
    """Code of the nearest number, ties to the even code, and whether that would have been beyond the largest one."""
    if value != value:
        return 0x7F, False
    sign = 0x80 if np.signbit(value) else 0
    table, size = _POSITIVE[kind], abs(value)
    step = table[-1] - table[-2]
    if size >= table[-1]:  # the next number would be one step further; it is even in e5m2, odd in e4m3
        middle = table[-1] + step / 2
        beyond = size > middle or (kind == "e5m2" and size == middle)
        return sign | len(table) - 1, beyond
    above = bisect_left(table, size)
    if table[above] == size:
        return sign | above, False
    below, middle = above - 1, (table[above - 1] + table[above]) / 2
    if size == middle:
        return sign | (above if above % 2 == 0 else below), False
    return sign | (above if size > middle else below), False


def step_and_offset(low: float, high: float, bits: int) -> tuple[float, float]:
    """The largest float16 <= low, and the smallest that takes 2^bits - 1 steps from there to high or beyond."""
    at = bisect_left(HALVES, low)
    offset = HALVES[at] if at < len(HALVES) and HALVES[at] == low else HALVES[at - 1]
    wanted = (Fraction(high) - Fraction(offset)) / (2**bits - 1)
    return HALVES[bisect_left(HALVES, wanted)], offset + 0.0


def _int_codes(values: list[float], bits: int) -> tuple[list[int], float, float, int]:
    """Codes, step and offset of a group, and its status."""
    finite = [x for x in values if isfinite(x)]
    limit = HALVES[-1]
    low, high = (min(max(x, -limit), limit) + 0.0 for x in (min(finite, default=0.0), max(finite, default=0.0)))
    step, offset = step_and_offset(low, high, bits)
    clamped = [min(max(0.0 if x != x else x, low), high) for x in values]
    codes = [round((Fraction(x) - Fraction(offset)) / Fraction(step)) if step else 0 for x in clamped]
    status = (NAN_OR_INF if len(finite) < len(values) else 0) | (
        SATURATED if any(abs(x) > limit for x in finite) else 0
    )
    return codes, step, offset, status


def _pack(codes: list[int], bits: int) -> list[int]:
    """Split order: byte j of n has codes j, j + n, j + 2 n, ..., the first of them lowest."""
    size = len(codes) * bits // 8
    return [sum(code << bits * i for i, code in enumerate(codes[j::size])) for j in range(size)]


def _unpack(data: list[int], bits: int) -> list[int]:
    return [byte >> bits * i & (1 << bits) - 1 for i in range(8 // bits) for byte in data]


def _numbers(dtype: torch.dtype) -> np.ndarray:
    """All finite numbers >= 0 of a 16-bit dtype; the index is the code."""
    values = torch.arange(2**15, dtype=torch.int16).view(dtype).double().numpy()
    return values[np.isfinite(values)]


_NUMBERS = {dtype: _numbers(dtype) for dtype in (torch.float16, torch.bfloat16)}
_NAN = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}


def _to_dtype(row: Tensor, dtype: torch.dtype, saturate: bool = True) -> Tensor:
    """Nearest, ties to even, in one rounding; too large is the largest number or inf; inf is inf; one NaN."""
    if dtype not in _NUMBERS:
        out = row.to(dtype)
        if saturate:
            out = torch.where(torch.isinf(out) & torch.isfinite(row), out.sign() * torch.finfo(dtype).max, out)
        return torch.where(torch.isnan(row), torch.full_like(out, nan), out)
    numbers, wide = _NUMBERS[dtype], row.double().numpy()
    size = np.abs(np.nan_to_num(wide, nan=0.0, posinf=inf, neginf=-inf))
    beyond = 2 * numbers[-1] - numbers[-2]  # the number that would follow
    above = np.append(numbers, beyond).searchsorted(np.minimum(size, beyond))
    high, low = np.append(numbers, beyond)[above], numbers[np.maximum(above - 1, 0)]
    middle = (low + high) / 2
    up = (size > middle) | ((size == middle) & (above % 2 == 0)) | (above == 0)
    code = np.where(up | (size == high), above, above - 1)
    code = np.where(np.isinf(wide), len(numbers), np.minimum(code, len(numbers) - saturate))
    code = code | np.where(np.signbit(wide), 0x8000, 0)
    code = np.where(np.isnan(wide), _NAN[dtype], code)
    return torch.from_numpy(code.astype(np.uint16).view(np.int16)).view(dtype)


def _store(row: Tensor, to: Tensor) -> int:
    to.copy_(_to_dtype(row, to.dtype))
    finite = torch.isfinite(row)
    saturated = finite & torch.isinf(_to_dtype(row, to.dtype, saturate=False))
    return (0 if finite.all() else NAN_OR_INF) | (SATURATED if saturated.any() else 0)


def _encode_ints(row: Tensor, group: int, bits: int, data: Tensor, scale: Tensor) -> int:
    codes: list[int] = []
    status = 0
    for g, values in enumerate(row.double().split(group)):
        some, step, offset, found = _int_codes(values.tolist(), bits)
        codes, status = codes + some, status | found
        scale[g] = torch.tensor([step, offset], dtype=torch.float64)
    data.copy_(torch.tensor(_pack(codes, bits)))
    return status


def _encode_fp8(row: Tensor, group: int, kind: str, data: Tensor, scale: Tensor | None, given: Tensor | None) -> int:
    status = 0
    for g, values in enumerate(row.split(group)):
        finite = values[torch.isfinite(values)]
        if given is not None:
            step = given
        else:
            most = finite.abs().max() if finite.numel() else values.new_zeros(())
            step = (most / LARGEST[kind]).clamp(float(FLOAT32.tiny), float(FLOAT32.max)).float()
            assert scale is not None
            scale[g] = step
        quotients = values / step.to(values.dtype)
        for i, (value, quotient) in enumerate(zip(values.tolist(), quotients.tolist(), strict=True)):
            data[g * group + i], beyond = nearest_fp8(quotient, kind)
            if not isfinite(value) or quotient != quotient:
                status |= NAN_OR_INF
            elif beyond:
                status |= SATURATED
    return status


def _rotate(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """[heads, D] by [2, D / 2], in the dtype of the angles, rounded to that of x."""
    cosine, sine = angles
    wide = x.to(angles.dtype)
    first, second = (wide[:, 0::2], wide[:, 1::2]) if interleaved else wide.chunk(2, -1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    out = torch.stack(turned, -1).flatten(1) if interleaved else torch.cat(turned, -1)
    return _to_dtype(out, x.dtype, saturate=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def append(
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
    """`fastdecode.ops.kv_append_`: changes q and pages, returns the status."""
    status = torch.zeros(len(slots), dtype=torch.int32)
    store, tails = pages.has_ring, (pages.k_tail, pages.v_tail)
    rows, size = tails[0].shape[:2] if tails[0] is not None else (pages.num_pages, pages.page_size)
    for t, slot in enumerate(slots.tolist()):
        position = int(positions[t]) if positions is not None else 0
        if not -1 <= slot < rows * size or (rope is not None and not 0 <= position < rope.shape[0]):
            status[t] = BAD_PAGE
            continue
        key = k[t]
        if rope is not None:
            key = _rotate(key, rope[position], interleaved)
            if q is not None:
                q[t] = _rotate(q[t], rope[position], interleaved)
        if slot < 0:
            continue
        at = divmod(slot, size)
        for head in range(pages.num_kv_heads):
            for x, cache, scale, tail in (
                (key, pages.k, pages.k_scale, tails[0]),
                (v[t], pages.v, pages.v_scale, tails[1]),
            ):
                row = _wide(x[head])
                if store:
                    assert tail is not None
                    found = _store(row, tail[at][head])
                elif pages.scheme == KVScheme.PLAIN:
                    found = _store(row, cache[at][head])
                elif pages.scheme in FP8:
                    assert scale is not None
                    own = (None, scale[head]) if scale.dim() == 1 else (scale[at][head], None)
                    found = _encode_fp8(row, pages.group, FP8[pages.scheme], cache[at][head], *own)
                else:
                    assert scale is not None
                    found = _encode_ints(row, pages.group, BITS[pages.scheme], cache[at][head], scale[at][head])
                status[t] |= found
    return status


def flush(pages: KVPages, page_table: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """`fastdecode.ops.kv_flush_`: changes pages, returns the status."""
    assert pages.k_tail is not None and pages.v_tail is not None
    assert pages.k_scale is not None and pages.v_scale is not None
    bits, group, size, ring = BITS[pages.scheme], pages.group, pages.page_size, pages.k_tail.shape[1]
    status = torch.zeros(len(begin), dtype=torch.int32)
    for b, (low, high) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        if high <= low:
            continue
        if low < 0 or low % group or high % group or high - low > ring or high > page_table.shape[1] * size:
            status[b] = BAD_LENGTH
            continue
        used = page_table[b, low // size : (high - 1) // size + 1].tolist()
        if not all(0 <= page < pages.num_pages for page in used):
            status[b] = BAD_PAGE
            continue
        for first in range(low, high, group):
            page, at = int(page_table[b, first // size]), first % size
            tokens = [t % ring for t in range(first, first + group)]
            for head in range(pages.num_kv_heads):
                for channel in range(pages.head_dim):
                    values = [float(pages.k_tail[b, t, head, channel]) for t in tokens]
                    codes, step, offset, found = _int_codes(values, bits)
                    pages.k[page, head, channel, at * bits // 8 : (at + group) * bits // 8] = torch.tensor(
                        _pack(codes, bits)
                    )
                    pages.k_scale[page, head, at // group, :, channel] = torch.tensor([step, offset]).double()
                    status[b] |= found
                for i, t in enumerate(tokens):
                    row = pages.v_tail[b, t, head]
                    status[b] |= _encode_ints(
                        row, group, bits, pages.v[page, at + i, head], pages.v_scale[page, at + i, head]
                    )
    return status


def _decoded(pages: KVPages, is_key: bool, page: int, offset: int, head: int) -> Tensor:
    """One row of a page, float64."""
    cache, scale = (pages.k, pages.k_scale) if is_key else (pages.v, pages.v_scale)
    if pages.scheme == KVScheme.PLAIN:
        return cache[page, offset, head].double()
    assert scale is not None
    if pages.scheme in FP8:
        table = torch.tensor(fp8_values(FP8[pages.scheme]), dtype=torch.float64)
        steps = scale[head].expand(1) if scale.dim() == 1 else scale[page, offset, head]
        return table[cache[page, offset, head].long()] * steps.double().repeat_interleave(pages.head_dim // len(steps))
    bits, group = BITS[pages.scheme], pages.group
    if pages.has_ring and is_key:
        first = offset // group * group
        runs = cache[page, head, :, first * bits // 8 : (first + group) * bits // 8]
        codes = torch.tensor([_unpack(run.tolist(), bits)[offset % group] for run in runs], dtype=torch.float64)
        step, low = scale[page, head, offset // group].double()
        return codes * step + low
    codes = torch.tensor(_unpack(cache[page, offset, head].tolist(), bits), dtype=torch.float64)
    step, low = scale[page, offset, head].double().repeat_interleave(group, 0).unbind(-1)
    return codes * step + low


def _readable(pages: KVPages, page_table: Tensor, kv_len: int, tail_len: int, length: int, b: int) -> int:
    """Status of a request that is to be read."""
    ring = pages.k_tail.shape[1] if pages.k_tail is not None else 0
    coded = kv_len - tail_len
    used = -(-coded // pages.page_size)
    if not 0 <= kv_len <= length or not 0 <= tail_len <= min(ring, kv_len) or used > page_table.shape[1]:
        return BAD_LENGTH
    good = all(0 <= page < pages.num_pages for page in page_table[b, :used].tolist())
    return 0 if good else BAD_PAGE


def dequant(
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    tail_lens: Tensor | None = None,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastdecode.ops.kv_dequant`; dtype float64 gives the exact values of the codes."""
    length = page_table.shape[1] * pages.page_size if length is None else length
    batch = len(kv_lens)
    tails = torch.zeros_like(kv_lens) if tail_lens is None else tail_lens
    out = torch.zeros(2, batch, length, pages.num_kv_heads, pages.head_dim, dtype=dtype)
    status = torch.zeros(batch, dtype=torch.int32)
    for b, (kv_len, tail_len) in enumerate(zip(kv_lens.tolist(), tails.tolist(), strict=True)):
        status[b] = _readable(pages, page_table, kv_len, tail_len, length, b)
        for t in range(kv_len if status[b] == 0 else 0):
            for head in range(pages.num_kv_heads):
                for i, tail in enumerate((pages.k_tail, pages.v_tail)):
                    if t < kv_len - tail_len:
                        page, offset = int(page_table[b, t // pages.page_size]), t % pages.page_size
                        row = _decoded(pages, i == 0, page, offset, head)
                    else:
                        assert tail is not None
                        row = tail[b, t % tail.shape[1], head].double()
                    out[i, b, t, head] = _to_dtype(row, dtype)
    return out[0], out[1], status


def keep(
    pages: KVPages, path: Tensor, num_keep: Tensor, base_lens: Tensor, *, page_table: Tensor | None = None
) -> Tensor:
    """`fastdecode.ops.kv_keep_`: changes pages, returns the status."""
    status = torch.zeros(len(base_lens), dtype=torch.int32)
    for b, (count, base) in enumerate(zip(num_keep.tolist(), base_lens.tolist(), strict=True)):
        if not 0 <= count <= path.shape[1] or base < 0:
            status[b] = BAD_LENGTH
            continue
        slots = path[b, :count].tolist()
        if pages.k_tail is not None:
            room = pages.k_tail.shape[1]
        else:
            assert page_table is not None
            room = page_table.shape[1] * pages.page_size - base
        if any(slot >= room or slot <= before for before, slot in zip([-1, *slots], slots, strict=False)):
            status[b] = BAD_LENGTH
            continue

        def place(position: int, b: int = b) -> tuple[int, int]:
            if pages.k_tail is not None:
                return b, position % pages.k_tail.shape[1]
            assert page_table is not None
            return int(page_table[b, position // pages.page_size]), position % pages.page_size

        moves = [(place(base + slot), place(base + i)) for i, slot in enumerate(slots) if slot != i]
        if pages.k_tail is None and not all(0 <= page < pages.num_pages for move in moves for page, _ in move):
            status[b] = BAD_PAGE
            continue
        if pages.k_tail is not None:
            stores = [pages.k_tail, pages.v_tail]
        else:
            stores = [pages.k, pages.v, *(s for s in (pages.k_scale, pages.v_scale) if s is not None and s.dim() > 1)]
        for store in stores:
            assert store is not None
            rows = [store[source].clone() for source, _ in moves]  # all are read before any is written
            for row, (_, target) in zip(rows, moves, strict=True):
                store[target] = row
    return status


def report(
    k: Tensor,
    v: Tensor,
    pages: KVPages,
    page_table: Tensor,
    kv_lens: Tensor,
    *,
    tail_lens: Tensor | None = None,
) -> tuple[np.ndarray, Tensor]:
    """`fastdecode.ops.kv_report`: errors in long double, status."""
    *cached, status = dequant(pages, page_table, kv_lens, tail_lens=tail_lens, length=k.shape[1], dtype=torch.float64)
    errors = np.full((2, len(kv_lens), pages.num_kv_heads, 3), nan, np.longdouble)
    for i, (given, stored) in enumerate(zip((k, v), cached, strict=True)):
        for b, count in enumerate(kv_lens.tolist()):
            if status[b]:
                continue
            x = given[b, :count].double().numpy().astype(np.longdouble)
            error = np.abs(x - stored[b, :count].numpy().astype(np.longdouble))
            errors[i, b, :, 0] = (error**2).sum((0, 2))
            errors[i, b, :, 1] = (x**2).sum((0, 2))
            errors[i, b, :, 2] = error.max((0, 2), initial=0)
    return errors, status
