"""Draft trees by sets of ancestors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..._host import TreeError

__all__ = ["TreeMask", "tree_check", "tree_mask"]


class TreeMask(NamedTuple):
    mask: np.ndarray
    depths: np.ndarray


def tree_check(parents: Tensor, num_nodes: Tensor | None = None) -> np.ndarray:
    """int32 [B], see fastdecode.ops.tree_check."""
    batch, slots = parents.shape
    codes = np.zeros(batch, np.int32)
    for b in range(batch):
        count = slots if num_nodes is None else int(num_nodes[b])
        codes[b] = _error(parents[b].tolist(), count)
    return codes


def _error(parents: list[int], count: int) -> TreeError:
    if not 0 <= count <= len(parents):
        return TreeError.BAD_COUNT
    for slot, parent in enumerate(parents[:count]):
        if slot == 0 and parent != -1:
            return TreeError.BAD_ROOT
        if slot > 0 and parent not in range(slot):
            return TreeError.BAD_PARENT
    return TreeError.VALID


def tree_mask(parents: Tensor, num_nodes: Tensor | None = None) -> TreeMask:
    """See fastdecode.ops.tree_mask."""
    batch, slots = parents.shape
    mask = np.zeros((batch, slots, (slots + 31) // 32), np.uint32)
    depths = np.full((batch, slots), -1, np.int32)
    for b, code in enumerate(tree_check(parents, num_nodes)):
        count = slots if num_nodes is None else int(num_nodes[b])
        seen: list[set[int]] = []
        for i in range(count if code == TreeError.VALID else 0):
            seen.append({i} | (seen[int(parents[b, i])] if i else set()))
            depths[b, i] = len(seen[i]) - 1
            for j in seen[i]:
                mask[b, i, j // 32] |= np.uint32(1) << np.uint32(j % 32)
    return TreeMask(mask.view(np.int32), depths)
