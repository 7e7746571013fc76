"""kv_keep_ beside index_select and index_put in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops
from fastdecode.ops import KVPages

from .. import report
from ..harness import Case
from ..kv import HEAD_DIM, HEADS, PAGE_SIZE, Cache


def ours(path: Tensor, num_keep: Tensor, base_lens: Tensor, pages: KVPages, page_table: Tensor) -> Tensor:
    return ops.kv_keep_(pages, path, num_keep, base_lens, page_table=page_table)


def in_torch(path: Tensor, num_keep: Tensor, base_lens: Tensor, pages: KVPages, page_table: Tensor) -> None:
    """All requests keep their whole path."""

    def slots(tokens: Tensor) -> Tensor:
        return (page_table.gather(1, (tokens // PAGE_SIZE).long()).long() * PAGE_SIZE + tokens % PAGE_SIZE).flatten()

    source = slots(base_lens[:, None] + path)
    target = slots(base_lens[:, None] + torch.arange(path.shape[1]))
    for tensor in (pages.k, pages.v, pages.k_scale, pages.v_scale):
        if tensor is not None:
            flat = tensor.flatten(0, 1)
            flat[target] = flat[source]


def cases(quick: bool) -> Iterator[Case]:
    path = torch.tensor([[0, 2, 7, 15, 31]], dtype=torch.int32)
    for scheme in ("plain", "int4"):
        for batch in (1,) if quick else (1, 8, 64):
            cache = Cache.make(scheme, batch, 3 * PAGE_SIZE, torch.float32)
            moved = batch * (path.shape[1] - 1)
            yield Case(
                shape=f"{scheme} B={batch} path={path.shape[1]} H={HEADS} D={HEAD_DIM}",
                dtype=torch.float32,
                elements=2 * moved * HEADS * HEAD_DIM,
                bytes_moved=int(2 * moved * cache.token_bytes()),
                inputs=[
                    (
                        path.repeat(batch, 1),
                        torch.full((batch,), path.shape[1], dtype=torch.int32),
                        torch.full((batch,), PAGE_SIZE - 3, dtype=torch.int32),
                    )
                ],
                ours=partial(ours, pages=cache.pages, page_table=cache.page_table),
                peers={"torch index_put": partial(in_torch, pages=cache.pages, page_table=cache.page_table)},
            )


if __name__ == "__main__":
    report.main(__file__)
