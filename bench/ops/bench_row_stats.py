"""row_stats beside the torch reductions that give the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..goals import within
from ..harness import Case
from ..inputs import copies, logits_shapes


def topk_softmax_lse(logits: Tensor) -> tuple[Tensor, ...]:
    logits = logits.float()
    top = logits.topk(2, -1)
    logprobs = torch.log_softmax(logits, -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return *top, top.values[:, 0] - logprobs.amax(-1), entropy


def argmax_alone(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        logits = shape.logits()
        yield Case(
            shape=str(shape),
            dtype=shape.dtype,
            elements=logits.numel(),
            bytes_moved=logits.nbytes,
            inputs=copies(logits),
            ours=ops.row_stats,
            peers={"torch topk+log_softmax": topk_softmax_lse, "torch argmax alone": argmax_alone},
            goals=[within(reads=1.3, ns=0.18)] if shape.large else [],
        )


if __name__ == "__main__":
    report.main(__file__)
