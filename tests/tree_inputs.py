"""Draft trees for the tests of the ops on them."""

from __future__ import annotations

import numpy as np
import torch

SIZES = (1, 2, 31, 32, 33, 64, 65, 129, 256, 257, 1024)


def random_trees(batch: int, slots: int, seed: int, *, broken: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents uniform among earlier slots; a share of rows gets one entry that is wrong."""
    g = np.random.default_rng([batch, slots, seed])
    parents = np.array([[-1] + [g.integers(i) for i in range(1, slots)] for _ in range(batch)], np.int32)
    count = g.integers(0, slots + 1, batch, dtype=np.int32)
    for b in np.flatnonzero(g.random(batch) < broken):
        if g.random() < 0.3:
            count[b] = g.choice([-1, slots + 1, 2**31 - 1, -(2**31)])
        else:
            at = g.integers(slots)
            parents[b, at] = g.choice([-2, -1, at, at + 1, slots, 2**31 - 1, -(2**31)])
    return torch.from_numpy(parents).reshape(batch, slots), torch.from_numpy(count)
