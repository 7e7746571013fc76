from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastdecode import TreeError
from fastdecode.testing.reference import tree as reference
from support import assert_same, check_op, raises, views

I32 = torch.int32
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


def compare(ops, parents: torch.Tensor, num_nodes: torch.Tensor | None = None) -> None:
    got, want = ops.tree_mask(parents, num_nodes), reference.tree_mask(parents, num_nodes)
    np.testing.assert_array_equal(got.mask.numpy(), want.mask)
    np.testing.assert_array_equal(got.depths.numpy(), want.depths)
    np.testing.assert_array_equal(ops.tree_check(parents, num_nodes).numpy(), reference.tree_check(parents, num_nodes))


def test_every_tree_of_four_slots(ops):
    """Valid and broken parents of every kind, and every count."""
    parents = torch.tensor(list(itertools.product((-2, -1, 0, 1, 2, 3, 4), repeat=3)), dtype=I32)
    compare(ops, parents)
    counts = torch.arange(len(parents), dtype=I32) % 7 - 1
    compare(ops, parents, counts)
    codes = set(ops.tree_check(parents, counts).tolist())
    assert codes == {int(code) for code in TreeError}, "the cases reach every code"


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


def test_the_first_error_counts(ops):
    parents = torch.tensor([[0, 5, -1], [-1, 1, -1], [-1, 0, 2], [-1, 0, 1]], dtype=I32)
    assert ops.tree_check(parents).tolist() == [
        TreeError.BAD_ROOT,
        TreeError.BAD_PARENT,
        TreeError.BAD_PARENT,
        TreeError.VALID,
    ]


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
    check_rows_independent(lambda **t: (ops.tree_check(**t),), {"parents": parents, "num_nodes": count})


def test_empty(ops):
    assert ops.tree_mask(torch.zeros(0, 5, dtype=I32)).mask.shape == (0, 5, 1)
    none = torch.zeros(3, 0, dtype=I32)
    assert ops.tree_mask(none).mask.shape == (3, 0, 0) and ops.tree_check(none).tolist() == [0, 0, 0]


def test_messages(ops):
    for op in ("tree_check", "tree_mask"):
        call = getattr(ops, op)
        with raises(rf"^{op}: parents: expected int32, got int64"):
            call(torch.zeros(2, 3, dtype=torch.int64))
        with raises(rf"^{op}: parents: expected 2 dimensions, got \[3\]"):
            call(torch.zeros(3, dtype=I32))
        with raises(rf"^{op}: parents: expected at most 1024 slots, got \[1, 1025\]"):
            call(torch.zeros(1, 1025, dtype=I32))
        with raises(rf"^{op}: num_nodes: expected \[2\], got \[3\]"):
            call(torch.zeros(2, 3, dtype=I32), torch.zeros(3, dtype=I32))


@pytest.mark.backends("cpu", "cuda")  # torch.compile does not know the host executor's ops
def test_opcheck_and_compile(ops):
    parents, count = random_trees(3, 33, 6)
    for number in (None, count):
        check_op(lambda number=number: ops.tree_mask(parents, number))
        check_op(lambda number=number: (ops.tree_check(parents, number),))
