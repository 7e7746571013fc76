"""prefix_attention of many requests that share a prefix, beside paged_attention that reads it for each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdecode import ops
from fastdecode.ops import KVPages

from .. import report
from ..goals import times_faster
from ..harness import Case
from ..inputs import copies

EACH = "paged_attention of each"
PAGE_SIZE = 32


def pages_of(k: Tensor, v: Tensor) -> KVPages:
    return KVPages(k.transpose(1, 2), v.transpose(1, 2), head_dim=k.shape[-1], group=k.shape[-1])


def shared(q: Tensor, table: Tensor, start: Tensor, length: Tensor, k: Tensor, v: Tensor) -> ops.Attention:
    return ops.prefix_attention(q, pages_of(k, v), start, table, length)


def each(q: Tensor, table: Tensor, start: Tensor, length: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lens = torch.full((len(q),), table.shape[1] * PAGE_SIZE, dtype=torch.int32)
    return ops.paged_attention(q[:, None], pages_of(k, v), table.expand(len(q), -1), lens).out[:, 0]


def cases(quick: bool) -> Iterator[Case]:
    heads, kv_heads, head_dim = (4, 2, 64) if quick else (32, 8, 128)
    for length, rows in ((256, 4),) if quick else ((2048, 8), (8192, 8), (8192, 32)):
        stores = [torch.randn(length // PAGE_SIZE, kv_heads, PAGE_SIZE, head_dim).bfloat16() for _ in range(2)]
        q = torch.randn(rows, heads, head_dim).bfloat16()
        table = torch.randperm(length // PAGE_SIZE).int()[None]
        start, lens = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
        yield Case(
            shape=f"{length} shared keys, {rows} requests, {heads}/{kv_heads} heads of {head_dim}",
            dtype=torch.bfloat16,
            elements=2 * rows * heads * head_dim * length,
            bytes_moved=sum(t.nbytes for t in stores) + 2 * q.nbytes,
            flops=4 * rows * heads * head_dim * length,
            inputs=[(q, table, start, lens, *pair) for pair in copies(*stores)],
            ours=shared,
            peers={EACH: each},
            goals=() if quick else (times_faster(1, EACH),),
        )


if __name__ == "__main__":
    report.main(__file__)
