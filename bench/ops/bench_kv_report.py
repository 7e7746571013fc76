"""kv_report beside decoding the cache in torch and comparing."""

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


def ours(k: Tensor, v: Tensor, page_table: Tensor, kv_lens: Tensor, pages: KVPages) -> Tensor:
    return ops.kv_report(k, v, pages, page_table, kv_lens).errors


def in_torch(k: Tensor, v: Tensor, page_table: Tensor, kv_lens: Tensor, pages: KVPages) -> Tensor:
    """All requests of the same full length; sums in float32."""
    out = []
    for x, cache, scale in ((k, pages.k, pages.k_scale), (v, pages.v, pages.v_scale)):
        assert scale is not None
        rows, scales = (t[page_table.long()].flatten(1, 2) for t in (cache, scale.squeeze(-2)))
        error = x - decode(rows, scales, 4)
        out.append(torch.stack([error.square().sum((1, 3)), x.square().sum((1, 3)), error.abs().amax((1, 3))], -1))
    return torch.stack(out)


def cases(quick: bool) -> Iterator[Case]:
    for batch, length in ((1, 64),) if quick else ((1, 4096), (8, 1024)):
        cache = Cache.make("int4", batch, length, torch.float32)
        k, v = (torch.randn(batch, length, HEADS, HEAD_DIM) for _ in "kv")
        ops.kv_append_(k.flatten(0, 1), v.flatten(0, 1), cache.slots(length), cache.pages)
        yield Case(
            shape=f"int4 B={batch} T={length} H={HEADS} D={HEAD_DIM}",
            dtype=torch.float32,
            elements=k.numel() + v.numel(),
            bytes_moved=k.nbytes + v.nbytes + int(batch * length * cache.token_bytes()),
            inputs=[(k, v, cache.page_table, torch.full((batch,), length, dtype=torch.int32))],
            ours=partial(ours, pages=cache.pages),
            peers={"torch decode+sum": partial(in_torch, pages=cache.pages)},
        )


if __name__ == "__main__":
    report.main(__file__)
