"""penalize (all three penalties) beside the dense form of the engines: counts by scatter_add_, then where."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Case
from ..inputs import copies, logits_shapes

PENALTIES: dict[str, float] = {"repetition": 1.2, "presence": 0.5, "frequency": 0.1}


def penalize(
    logits: Tensor, tokens: Tensor, lengths: Tensor, draft_tokens: Tensor, **penalties: Tensor
) -> ops.Penalized:
    return ops.penalize(logits, tokens, lengths, draft_tokens=draft_tokens, **penalties)


def dense_counts(
    logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    draft_tokens: Tensor,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> Tensor:
    """All texts are as long as `tokens` here; row i counts i drafts too."""
    batch, rows, vocab_size = logits.shape
    counts = torch.zeros(batch, vocab_size).scatter_add_(1, tokens, torch.ones(tokens.shape))
    counts = counts[:, None].repeat(1, rows, 1)
    for row in range(1, rows):
        index = draft_tokens[:, None, row - 1 : row].expand(-1, rows - row, -1)
        counts[:, row:].scatter_add_(2, index, torch.ones(index.shape))
    out, seen = logits.float(), counts > 0
    out = torch.where(seen, torch.where(out > 0, out / repetition, out * repetition), out)
    return out.sub_(frequency * counts).sub_(presence * seen)


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        for rows, length in ((1, 1024), (1, 32768), (5, 1024)) if shape.batch <= 8 else ((1, 1024),):
            logits = shape.logits(rows)
            # a text of up to a few thousand different ids, some of them frequent
            tokens = (shape.vocab_size / 32 * torch.rand(shape.batch, length) ** 3).long() * 31
            after = (torch.full((shape.batch,), length, dtype=torch.int32), tokens[:, : rows - 1].contiguous())
            yield Case(
                shape=f"{shape} n={rows} T={length}",
                dtype=shape.dtype,
                elements=logits.numel(),
                bytes_moved=logits.nbytes + 4 * logits.numel() + tokens.nbytes,
                inputs=[(*pair, *after) for pair in copies(logits, tokens)],
                ours=partial(penalize, **{name: torch.full((shape.batch,), v) for name, v in PENALTIES.items()}),
                peers={"torch scatter_add_+where": partial(dense_counts, **PENALTIES)},  # type: ignore[arg-type]
            )


if __name__ == "__main__":
    report.main(__file__)
