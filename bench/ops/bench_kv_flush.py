"""kv_flush_ of one group of tokens beside the same in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops
from fastdecode.ops import KVPages

from .. import report
from ..harness import Case
from ..kv import HEAD_DIM, HEADS, PAGE_SIZE, Cache, code

GROUP = 32


def ours(begin: Tensor, end: Tensor, pages: KVPages, page_table: Tensor) -> Tensor:
    return ops.kv_flush_(pages, page_table, begin, end)


def in_torch(begin: Tensor, end: Tensor, pages: KVPages, page_table: Tensor, bits: int) -> None:
    """All requests from the same position, the first token of a page of one group."""
    assert pages.k_tail is not None and pages.v_tail is not None
    assert pages.k_scale is not None and pages.v_scale is not None
    page = page_table[:, 0].long()
    packed, scale = code(pages.k_tail.permute(0, 2, 3, 1), bits)  # [B, H, D, tokens]
    pages.k[page] = packed
    pages.k_scale[page, :, 0] = scale.transpose(-1, -2)
    packed, scale = code(pages.v_tail.unflatten(-1, (-1, GROUP)), bits)  # [B, tokens, H, groups, channels]
    if bits == 4:  # codes of the first and the second half of a head share a byte, not those of a group
        low, high = torch.cat([packed & 15, packed >> 4], -1).flatten(-2).chunk(2, -1)
        pages.v[page] = low | high << 4
    else:
        parts = torch.cat([packed >> 2 * i & 3 for i in range(4)], -1).flatten(-2).chunk(4, -1)
        pages.v[page] = parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6
    pages.v_scale[page] = scale


def cases(quick: bool) -> Iterator[Case]:
    for scheme, bits in (("kivi4", 4), ("kivi2", 2)):
        for batch in (1,) if quick else (1, 8, 64):
            cache = Cache.make(scheme, batch, PAGE_SIZE, torch.float32, tail_size=GROUP)
            assert cache.pages.k_tail is not None and cache.pages.v_tail is not None
            cache.pages.k_tail.normal_(), cache.pages.v_tail.normal_()
            begin = torch.zeros(batch, dtype=torch.int32)
            pages, table = cache.pages, cache.page_table
            values = 2 * batch * GROUP * HEADS * HEAD_DIM
            yield Case(
                shape=f"{scheme} B={batch} tokens={GROUP} H={HEADS} D={HEAD_DIM}",
                dtype=torch.float32,
                elements=values,
                bytes_moved=4 * values + int(batch * GROUP * cache.token_bytes()),
                inputs=[(begin, begin + GROUP)],
                ours=partial(ours, pages=pages, page_table=table),
                peers={"torch code+pack": partial(in_torch, pages=pages, page_table=table, bits=bits)},
            )


if __name__ == "__main__":
    report.main(__file__)
