"""target_probs beside the usual filters in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Call, Case
from ..inputs import TEMPERATURE, TOP_K_TOP_P, TOP_P, copies, logits_shapes


def topk_scatter(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    values, ids = logits.topk(top_k, -1)
    probs = torch.softmax(values.float() / temperature, -1)
    probs.masked_fill_(probs.cumsum(-1) - probs >= top_p, 0)
    probs /= probs.sum(-1, keepdim=True)
    return torch.zeros(logits.shape).scatter_(-1, ids, probs)


def sort_scatter(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    ordered, ids = logits.sort(-1, descending=True)
    probs = torch.softmax(ordered.float() / temperature, -1)
    probs.masked_fill_(probs.cumsum(-1) - probs >= top_p, 0)
    probs /= probs.sum(-1, keepdim=True)
    return torch.empty(logits.shape).scatter_(-1, ids, probs)


def softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits.float() / temperature, -1)


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        logits = shape.logits()
        inputs = copies(logits)
        for filters in (TOP_K_TOP_P, TOP_P, TEMPERATURE):
            peers: dict[str, Call] = {}
            if filters.top_k:
                peers["torch topk+scatter"] = partial(
                    topk_scatter, temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p
                )
            elif filters.top_p < 1:
                peers["torch sort+scatter"] = partial(
                    sort_scatter, temperature=filters.temperature, top_p=filters.top_p
                )
            else:
                peers["torch softmax"] = partial(softmax, temperature=filters.temperature)
            yield Case(
                shape=f"{shape} {filters}",
                dtype=shape.dtype,
                elements=logits.numel(),
                bytes_moved=logits.nbytes + 4 * logits.numel(),
                inputs=inputs,
                ours=partial(ops.target_probs, **filters.tensors(shape.batch)),
                peers=peers,
            )


if __name__ == "__main__":
    report.main(__file__)
