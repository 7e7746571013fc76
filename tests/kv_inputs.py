"""Caches and tokens for the tests of the ops on paged caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastdecode import KVScheme
from fastdecode.ops import KVPages
from support import generator, map_tensors

SCHEMES = ("plain", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "kivi4", "kivi2")
PAGED, KIVI = SCHEMES[:5], SCHEMES[5:]
I32 = torch.int32
# Kinds of rows, in turns along the heads.
KINDS = ("normal", "constant", "outlier", "alternating", "subnormal", "large", "inf", "nan", "zeros", "ties", "offset")


def hostile_tokens(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, *seed: int, first: int = 0) -> Tensor:
    """[tokens, heads, head_dim], each head's row of the next kind."""
    g = generator(700, tokens, heads, head_dim, *seed)
    x = torch.randn(tokens * heads, head_dim, generator=g, dtype=torch.float64)
    kinds = (torch.arange(tokens * heads) + first) % len(KINDS)
    tiny, channel = torch.finfo(dtype).smallest_normal, torch.arange(head_dim)
    at = torch.randint(head_dim, (tokens * heads,), generator=g)
    row = torch.arange(tokens * heads)
    special = torch.zeros_like(x, dtype=torch.bool)
    special[row, at] = True
    x[kinds == 1] = x[kinds == 1, :1].expand(-1, head_dim)
    x = torch.where(special & (kinds == 2)[:, None], 1000 * x, x)
    alternating = x.abs() * torch.where(channel % 2 == 0, 1, -1)
    x = torch.where((kinds == 3)[:, None], alternating, x)
    x = torch.where((kinds == 4)[:, None], x * tiny / 8, x)
    x = torch.where((kinds == 5)[:, None], x * 60000, x)
    x = torch.where(special & (kinds == 6)[:, None], torch.where(x < 0, -torch.inf, torch.inf), x)
    x = torch.where(special & (kinds == 7)[:, None], torch.nan, x)
    x = torch.where((kinds == 8)[:, None], torch.where(x < 0, -0.0, 0.0), x)
    x = torch.where((kinds == 9)[:, None], (2 * x).round() / 2, x)
    x = torch.where((kinds == 10)[:, None], 300 + x / 64, x)
    return x.to(dtype).view(tokens, heads, head_dim)


def make_pages(
    scheme: str,
    *,
    num_pages: int = 5,
    page_size: int = 8,
    heads: int = 2,
    head_dim: int = 16,
    group: int | None = None,
    batch: int = 3,
    tail_size: int = 16,
    seed: int = 0,
    **options: Any,
) -> KVPages:
    """Pages that hold garbage: random bytes as codes, random numbers as scales."""
    rings = {"batch": batch, "tail_size": tail_size} if scheme in KIVI else {}
    if scheme in KIVI and group is None:
        group = 8
    pages = KVPages.allocate(num_pages, page_size, heads, head_dim, scheme=scheme, group=group, **(rings | options))
    g = generator(701, seed)
    for tensor in (pages.k, pages.v, pages.k_scale, pages.v_scale, pages.k_tail, pages.v_tail):
        if tensor is None:
            continue
        if tensor.dtype == torch.uint8:
            tensor.copy_(torch.randint(256, tensor.shape, generator=g))
        else:
            values = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
            tensor.copy_(0.5 + values.abs() if tensor.dim() == 1 else values)
    return pages


def copy_of(pages: KVPages) -> KVPages:
    """The same numbers and strides in other memory."""
    return map_tensors(torch.clone, pages)


def is_kivi(pages: KVPages) -> bool:
    return pages.scheme in (KVScheme.KIVI4, KVScheme.KIVI2)


def some_slots(pages: KVPages, tokens: int, *seed: int, bad: bool = True) -> Tensor:
    """Different slots in any order; where `bad`, some are -1 or outside."""
    total = (
        pages.k_tail.shape[0] * pages.k_tail.shape[1] if pages.k_tail is not None else pages.num_pages * pages.page_size
    )
    g = generator(702, tokens, *seed)
    slots = torch.randperm(total, generator=g)[:tokens]
    slots = torch.cat([slots, torch.full((tokens - len(slots),), -1)])
    if bad:
        kind = torch.randint(12, (tokens,), generator=g)
        slots = torch.where(kind == 0, -1, slots)
        slots = torch.where(kind == 1, total, slots)
        slots = torch.where(kind == 2, -2, slots)
    return slots


def some_rope(positions: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """[positions, 2, head_dim / 2] in the dtype that keys of `dtype` want."""
    angles = torch.arange(positions)[:, None] * 1000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.stack([angles.cos(), angles.sin()], 1).to(wide).contiguous()


def tensors(pages: KVPages) -> dict[str, Tensor]:
    named = {name: getattr(pages, name) for name in ("k", "v", "k_scale", "v_scale", "k_tail", "v_tail")}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def assert_same_pages(left: KVPages, right: KVPages, what: str = "") -> None:
    from support import same_bits

    for name, tensor in tensors(left).items():
        other = tensors(right)[name]
        assert same_bits(tensor, other), f"{what}: {name} differs at {(tensor != other).nonzero()[:5].tolist()}"


class Guarded:
    """The same cache as views into larger memory of random bytes: odd strides, gaps between everything."""

    def __init__(self, pages: KVPages) -> None:
        self.gaps: list[tuple[str, Tensor, Tensor, Tensor]] = []
        kivi = is_kivi(pages)
        packed = {name: 1 if tensor.dim() == 4 else 2 for name, tensor in tensors(pages).items()}
        packed |= {"k": 2, "k_scale": 3} if kivi else {}
        spread = {name: self._spread(name, tensor, packed[name]) for name, tensor in tensors(pages).items()}
        self.pages = dataclasses.replace(pages, **spread)

    def _spread(self, name: str, tensor: Tensor, packed: int) -> Tensor:
        """`packed`: last dimensions that must stay contiguous."""
        if tensor.dim() == 1:  # given scales
            return tensor.clone()
        lead = tensor.dim() - packed
        shape = [2 * n + 1 for n in tensor.shape[:lead]] + list(tensor.shape[lead:])
        shape[-1] += 5 if packed == 1 else 0
        size = tensor.element_size()
        raw = torch.randint(256, (*shape, size), generator=generator(703), dtype=torch.uint8)
        big = raw.view(tensor.dtype).squeeze(-1)
        free = torch.ones(shape, dtype=torch.bool)
        at: list[Any] = [slice(1, None, 2)] * lead + [slice(None)] * packed
        if packed == 1:
            at[-1] = slice(3, 3 + tensor.shape[-1])
        view = big[tuple(at)]
        view.copy_(tensor)
        free[tuple(at)] = False
        self.gaps.append((name, raw, raw.clone(), free))
        return view

    def check(self) -> None:
        """Nothing was written outside the cache."""
        for name, raw, before, free in self.gaps:
            assert torch.equal(raw[free], before[free]), f"{name}: written outside"
