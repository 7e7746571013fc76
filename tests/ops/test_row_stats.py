from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdecode.testing.reference import sample as reference
from support import (
    DTYPES,
    ROW_KINDS,
    SIZES,
    assert_as_good_as_torch,
    assert_same,
    check_op,
    compute_dtype,
    rows,
    same_bits,
    views,
)


def expected(logits: torch.Tensor) -> list[np.ndarray]:
    stats = [reference.row_stats(row) for row in reference.numpy_row(logits).reshape(-1, logits.shape[-1])]
    return [
        np.array([getattr(s, name) for s in stats]).reshape(logits.shape[:-1])
        for name in ("max", "argmax", "second", "logsumexp", "entropy", "status")
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_equals_reference(ops, vocab_size, dtype):
    for kind in ROW_KINDS:
        logits = rows(kind, 6, vocab_size, dtype)
        largest, argmax, second, logsumexp, entropy, status = ops.row_stats(logits)
        want = expected(logits)
        work = logits.to(compute_dtype(dtype))
        assert argmax.dtype == torch.int64 and status.dtype == torch.int32
        np.testing.assert_array_equal(argmax.numpy(), want[1], err_msg=kind)
        np.testing.assert_array_equal(status.numpy(), 0, err_msg=kind)
        for got, exact in ((largest, want[0]), (second, want[2])):
            assert got.dtype == work.dtype
            np.testing.assert_array_equal(got.double().numpy(), exact.astype(np.float64), err_msg=kind)
        assert_as_good_as_torch(logsumexp, want[3], torch.logsumexp(work, -1), kind)
        probs, logprobs = torch.softmax(work, -1), torch.log_softmax(work, -1)
        plain = -(probs * logprobs.masked_fill(probs == 0, 0)).sum(-1)
        assert_as_good_as_torch(entropy, want[4], plain, kind)


def test_second_counts_multiplicity(ops):
    logits = torch.tensor([[1.0, 5.0, 2.0, 5.0], [5.0, 1.0, 2.0, 4.0], [-torch.inf, -torch.inf, 3.0, -torch.inf]])
    largest, argmax, second, *_ = ops.row_stats(logits)
    assert largest.tolist() == [5, 5, 3]
    assert argmax.tolist() == [1, 0, 2]
    assert second.tolist() == [5, 4, -torch.inf]


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 257, 2049])
def test_position_of_the_largest(ops, vocab_size):
    """The winner and the runner-up in every lane, tail and tile."""
    at = torch.arange(vocab_size)
    logits = torch.zeros(vocab_size, vocab_size).scatter(1, at[:, None], 2.0)
    second_at = (at + 1) % vocab_size
    if vocab_size > 1:
        logits = logits.scatter(1, second_at[:, None], 1.0)
    largest, argmax, second, *_ = ops.row_stats(logits)
    assert torch.equal(argmax, at)
    assert (largest == 2).all()
    assert (second == (1 if vocab_size > 1 else -torch.inf)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 17, 257, 2049])
def test_broken_rows(ops, vocab_size, dtype):
    positions = sorted({0, vocab_size // 2, vocab_size - 1})
    broken = [(torch.nan, 1), (torch.inf, 1)]
    for position in positions:
        for value, code in broken:
            for kind in ("normal", "one_finite"):
                logits = rows(kind, 3, vocab_size, dtype)
                logits[1, position] = value
                out = ops.row_stats(logits)
                assert out[5].tolist() == [0, code, 0]
                assert out[1][1] == -1
                assert all(o[1] == 0 for i, o in enumerate(out) if i not in (1, 5))
    logits = rows("normal", 3, vocab_size, dtype)
    logits[1] = -torch.inf
    out = ops.row_stats(logits)
    assert out[5].tolist() == [0, 2, 0] and out[1][1] == -1
    assert all(o[1] == 0 for i, o in enumerate(out) if i not in (1, 5))


def test_inactive_rows_are_not_read(ops):
    logits = rows("normal", 4, 300, torch.float32)
    clean = ops.row_stats(logits)
    active = torch.tensor([True, False, True, False])
    poisoned = logits.clone()
    poisoned[~active] = torch.nan
    out = ops.row_stats(poisoned, active=active)
    for i, (a, b) in enumerate(zip(clean, out)):
        assert same_bits(a[active], b[active])
        assert (b[~active] == (-1 if i == 1 else 0)).all()


@pytest.mark.parametrize("shape", [(4, 300), (3, 5, 65)])
def test_views(ops, shape):
    logits = rows("normal", shape[0] * (shape[1] if len(shape) == 3 else 1), shape[-1], torch.float32).reshape(shape)
    want = ops.row_stats(logits)
    assert want[0].shape == shape[:-1]
    for name, view in views(logits):
        assert_same(want, ops.row_stats(view), name)
    repeated = ops.row_stats(logits[:1].expand(7, *shape[1:]))
    assert_same(tuple(w[:1].expand(7, *shape[1:-1]).contiguous() for w in want), repeated, "stride 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    for kind in ("normal", "masked"):
        check_rows_independent(ops.row_stats, {"logits": rows(kind, 9, 5000, dtype)})


def test_every_level_equals_the_reference(ops, cpu_level):
    logits = rows("normal", 4, 4099, torch.float32)
    want = expected(logits)
    out = ops.row_stats(logits)
    np.testing.assert_array_equal(out[1].numpy(), want[1])
    assert_as_good_as_torch(out[3], want[3], torch.logsumexp(logits, -1), cpu_level)


def test_empty_batch(ops):
    for shape in ((0, 5), (0, 3, 5), (2, 0, 5)):
        assert all(o.shape == shape[:-1] for o in ops.row_stats(torch.zeros(shape)))


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    logits = rows("normal", 3, 33, torch.float32)
    active = torch.tensor([True, False, True])
    check_op(lambda: ops.row_stats(logits))
    check_op(lambda: ops.row_stats(logits.double()[:, None].expand(3, 2, 33), active=active))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    logits = rows("normal", 3, 33, torch.float32)
    check_op(lambda: ops.row_stats(logits), inductor=True)
