"""token_logprobs (unfiltered, with the five most likely ids) beside log_softmax, gather and topk."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Case
from ..inputs import copies, logits_shapes

TOP = 5


def log_softmax_topk(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, ...]:
    logprobs = torch.log_softmax(logits.float(), -1)
    return logprobs.gather(-1, tokens[:, None]), *logprobs.topk(top, -1)


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        logits = shape.logits()
        yield Case(
            shape=f"{shape} top={TOP}",
            dtype=shape.dtype,
            elements=logits.numel(),
            bytes_moved=logits.nbytes,
            inputs=copies(logits, torch.randint(shape.vocab_size, (shape.batch,))),
            ours=partial(ops.token_logprobs, top=TOP),
            peers={"torch log_softmax+topk": partial(log_softmax_topk, top=TOP)},
        )


if __name__ == "__main__":
    report.main(__file__)
