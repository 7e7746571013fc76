"""target_probs against the usual sort-based filters in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import harness
from torch import Tensor

from fastdecode import ops


def plain(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, ids = logits.sort(-1, descending=True)
        probs = torch.softmax(ordered, -1)
        ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, ids, ordered)
    return torch.softmax(logits, -1)


def cases() -> Iterator[harness.Case]:
    for vocab_size in (4096, 128256):
        for batch in (1, 8):
            logits = harness.copies(3 * torch.randn(batch, vocab_size))
            n = len(logits)
            for name, chosen in {"T": (0.7, 0, 1.0), "T k=50 p=.9": (0.7, 50, 0.9), "T p=.9": (0.7, 0, 0.9)}.items():
                temperature, top_k, top_p = chosen
                filters = {
                    "temperature": torch.full((batch,), temperature),
                    "top_k": torch.full((batch,), top_k, dtype=torch.int32) if top_k else None,
                    "top_p": torch.full((batch,), top_p) if top_p < 1 else None,
                }
                yield harness.Case(
                    f"B={batch} V={vocab_size} {name}",
                    2 * batch * vocab_size * 4,
                    lambda i, x=logits, n=n, f=filters: ops.target_probs(x[i % n], **f),
                    {"torch topk/sort/softmax": lambda i, x=logits, n=n, c=chosen: plain(x[i % n], *c)},
                )


if __name__ == "__main__":
    harness.main("target_probs", cases)
