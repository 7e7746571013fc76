"""topk_logits beside torch.topk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..goals import times_faster
from ..harness import Case
from ..inputs import copies, logits_shapes

K = 50
TORCH = "torch topk"


def topk(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    return tuple(torch.topk(logits, k, -1))


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        logits = shape.logits()
        yield Case(
            shape=f"{shape} k={K}",
            dtype=shape.dtype,
            elements=logits.numel(),
            bytes_moved=logits.nbytes,
            inputs=copies(logits),
            ours=partial(ops.topk_logits, k=K),
            peers={TORCH: partial(topk, k=K)},
            goals=[times_faster(3, TORCH)] if shape.large else [],
        )


if __name__ == "__main__":
    report.main(__file__)
