"""sample beside what torch programs write for the same draw."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..goals import Goal, times_faster, within
from ..harness import Call, Case
from ..inputs import TEMPERATURE, TOP_K_TOP_P, TOP_P, copies, logits_shapes

TOP_K, SORT = "torch topk+multinomial", "torch sort+multinomial"


def topk_multinomial(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    values, ids = logits.topk(top_k, -1)  # sorted, so that all the rest is on top_k columns
    probs = torch.softmax(values.float() / temperature, -1)
    probs.masked_fill_(probs.cumsum(-1) - probs >= top_p, 0)
    return ids.gather(-1, probs.multinomial(1))


def sort_multinomial(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    ordered, ids = logits.sort(-1, descending=True)
    probs = torch.softmax(ordered.float() / temperature, -1)
    probs.masked_fill_(probs.cumsum(-1) - probs >= top_p, 0)
    return ids.gather(-1, probs.multinomial(1))


def softmax_multinomial(logits: Tensor, temperature: float) -> Tensor:
    return torch.softmax(logits.float() / temperature, -1).multinomial(1)


def softmax_race(logits: Tensor, temperature: float) -> Tensor:
    probs = torch.softmax(logits.float() / temperature, -1)
    return probs.div_(torch.empty_like(probs).exponential_()).argmax(-1)


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        logits = shape.logits()
        inputs = copies(logits)
        seeds = {"seed": torch.arange(shape.batch), "offset": torch.zeros(shape.batch, dtype=torch.int64)}
        for filters in (TOP_K_TOP_P, TOP_P, TEMPERATURE):
            peers: dict[str, Call] = {}
            goals: list[Goal] = [within(reads=2, ns=0.2)]
            if filters.top_k:
                peers[TOP_K] = partial(
                    topk_multinomial, temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p
                )
                goals.append(times_faster(3, TOP_K))
            elif filters.top_p < 1:
                peers[SORT] = partial(sort_multinomial, temperature=filters.temperature, top_p=filters.top_p)
                goals.append(times_faster(50, SORT))
            else:
                peers["torch multinomial"] = partial(softmax_multinomial, temperature=filters.temperature)
                peers["torch exponential race"] = partial(softmax_race, temperature=filters.temperature)
            yield Case(
                shape=f"{shape} {filters}",
                dtype=shape.dtype,
                elements=logits.numel(),
                bytes_moved=logits.nbytes,
                inputs=inputs,
                ours=partial(ops.sample, **filters.tensors(shape.batch), **seeds),
                peers=peers,
                goals=goals if shape.large else [],
            )


if __name__ == "__main__":
    report.main(__file__)
