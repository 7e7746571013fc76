"""tree_mask beside the closure of the parent matrix by repeated squaring."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Case


def closure(parents: Tensor) -> tuple[Tensor, Tensor]:
    batch, slots = parents.shape
    seen = torch.eye(slots).expand(batch, slots, slots).clone()
    inner = parents[:, 1:].long()
    seen[:, 1:].scatter_(2, inner.unsqueeze(2), 1.0)
    for _ in range((slots - 1).bit_length()):
        seen = (seen @ seen).clamp_(max=1.0)
    return seen > 0, seen.sum(2) - 1


def cases(quick: bool) -> Iterator[Case]:
    for batch in (1,) if quick else (1, 16):
        for slots in (16, 64) if quick else (16, 64, 256, 1024):
            parents = torch.tensor([-1, *((i - 1) // 3 for i in range(1, slots))], dtype=torch.int32)
            parents = parents.expand(batch, slots).contiguous()
            yield Case(
                shape=f"B={batch} N={slots}",
                dtype=torch.int32,
                elements=parents.numel(),
                bytes_moved=4 * batch * slots * (2 + (slots + 31) // 32),
                inputs=[(parents,)],
                ours=ops.tree_mask,
                peers={"torch closure": closure},
            )


if __name__ == "__main__":
    report.main(__file__)
