"""tree_check beside the comparisons in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Case


def compare(parents: Tensor) -> Tensor:
    slots = torch.arange(parents.shape[1], dtype=torch.int32)
    inner = (parents[:, 1:] >= 0) & (parents[:, 1:] < slots[1:])
    return (parents[:, 0] == -1) & inner.all(1)


def cases(quick: bool) -> Iterator[Case]:
    for batch in (1,) if quick else (1, 64):
        for slots in (64,) if quick else (64, 1024):
            parents = torch.tensor([-1, *((i - 1) // 3 for i in range(1, slots))], dtype=torch.int32)
            parents = parents.expand(batch, slots).contiguous()
            yield Case(
                shape=f"B={batch} N={slots}",
                dtype=torch.int32,
                elements=parents.numel(),
                bytes_moved=4 * batch * (slots + 1),
                inputs=[(parents,)],
                ours=ops.tree_check,
                peers={"torch comparisons": compare},
            )


if __name__ == "__main__":
    report.main(__file__)
