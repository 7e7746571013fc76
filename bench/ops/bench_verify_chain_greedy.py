"""verify_chain_greedy beside the cumulative-product form that the Medusa family uses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Case


def cumprod(draft_tokens: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    accepted = (draft_tokens == target_ids[:, :-1]).int().cumprod(1).sum(1)
    keep = torch.arange(target_ids.shape[1]) <= accepted[:, None]
    return target_ids.masked_fill(~keep, -1), accepted


def cases(quick: bool) -> Iterator[Case]:
    for batch in (1,) if quick else (1, 8, 64):
        for longest in (4, 16):
            target = torch.randint(4096, (batch, longest + 1))
            draft = target[:, :longest].clone()
            draft[:, longest // 2] += 1
            yield Case(
                shape=f"B={batch} K={longest}",
                dtype=torch.int64,
                elements=draft.numel(),
                bytes_moved=batch * (3 * longest + 5) * 8,
                inputs=[(draft, target)],
                ours=ops.verify_chain_greedy,
                peers={"torch cumprod": cumprod},
            )


if __name__ == "__main__":
    report.main(__file__)
