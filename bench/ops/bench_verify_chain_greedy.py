"""verify_chain_greedy against the cumulative-product form that the Medusa family uses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench import harness
from torch import Tensor

from fastdecode import ops


def plain(draft_tokens: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    accepted = (draft_tokens == target_ids[:, :-1]).int().cumprod(1).sum(1)
    keep = torch.arange(target_ids.shape[1]) <= accepted[:, None]
    return target_ids.masked_fill(~keep, -1), accepted


def cases() -> Iterator[harness.Case]:
    for batch in (1, 8):
        for longest in (4, 16):
            target = torch.randint(4096, (batch, longest + 1))
            draft = target[:, :longest].clone()
            draft[:, longest // 2] += 1
            yield harness.Case(
                f"B={batch} K={longest}",
                batch * (3 * longest + 5) * 8,
                lambda i, d=draft, t=target: ops.verify_chain_greedy(d, t),
                {"torch cumprod": lambda i, d=draft, t=target: plain(d, t)},
            )


if __name__ == "__main__":
    harness.main("verify_chain_greedy", cases)
