"""linear beside torch's, on the shapes of the shipped model and of an 8B one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Case
from ..inputs import copies


def packed_linear(x: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    return ops.linear(x, packed, len(weight))


def torch_linear(x: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def cases(quick: bool) -> Iterator[Case]:
    shapes = ((1536, 256), (256, 768), (4096, 256), (14336, 4096))
    for n, k in shapes[:1] if quick else shapes:
        weight = torch.randn(n, k)
        inputs = copies(ops.pack_weight(weight), weight, used_bytes=weight.nbytes)
        for rows in (1, 2, 6, 16):
            x = torch.randn(rows, k)
            yield Case(
                shape=f"M={rows} N={n} K={k}",
                dtype=torch.float32,
                elements=n * k,
                bytes_moved=4 * (n * k + rows * (n + k)),
                inputs=[(x, *pair) for pair in inputs],
                ours=packed_linear,
                peers={"torch linear": torch_linear},
            )


if __name__ == "__main__":
    report.main(__file__)
