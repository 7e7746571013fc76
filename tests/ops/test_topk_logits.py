from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdecode.testing.reference import sample as reference
from support import DTYPES, ROW_KINDS, SIZES, assert_same, check_op, compute_dtype, generator, raises, rows, views


def compare(ops, logits: torch.Tensor, k: int, what: str = "") -> None:
    values, ids, status = got = ops.topk_logits(logits, k)
    assert [o.dtype for o in got] == [compute_dtype(logits.dtype), torch.int64, torch.int32]
    assert values.shape == ids.shape == (*logits.shape[:-1], k) and status.shape == logits.shape[:-1]
    for ours, exact in zip(got, reference.topk_logits(logits, k)):
        np.testing.assert_array_equal(ours.numpy(), exact, err_msg=f"{what}, k = {k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_equals_reference(ops, vocab_size, dtype):
    for kind in ROW_KINDS:
        logits = rows(kind, 5, vocab_size, dtype)
        for k in sorted({1, 2, 3, 17, 64, 257, vocab_size // 2, vocab_size - 1, vocab_size}):
            if 1 <= k <= vocab_size:
                compare(ops, logits, k, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch_where_nothing_ties(ops, dtype):
    """Permutations of distinct numbers: torch.topk is another implementation to agree with."""
    values = torch.arange(-900, 900) if dtype in (torch.float64, torch.float32) else torch.arange(-128, 128)
    logits = torch.stack([values[torch.randperm(len(values), generator=generator(i))] for i in range(4)]).to(dtype)
    for k in (1, 5, 100, len(values)):
        got, want = ops.topk_logits(logits, k), logits.topk(k)
        assert torch.equal(got.ids, want.indices)
        assert torch.equal(got.values, want.values.to(compute_dtype(dtype)))


def test_ties_by_lowest_id_and_signed_zeros(ops):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, -0.0, 0.0, -0.0, -1.0]])
    values, ids, status = ops.topk_logits(logits, 4)
    assert ids.tolist() == [[1, 2, 4, 3], [0, 1, 2, 3]] and status.tolist() == [0, 0]
    assert values.tolist() == [[3, 3, 3, 2], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [2, 77, 3000])
def test_extreme_values(ops, vocab_size, dtype):
    """Subnormals, the largest numbers of the dtype and -inf keep their order."""
    info = torch.finfo(dtype)
    pool = [0.0, info.smallest_normal, info.smallest_normal / 4, info.max, info.min, -info.smallest_normal, -torch.inf]
    at = torch.randint(len(pool), (6, vocab_size), generator=generator(3, vocab_size))
    logits = torch.tensor(pool, dtype=dtype)[at]
    for k in (1, 2, vocab_size // 2, vocab_size):
        compare(ops, logits, k, "extreme")


def test_few_finite_and_broken_rows(ops):
    logits = torch.full((5, 9), -torch.inf)
    logits[0, 4], logits[0, 2] = 1.0, 1.0
    logits[1] = rows("normal", 1, 9, torch.float32)
    logits[1, 8] = torch.nan
    logits[2] = rows("normal", 1, 9, torch.float32)
    logits[2, 0] = torch.inf
    logits[4] = torch.arange(9.0)
    values, ids, status = ops.topk_logits(logits, 3)
    assert status.tolist() == [0, 1, 1, 2, 0]
    assert ids.tolist() == [[2, 4, -1], [-1] * 3, [-1] * 3, [-1] * 3, [8, 7, 6]]
    assert values[0].tolist() == [1.0, 1.0, -torch.inf] and (values[1:4] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(4, 300), (3, 5, 65)])
def test_shapes_views_and_inactive(ops, shape):
    logits = rows("normal", int(np.prod(shape[:-1])), shape[-1], torch.float32).reshape(shape)
    compare(ops, logits, 7)
    want = ops.topk_logits(logits, 7)
    for name, view in views(logits):
        assert_same(tuple(want), tuple(ops.topk_logits(view, 7)), name)
    one = ops.topk_logits(logits[:1].expand(shape), 7)
    assert_same(tuple(o[:1].expand_as(o).contiguous() for o in one), tuple(one), "stride 0")
    active = torch.arange(shape[0]) != 1
    poisoned = logits.clone()
    poisoned[1] = torch.nan
    out = ops.topk_logits(poisoned, 7, active=active)
    for a, b in zip(want, out):
        assert torch.equal(a[active], b[active])
    assert (out.ids[1] == -1).all() and (out.values[1] == -torch.inf).all() and (out.status[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    for kind in ("normal", "ties", "near_tie"):
        logits = rows(kind, 9, 5000, dtype)
        for k in (1, 10, 2500):
            check_rows_independent(lambda k=k, **t: ops.topk_logits(**t, k=k), {"logits": logits})


def test_every_level_equals_the_reference(ops, cpu_level):
    for kind in ROW_KINDS:
        for k in (1, 40, 2500):
            compare(ops, rows(kind, 3, 2500, torch.float32), k, cpu_level)


def test_empty_batch(ops):
    for shape in ((0, 5), (0, 3, 5), (2, 0, 5)):
        values, ids, status = ops.topk_logits(torch.zeros(shape), 2)
        assert values.shape == ids.shape == (*shape[:-1], 2) and status.shape == shape[:-1]


@pytest.mark.parametrize("k", [0, -1, 7, 2**40])
def test_k_outside_the_vocabulary(ops, k):
    with raises(r"^topk_logits: k: expected 1\.\.6, got "):
        ops.topk_logits(torch.zeros(2, 6), k)


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    logits = rows("normal", 6, 33, torch.float32)
    check_op(lambda: ops.topk_logits(logits, 4))
    check_op(lambda: ops.topk_logits(logits.double().reshape(3, 2, 33), 4, active=torch.tensor([True, False, True])))
