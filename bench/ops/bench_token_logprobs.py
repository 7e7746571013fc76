"""token_logprobs (unfiltered, with the five most likely ids) against log_softmax, gather and topk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import harness
from torch import Tensor

from fastdecode import ops


def plain(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, ...]:
    logprobs = torch.log_softmax(logits, -1)
    return logprobs.gather(-1, tokens[:, None]), *logprobs.topk(top, -1)


def cases() -> Iterator[harness.Case]:
    for vocab_size in (4096, 128256):
        for batch in (1, 8):
            logits = harness.copies(torch.randn(batch, vocab_size))
            n, tokens = len(logits), torch.randint(vocab_size, (batch,))
            yield harness.Case(
                f"B={batch} V={vocab_size} top=5",
                batch * vocab_size * 4,
                lambda i, x=logits, n=n, t=tokens: ops.token_logprobs(x[i % n], t, top=5),
                {"torch log_softmax+topk": lambda i, x=logits, n=n, t=tokens: plain(x[i % n], t, 5)},
            )


if __name__ == "__main__":
    harness.main("token_logprobs", cases)
