from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastdecode import TreeError
from fastdecode.testing.reference import tree as reference
from support import check_op, raises, views
from tree_inputs import SIZES, random_trees

I32 = torch.int32


def compare(ops, parents: torch.Tensor, num_nodes: torch.Tensor | None = None) -> None:
    np.testing.assert_array_equal(ops.tree_check(parents, num_nodes).numpy(), reference.tree_check(parents, num_nodes))


def test_every_tree_of_three_slots(ops):
    """Valid and broken parents of every kind, and every count."""
    parents = torch.tensor(list(itertools.product((-2, -1, 0, 1, 2, 3, 4), repeat=3)), dtype=I32)
    counts = torch.arange(len(parents), dtype=I32) % 7 - 1
    compare(ops, parents)
    compare(ops, parents, counts)
    codes = set(ops.tree_check(parents, counts).tolist())
    assert codes == {int(code) for code in TreeError}, "the cases reach every code"


@pytest.mark.parametrize("slots", SIZES)
def test_random_trees(ops, slots):
    parents, count = random_trees(20 if slots < 200 else 4, slots, 3, broken=0.3)
    compare(ops, parents, count)
    compare(ops, parents)


def test_the_first_error_counts(ops):
    parents = torch.tensor([[0, 5, -1], [-1, 1, -1], [-1, 0, 2], [-1, 0, 1]], dtype=I32)
    assert ops.tree_check(parents).tolist() == [
        TreeError.BAD_ROOT,
        TreeError.BAD_PARENT,
        TreeError.BAD_PARENT,
        TreeError.VALID,
    ]


def test_views_and_independent_rows(ops, check_rows_independent):
    parents, count = random_trees(12, 37, 5, broken=0.4)
    want = ops.tree_check(parents, count)
    assert want.any() and not want.all()
    for name, view in views(parents):
        assert torch.equal(ops.tree_check(view, count), want), name
    check_rows_independent(lambda **t: (ops.tree_check(**t),), {"parents": parents, "num_nodes": count})


def test_empty(ops):
    assert ops.tree_check(torch.zeros(0, 5, dtype=I32)).shape == (0,)
    assert ops.tree_check(torch.zeros(3, 0, dtype=I32)).tolist() == [0, 0, 0]


def test_messages(ops):
    with raises(r"^tree_check: parents: expected int32, got int64"):
        ops.tree_check(torch.zeros(2, 3, dtype=torch.int64))
    with raises(r"^tree_check: parents: expected 2 dimensions, got \[3\]"):
        ops.tree_check(torch.zeros(3, dtype=I32))
    with raises(r"^tree_check: parents: expected at most 1024 slots, got \[1, 1025\]"):
        ops.tree_check(torch.zeros(1, 1025, dtype=I32))


@pytest.mark.backends("cpu", "cuda")  # torch.compile does not know the host executor's ops
def test_opcheck_and_compile(ops):
    parents, count = random_trees(3, 33, 6)
    for number in (None, count):
        check_op(lambda number=number: (ops.tree_check(parents, number),))
