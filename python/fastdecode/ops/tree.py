"""Draft trees (csrc/tree): slot 0 is the root, every parent stands before its children."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import check_devices

__all__ = ["TreeMask", "tree_check", "tree_mask"]


class TreeMask(NamedTuple):
    """What `tree_mask` returns."""

    mask: Tensor
    depths: Tensor


def tree_check(parents: Tensor, num_nodes: Tensor | None = None) -> Tensor:
    """Whether draft trees are well formed.

    Args:
        parents: slot of each node's parent, int32 [B, N], N at most 1024: -1 at slot 0, the root, and an earlier slot
            for every other node. Rows may be strided; slots past num_nodes are not read.
        num_nodes: int32 [B], 0..N; None means N.
    Returns:
        int32 [B], a `fastdecode.TreeError`: of the first slot, in rising order, that has one; 0 = valid. Does not
        synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device, more than 1024 slots.
    Reference: fastdecode.testing.reference.tree.
    """
    return torch.ops.fastdecode.tree_check.default(parents, num_nodes)


@torch.library.register_fake("fastdecode::tree_check")
def _(parents: Tensor, num_nodes: Tensor | None) -> Tensor:
    check_devices("tree_check", parents, num_nodes)
    return parents.new_empty(parents.shape[0])


def tree_mask(parents: Tensor, num_nodes: Tensor | None = None) -> TreeMask:
    """Which nodes of a draft tree each node may attend to, and how deep it stands.

    Args:
        parents: as for `tree_check`, int32 [B, N].
        num_nodes: int32 [B]; None means N.
    Returns:
        mask int32 [B, N, ceil(N / 32)]: bit j & 31 of word j >> 5 of row i says that j is i or an ancestor of i (the
        cached tokens before the tree are implied); depths int32 [B, N], 0 at the root. Slots past num_nodes, and all
        slots of a tree that `tree_check` refuses, have mask 0 and depth -1. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device, more than 1024 slots.
    Source: Miao et al. 2024 (SpecInfer), section 4.2. Reference: fastdecode.testing.reference.tree.
    """
    return TreeMask(*torch.ops.fastdecode.tree_mask.default(parents, num_nodes))


@torch.library.register_fake("fastdecode::tree_mask")
def _(parents: Tensor, num_nodes: Tensor | None) -> tuple[Tensor, Tensor]:
    check_devices("tree_mask", parents, num_nodes)
    batch, slots = parents.shape
    return parents.new_empty((batch, slots, (slots + 31) // 32)), parents.new_empty((batch, slots))
