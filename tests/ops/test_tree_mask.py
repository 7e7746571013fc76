from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastdecode.testing.reference import tree as reference
from support import assert_same, check_op, raises, views
from tree_inputs import SIZES, random_trees

I32 = torch.int32


def compare(ops, parents: torch.Tensor, num_nodes: torch.Tensor | None = None) -> None:
    got, want = ops.tree_mask(parents, num_nodes), reference.tree_mask(parents, num_nodes)
    np.testing.assert_array_equal(got.mask.numpy(), want.mask)
    np.testing.assert_array_equal(got.depths.numpy(), want.depths)


def test_every_tree_of_three_slots(ops):
    """Valid and broken parents of every kind, and every count."""
    parents = torch.tensor(list(itertools.product((-2, -1, 0, 1, 2, 3, 4), repeat=3)), dtype=I32)
    compare(ops, parents)
    compare(ops, parents, torch.arange(len(parents), dtype=I32) % 7 - 1)


@pytest.mark.parametrize("slots", SIZES)
def test_random_trees(ops, slots):
    parents, count = random_trees(20 if slots < 200 else 4, slots, 3, broken=0.3)
    compare(ops, parents, count)
    compare(ops, parents)


def test_shapes_with_known_answers(ops):
    chain = torch.arange(-1, 69, dtype=I32)[None]
    star = torch.tensor([[-1] + [0] * 69], dtype=I32)
    mask, depths = ops.tree_mask(torch.cat((chain, star)))
    assert depths[0].tolist() == list(range(70)) and depths[1].tolist() == [0] + [1] * 69
    bits = (mask[:, :, torch.arange(70) // 32] >> (torch.arange(70) % 32)) & 1
    assert torch.equal(bits[0], torch.ones(70, 70, dtype=I32).tril())
    assert torch.equal(bits[1], torch.eye(70, dtype=I32).index_fill(1, torch.tensor([0]), 1))


def test_slots_past_the_count_do_not_matter(ops):
    parents, _ = random_trees(5, 40, 4)
    count = torch.tensor([0, 1, 7, 32, 33], dtype=I32)
    want = ops.tree_mask(parents, count)
    for junk in (-1, 99, 2**31 - 1):
        changed = torch.where(torch.arange(40) < count[:, None], parents, junk)
        assert_same(want, ops.tree_mask(changed, count), str(junk))


def test_views_and_independent_rows(ops, check_rows_independent):
    parents, count = random_trees(12, 37, 5, broken=0.2)
    want = ops.tree_mask(parents, count)
    for name, view in views(parents):
        assert_same(want, ops.tree_mask(view, count), name)
    check_rows_independent(ops.tree_mask, {"parents": parents, "num_nodes": count})


def test_empty(ops):
    assert ops.tree_mask(torch.zeros(0, 5, dtype=I32)).mask.shape == (0, 5, 1)
    none = torch.zeros(3, 0, dtype=I32)
    assert ops.tree_mask(none).mask.shape == (3, 0, 0)


def test_messages(ops):
    with raises(r"^tree_mask: parents: expected int32, got int64"):
        ops.tree_mask(torch.zeros(2, 3, dtype=torch.int64))
    with raises(r"^tree_mask: parents: expected at most 1024 slots, got \[1, 1025\]"):
        ops.tree_mask(torch.zeros(1, 1025, dtype=I32))
    with raises(r"^tree_mask: num_nodes: expected \[2\], got \[3\]"):
        ops.tree_mask(torch.zeros(2, 3, dtype=I32), torch.zeros(3, dtype=I32))


@pytest.mark.backends("cpu", "cuda")  # torch.compile does not know the host executor's ops
def test_opcheck_and_compile(ops):
    parents, count = random_trees(3, 33, 6)
    for number in (None, count):
        check_op(lambda number=number: ops.tree_mask(parents, number))
