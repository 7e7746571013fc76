"""penalize (all three penalties) against the dense form of the engines: counts by scatter_add_, then where."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import harness
from torch import Tensor

from fastdecode import ops

REPETITION, PRESENCE, FREQUENCY = 1.2, 0.5, 0.1


def plain(logits: Tensor, tokens: Tensor) -> Tensor:
    out = logits.float()
    counts = torch.zeros(out.shape, dtype=torch.float32).scatter_add_(1, tokens, torch.ones(tokens.shape))
    seen = counts > 0
    out = torch.where(seen, torch.where(out > 0, out / REPETITION, out * REPETITION), out)
    return out.sub_(FREQUENCY * counts).sub_(PRESENCE * seen)


def cases() -> Iterator[harness.Case]:
    vocab_size = 128256
    for dtype in (torch.float32, torch.bfloat16):
        for batch, rows, length in ((1, 1, 1024), (1, 1, 32768), (8, 1, 1024), (8, 1, 32768), (1, 6, 32768)):
            logits = harness.copies(torch.randn(batch, rows, vocab_size).to(dtype))
            # a text of a few thousand different ids, some of them frequent
            tokens = (4000 * torch.rand(batch, length) ** 3).long() * 31
            lengths, drafts = torch.full((batch,), length, dtype=torch.int32), torch.zeros(batch, rows - 1).long()
            n, each = len(logits), tokens.repeat_interleave(rows, 0)
            yield harness.Case(
                f"B={batch} n={rows} T={length} {str(dtype)[6:]}",
                batch * (rows * vocab_size * (dtype.itemsize + 4) + length * 8),
                lambda i, x=logits, n=n, t=tokens, s=lengths, d=drafts: ops.penalize(
                    x[i % n], t, s, draft_tokens=d, repetition=REPETITION, presence=PRESENCE, frequency=FREQUENCY
                ),
                {"torch scatter_add_+where": lambda i, x=logits, n=n, t=each: plain(x[i % n].flatten(0, 1), t)},
            )


if __name__ == "__main__":
    harness.main("penalize", cases)
