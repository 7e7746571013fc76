"""row_stats against the four torch reductions that give the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import harness
from torch import Tensor

from fastdecode import ops


def plain(logits: Tensor) -> tuple[Tensor, ...]:
    top = logits.topk(2, -1)
    logprobs = torch.log_softmax(logits, -1)
    return (*top, torch.logsumexp(logits, -1), -(logprobs.exp() * logprobs).sum(-1))


def cases() -> Iterator[harness.Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for vocab_size in (4096, 128256):
            for batch in (1, 8):
                logits = harness.copies(torch.randn(batch, vocab_size).to(dtype))
                n = len(logits)
                yield harness.Case(
                    f"B={batch} V={vocab_size} {str(dtype)[6:]}",
                    batch * vocab_size * dtype.itemsize,
                    lambda i, x=logits, n=n: ops.row_stats(x[i % n]),
                    {
                        "torch topk+softmax+lse": lambda i, x=logits, n=n: plain(x[i % n]),
                        "torch argmax alone": lambda i, x=logits, n=n: x[i % n].argmax(-1),
                    },
                )


if __name__ == "__main__":
    harness.main("row_stats", cases)
