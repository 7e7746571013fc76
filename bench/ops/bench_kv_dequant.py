"""kv_dequant beside gathering pages and decoding them in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops
from fastdecode.ops import KVPages

from .. import report
from ..harness import Case
from ..kv import HEAD_DIM, HEADS, Cache, decode

BITS = {"int8": 8, "int4": 4}


def ours(page_table: Tensor, kv_lens: Tensor, pages: KVPages) -> tuple[Tensor, ...]:
    return ops.kv_dequant(pages, page_table, kv_lens)


def in_torch(page_table: Tensor, kv_lens: Tensor, pages: KVPages, scheme: str) -> list[Tensor]:
    """All requests of the same full length."""
    out = []
    for cache, scale in ((pages.k, pages.k_scale), (pages.v, pages.v_scale)):
        rows = cache[page_table.long()].flatten(1, 2)
        if scale is None:
            out.append(rows.float())
            continue
        scales = scale[page_table.long()].flatten(1, 2)
        if scheme == "fp8_e4m3":
            out.append(rows.view(torch.float8_e4m3fn).float() * scales)
        else:
            out.append(decode(rows, scales.squeeze(-2), BITS[scheme]))
    return out


def cases(quick: bool) -> Iterator[Case]:
    for scheme in ("plain", "fp8_e4m3", "int8", "int4"):
        for batch, length in ((1, 64),) if quick else ((1, 4096), (8, 1024)):
            cache = Cache.make(scheme, batch, length, torch.float32)
            pages, values = cache.pages, 2 * batch * length * HEADS * HEAD_DIM
            k, v = (torch.randn(batch * length, HEADS, HEAD_DIM) for _ in "kv")
            ops.kv_append_(k, v, cache.slots(length), pages)
            yield Case(
                shape=f"{scheme} B={batch} T={length} H={HEADS} D={HEAD_DIM}",
                dtype=torch.float32,
                elements=values,
                bytes_moved=4 * values + int(batch * length * cache.token_bytes()),
                inputs=[(cache.page_table, torch.full((batch,), length, dtype=torch.int32))],
                ours=partial(ours, pages=pages),
                peers={"torch index+decode": partial(in_torch, pages=pages, scheme=scheme)},
            )


if __name__ == "__main__":
    report.main(__file__)
