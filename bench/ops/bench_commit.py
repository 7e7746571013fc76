"""commit beside the masked form in torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Case


def masks(
    tokens: Tensor, num_emitted: Tensor, lengths: Tensor, finished: Tensor, max_lengths: Tensor, stop_ids: Tensor
) -> tuple[Tensor, Tensor]:
    width = tokens.shape[1]
    at = torch.arange(width)
    stop = (tokens[:, :, None] == stop_ids[:, None]).any(-1) & (at < num_emitted[:, None])
    first_stop = torch.where(stop.any(1), stop.int().argmax(1), width)
    room = max_lengths - lengths
    count = torch.minimum(torch.minimum(num_emitted, first_stop + 1), room).masked_fill_(finished, 0)
    reason = torch.where(first_stop < count, 1, torch.where(count == room, 2, 0)).masked_fill_(finished, 0)
    lengths += count.int()
    finished |= reason > 0
    return count, reason


def cases(quick: bool) -> Iterator[Case]:
    for batch in (1,) if quick else (1, 8, 64):
        for width in (5, 17):
            tokens = torch.randint(100, 4096, (batch, width))
            emitted = torch.full((batch,), width, dtype=torch.int32)
            # Nothing ever ends here, so every call does the same work; the lengths stay far below the cap.
            lengths, finished = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.bool)
            limits = {
                "max_lengths": torch.full((batch,), 2**31 - 1, dtype=torch.int32),
                "stop_ids": torch.tensor([[2, -1]]).repeat(batch, 1),
            }
            yield Case(
                shape=f"B={batch} K+1={width}",
                dtype=torch.int64,
                elements=tokens.numel(),
                bytes_moved=batch * (width + 2) * 8,
                inputs=[(tokens, emitted, lengths, finished)],
                ours=partial(ops.commit, **limits),
                peers={"torch masks": partial(masks, **limits)},
            )


if __name__ == "__main__":
    report.main(__file__)
