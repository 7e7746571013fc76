"""sample against torch filters and multinomial (the peers filter as bench_target_probs does)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import harness
from bench.ops.bench_target_probs import plain
from torch import Tensor

from fastdecode import ops


def top_k_first(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The best torch can do when top-k is on: everything after it on k columns."""
    values, ids = (logits.float() / temperature).topk(top_k, -1)
    probs = torch.softmax(values, -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    return ids.gather(-1, probs.multinomial(1))


def cases() -> Iterator[harness.Case]:
    for vocab_size in (4096, 128256):
        for batch in (1, 8):
            logits = harness.copies(3 * torch.randn(batch, vocab_size))
            n = len(logits)
            seed, offset = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
            for name, chosen in {"T": (0.7, 0, 1.0), "T k=50 p=.9": (0.7, 50, 0.9), "T p=.9": (0.7, 0, 0.9)}.items():
                temperature, top_k, top_p = chosen
                filters = {
                    "temperature": torch.full((batch,), temperature),
                    "top_k": torch.full((batch,), top_k, dtype=torch.int32) if top_k else None,
                    "top_p": torch.full((batch,), top_p) if top_p < 1 else None,
                }
                peers = {
                    "torch filters+multinomial": lambda i, x=logits, n=n, c=chosen: plain(x[i % n], *c).multinomial(1)
                }
                if top_k:
                    peers["torch topk+multinomial"] = lambda i, x=logits, n=n, c=chosen: top_k_first(x[i % n], *c)
                yield harness.Case(
                    f"B={batch} V={vocab_size} {name}",
                    batch * vocab_size * 4,
                    lambda i, x=logits, n=n, f=filters, s=seed, o=offset: ops.sample(x[i % n], seed=s, offset=o, **f),
                    peers,
                )


if __name__ == "__main__":
    harness.main("sample", cases)
