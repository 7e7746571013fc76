"""kv_append_ beside the same in torch, and beside a copy of the new keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops
from fastdecode.ops import KVPages

from .. import report
from ..goals import times_faster
from ..harness import Case
from ..inputs import copies
from ..kv import HEAD_DIM, HEADS, Cache, code, code_fp8

TORCH = "torch code+index_put"
CODES: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "plain": lambda x: (x,),
    "fp8_e4m3": code_fp8,
    "int8": partial(code, bits=8),
    "int4": partial(code, bits=4),
}


def in_torch(k: Tensor, v: Tensor, slots: Tensor, pages: KVPages, scheme: str) -> None:
    stores = ((k, pages.k, pages.k_scale), (v, pages.v, pages.v_scale))
    for x, *tensors in stores:
        for tensor, values in zip(tensors, CODES[scheme](x), strict=False):
            assert tensor is not None
            flat = tensor.flatten(0, 1)
            flat[slots] = values.view(len(slots), *flat.shape[1:])


def copy(k: Tensor, v: Tensor, to: Tensor) -> None:
    to[0].copy_(k)
    to[1].copy_(v)


def cases(quick: bool) -> Iterator[Case]:
    for scheme in CODES:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (8,) if quick else (1, 64, 4096):
                cache = Cache.make(scheme, 1, max(tokens, 64), dtype)
                k, v = (torch.randn(tokens, HEADS, HEAD_DIM).to(dtype) for _ in "kv")
                slots, pages = cache.slots(tokens)[torch.randperm(tokens)], cache.pages
                yield Case(
                    shape=f"{scheme} T={tokens} H={HEADS} D={HEAD_DIM}",
                    dtype=dtype,
                    elements=k.numel() + v.numel(),
                    bytes_moved=k.nbytes + v.nbytes + int(tokens * cache.token_bytes()),
                    inputs=copies(k, v),
                    ours=partial(ops.kv_append_, slots=slots, pages=pages),
                    peers={
                        TORCH: partial(in_torch, slots=slots, pages=pages, scheme=scheme),
                        "torch copy_": partial(copy, to=torch.empty(2, *k.shape, dtype=dtype)),
                    },
                    goals=[times_faster(3, TORCH)] if tokens == 4096 and scheme == "int4" else [],
                )


if __name__ == "__main__":
    report.main(__file__)
