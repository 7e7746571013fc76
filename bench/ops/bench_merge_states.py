"""merge_states beside the same in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..goals import times_faster
from ..harness import Case
from ..inputs import copies


def merge(*states: Tensor) -> ops.Merged:
    half = len(states) // 2
    return ops.merge_states(states[:half], states[half:])


def torch_merge(*states: Tensor) -> tuple[Tensor, Tensor]:
    half = len(states) // 2
    logs = torch.stack(states[half:])
    weights = torch.softmax(logs, 0)
    out = (weights[..., None] * torch.stack(states[:half])).sum(0).to(states[0].dtype)
    return out, torch.logsumexp(logs, 0)


def cases(quick: bool) -> Iterator[Case]:
    for rows, count in ((4, 2),) if quick else ((8, 2), (64, 2), (64, 8), (1024, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            outs = [torch.randn(rows, 32, 128).to(dtype) for _ in range(count)]
            lses = [torch.randn(rows, 32) for _ in range(count)]
            size = sum(t.nbytes for t in (*outs, *lses)) + outs[0].nbytes + lses[0].nbytes
            yield Case(
                shape=f"{count} states of {rows} rows, 32 heads of 128",
                dtype=dtype,
                elements=count * outs[0].numel(),
                bytes_moved=size,
                inputs=copies(*outs, *lses),
                ours=merge,
                peers={"torch softmax of states": torch_merge},
                goals=() if quick else (times_faster(1, "torch softmax of states"),),
            )


if __name__ == "__main__":
    report.main(__file__)
