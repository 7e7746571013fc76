"""verify_chain (ratio rule, K = 4, drafts sampled from a noisy copy of the target) against plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import harness
from torch import Tensor

from fastdecode import ops

K = 4


def plain(draft_tokens: Tensor, draft_probs: Tensor, target_logits: Tensor) -> Tensor:
    """All rows at once, without a host read: accept, pick the residual or bonus row, draw."""
    target_probs = torch.softmax(target_logits.float(), -1)
    p = target_probs[:, :-1].gather(-1, draft_tokens[..., None])[..., 0]
    q = draft_probs.gather(-1, draft_tokens[..., None])[..., 0]
    accepted = (torch.rand_like(p) * q < p).int().cumprod(1).sum(1)
    rows = torch.arange(draft_tokens.shape[0])
    final = target_probs[rows, accepted]
    residual = (final - draft_probs[rows, accepted.clamp(max=K - 1)]).clamp(min=0)
    final = torch.where((accepted == K)[:, None], final, residual)
    keep = torch.arange(K + 1) < accepted[:, None]
    tokens = torch.nn.functional.pad(draft_tokens, (0, 1)).masked_fill(~keep, -1)
    return tokens.scatter(1, accepted[:, None], final.multinomial(1))


def cases() -> Iterator[harness.Case]:
    for vocab_size in (4096, 128256):
        for batch in (1, 8):
            logits = 3 * torch.randn(batch, K + 1, vocab_size)
            drafter = torch.softmax(logits[:, :K] + 0.5 * torch.randn(batch, K, vocab_size), -1)
            tokens = drafter.view(-1, vocab_size).multinomial(1).view(batch, K)
            targets, drafters = harness.copies(logits), harness.copies(drafter)
            n = len(targets)
            seed, offset = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)

            def ours(i: int, x=targets, q=drafters, n=n, d=tokens, s=seed, o=offset) -> object:
                return ops.verify_chain(d, q[i % n], target_logits=x[i % n], seed=s, offset=o + i)

            def coupled(i: int, x=targets, n=n, d=tokens, s=seed, o=offset) -> object:
                return ops.verify_chain(d, target_logits=x[i % n], rule="coupled", seed=s, offset=o + i)

            yield harness.Case(
                f"B={batch} V={vocab_size} K={K} ratio",
                batch * (K + 2) * vocab_size * 4,
                ours,
                {
                    "torch softmax+multinomial": lambda i, x=targets, q=drafters, n=n, d=tokens: plain(
                        d, q[i % n], x[i % n]
                    ),
                    "fastdecode coupled": coupled,
                },
            )


if __name__ == "__main__":
    harness.main("verify_chain", cases)
