"""Inputs of the tests of attention: caches of every scheme in which whatever must not be read is NaN."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdecode import KVScheme
from fastdecode.ops import KVPages
from fastdecode.testing.reference import attention as reference
from support import generator

SCHEMES = ("plain", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "kivi4", "kivi2")
I32 = torch.int32


@dataclass(frozen=True)
class Inputs:
    """Arguments of paged_attention; `options` by name."""

    q: Tensor
    pages: KVPages
    page_table: Tensor
    kv_lens: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, op: Any, **more: Any) -> Any:
        return op(self.q, self.pages, self.page_table, self.kv_lens, **{**self.options, **more})

    def of_request(self, b: int, rows: slice = slice(None)) -> Inputs:
        """One request alone."""
        one = slice(b, b + 1)
        pages = self.pages
        if pages.k_tail is not None and pages.v_tail is not None:
            pages = replace(pages, k_tail=pages.k_tail[one], v_tail=pages.v_tail[one])
        options = {k: v[one] if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Inputs(self.q[one], pages, self.page_table[one], self.kv_lens[one], options)


def random_pages(num_pages: int, page_size: int, heads: int, head_dim: int, seed: int = 0, **allocate: Any) -> KVPages:
    """A cache of random content: any codes that are numbers, steps and offsets such that values are about normal."""
    pages = KVPages.allocate(num_pages, page_size, heads, head_dim, **allocate)
    g = generator(seed, num_pages, page_size, heads, head_dim, int(pages.scheme))
    for data, scale in ((pages.k, pages.k_scale), (pages.v, pages.v_scale)):
        if scale is None:
            data.copy_(torch.randn(data.shape, generator=g, dtype=torch.float64))
            continue
        data.copy_(torch.randint(256, data.shape, generator=g))
        size = torch.rand(scale.shape, generator=g) + 0.5
        if pages.scheme == KVScheme.FP8_E4M3:
            data[(data & 0x7F) == 0x7F] = 0x3A
            scale.copy_(size / 200)
        elif pages.scheme == KVScheme.FP8_E5M2:
            data[(data & 0x7F) >= 0x6C] = 0xBA
            scale.copy_(size / 2000)
        else:
            bits = {KVScheme.INT8: 8, KVScheme.INT4: 4, KVScheme.KIVI4: 4, KVScheme.KIVI2: 2}[pages.scheme]
            step = size * 4 / 2**bits
            kivi_keys = data is pages.k and pages.has_ring
            if kivi_keys:
                step[:, :, :, 1] = -step[:, :, :, 0] * (2**bits - 1) / 2 + step[:, :, :, 1] / 4
            else:
                step[..., 1] = -step[..., 0] * (2**bits - 1) / 2 + step[..., 1] / 4
            scale.copy_(step)
    for tail in (pages.k_tail, pages.v_tail):
        if tail is not None:
            tail.copy_(torch.randn(tail.shape, generator=g, dtype=torch.float64))
    return pages


def poison(pages: KVPages, used: Tensor, ring_used: Tensor | None = None) -> None:
    """NaN in every slot [P, page_size] that is not used, and in every slot [B, tail_size] of the rings."""
    kivi = pages.has_ring
    for keys, data, scale in ((True, pages.k, pages.k_scale), (False, pages.v, pages.v_scale)):
        if scale is None:
            data[~used] = torch.nan
        elif kivi and keys:
            groups = used.unflatten(1, (-1, pages.group)).any(-1)  # [P, page_size / group]
            scale.transpose(1, 2)[~groups] = torch.nan
        elif scale.dim() == 1:
            data[~used] = 0x7F
        else:
            scale[~used] = torch.nan
    if ring_used is not None:
        for tail in (pages.k_tail, pages.v_tail):
            assert tail is not None
            tail[~ring_used] = torch.nan


def make(
    *,
    scheme: str = "plain",
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    lens: tuple[int, ...] = (37, 5, 64),
    slots: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    tail: int | None = 20,
    group: int | None = None,
    layout: str = "HND",
    seed: int = 0,
    **options: Any,
) -> Inputs:
    """Requests whose tokens lie on random pages; unused entries of the page table are wrong.

    tail: of kivi, how many of the newest tokens lie in the ring at least; None: all lie in pages.
    """
    g = generator(seed, *lens, slots, heads, head_dim)
    batch, kivi = len(lens), scheme.startswith("kivi")
    needed = [-(-length // page_size) for length in lens]
    num_pages, max_pages = sum(needed) + 3, max([*needed, 0]) + 2
    extra: dict[str, Any] = {"group": group}
    tail_size = (tail or 0) + (group or 8) + 3
    if kivi:
        extra = {"group": group or 8, "batch": batch, "tail_size": tail_size}
    if scheme == "fp8_static":
        scheme, extra["static_scales"] = "fp8_e4m3", True
    pages = random_pages(
        num_pages,
        page_size,
        kv_heads,
        head_dim,
        seed,
        scheme=scheme,
        dtype=cache_dtype or dtype,
        layout=layout,
        **extra,
    )
    free = torch.randperm(num_pages, generator=g)
    table = torch.tensor([-1, 10**6, num_pages], dtype=I32)[torch.randint(3, (batch, max_pages), generator=g)]
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    ring_used = torch.zeros(batch, tail_size, dtype=torch.bool)
    tail_lens = torch.zeros(batch, dtype=I32)
    start = 0
    for b, length in enumerate(lens):
        table[b, : needed[b]] = free[start : start + needed[b]].int()
        start += needed[b]
        if kivi and tail is not None:
            coded = max(0, length - tail) // pages.group * pages.group
            tail_lens[b] = length - coded
            ring_used[b, torch.arange(coded, length) % tail_size] = True
            length = coded
        at = torch.arange(length)
        used[table[b, at // page_size].long(), at % page_size] = True
    if kivi:
        assert bool((tail_lens <= tail_size).all())
        options["tail_lens"] = tail_lens
    poison(pages, used, ring_used if kivi else None)
    q = torch.randn(batch, slots, heads, head_dim, generator=g, dtype=torch.float64).to(dtype)
    if "num_queries" not in options and any(length < slots for length in lens):
        options["num_queries"] = torch.tensor([min(slots, length) for length in lens], dtype=I32)
    return Inputs(q, pages, table, torch.tensor(lens, dtype=I32), options)


def plain_attention(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same as the PyTorch expression on the dequantised cache, in the dtype of q."""
    q, options = inputs.q, inputs.options
    batch, slots, heads, head_dim = q.shape
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    scale = options.get("scale") or head_dim**-0.5
    softcap, mask = options.get("softcap"), options.get("tree_mask")
    for b in range(batch):
        length = int(inputs.kv_lens[b])
        count = slots if options.get("num_queries") is None else int(options["num_queries"][b])
        tail = int(options["tail_lens"][b]) if "tail_lens" in options else 0
        seen_by = reference.visible(
            length, count, None if mask is None else mask[b], options.get("causal", True), options.get("window")
        )
        coded = options.get("coded_lens")
        for i in range(count):
            if i == 0 or coded is not None:
                here = tail if coded is None else length - int(coded[b, i])
                pair = reference.keys_and_values(inputs.pages, inputs.page_table[b], length, b, here)
                keys, values = (t.to(q.dtype) for t in pair)
            seen = torch.from_numpy(seen_by[i])
            if not seen.any():
                continue
            k, v = (t[seen].repeat_interleave(heads // t.shape[1], 1) for t in (keys, values))
            scores = torch.einsum("hd,thd->ht", q[b, i], k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[b, i] = torch.einsum("ht,thd->hd", torch.softmax(scores, -1), v)
            lse[b, i] = torch.logsumexp(scores.to(lse.dtype), -1)
    return out, lse
