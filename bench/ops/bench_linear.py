"""linear against torch's linear, on the shapes of the shipped model and of an 8B one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from bench import harness

from fastdecode import ops


def cases() -> Iterator[harness.Case]:
    for n, k in ((1536, 256), (256, 768), (4096, 256), (14336, 4096)):
        plain = harness.copies(torch.randn(n, k))
        packed = [ops.pack_weight(w) for w in plain]
        for rows in (1, 2, 6, 16):
            x, count = torch.randn(rows, k), len(plain)
            yield harness.Case(
                f"M={rows} N={n} K={k} float32",
                4 * (n * k + rows * (n + k)),
                lambda i, x=x, w=packed, n=n, c=count: ops.linear(x, w[i % c], n),
                {"torch linear": lambda i, x=x, w=plain, c=count: F.linear(x, w[i % c])},
            )


if __name__ == "__main__":
    harness.main("linear", cases)
