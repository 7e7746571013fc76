from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdecode.testing.reference import sample as reference
from support import (
    DTYPES,
    SIZES,
    assert_as_good_as_torch,
    assert_same,
    check_op,
    compute_dtype,
    generator,
    raises,
    rows,
    same_bits,
    views,
)

FILTERS = {
    "temperature": {"temperature": torch.tensor([0.7, 1.0, 0.0, 2.0, 0.1])},
    "top_k": {"top_k": torch.tensor([3, 1, 0, 2, 50], dtype=torch.int32)},
    "all": {
        "temperature": torch.full((5,), 1.3),
        "top_k": torch.full((5,), 40, dtype=torch.int32),
        "top_p": torch.tensor([0.9, 0.5, 1.0, 0.8, 0.2]),
        "min_p": torch.tensor([0.0, 0.01, 0.1, 0.0, 0.0]),
    },
}


def random_tokens(vocab_size: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    tokens = torch.randint(vocab_size, shape, generator=generator(7, seed))
    tokens.view(-1)[0], tokens.view(-1)[-1] = 0, vocab_size - 1
    return tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_unfiltered_equals_log_softmax(ops, vocab_size, dtype):
    for kind in ("normal", "ties", "flat", "masked", "spread"):
        logits = rows(kind, 5, vocab_size, dtype)
        tokens = random_tokens(vocab_size, (5,), vocab_size)
        top = min(vocab_size, 5)
        logprobs, top_ids, top_logprobs, status = ops.token_logprobs(logits, tokens, top=top)
        want, want_ids, want_top, want_status, _ = reference.token_logprobs(logits, tokens, top=top)
        np.testing.assert_array_equal(status.numpy(), want_status)
        np.testing.assert_array_equal(top_ids.numpy(), want_ids, err_msg=kind)
        plain = torch.log_softmax(logits.to(compute_dtype(dtype)), -1)
        chosen = plain.gather(1, tokens[:, None])[:, 0]
        assert_as_good_as_torch(logprobs, want, chosen, kind)
        plain_top = plain.gather(1, top_ids.clamp(min=0)).masked_fill(top_ids < 0, -torch.inf)
        assert_as_good_as_torch(top_logprobs, want_top, plain_top, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 257, 2049])
def test_filtered_equals_reference(ops, vocab_size, dtype):
    skipped = 0
    for kind in ("normal", "ties", "masked"):
        logits = rows(kind, 5, vocab_size, dtype)
        best = logits.float().argmax(1)
        for name, filters in FILTERS.items():
            for tokens in (random_tokens(vocab_size, (5,), vocab_size), best):
                got = ops.token_logprobs(logits, tokens, filtered=True, top=7 if vocab_size > 7 else 1, **filters)
                *want, margin = reference.token_logprobs(
                    logits, tokens, filtered=True, top=7 if vocab_size > 7 else 1, **filters
                )
                clear = torch.from_numpy(margin > 1e-5)
                skipped += int((~clear).sum())
                rows_clear = clear.numpy()
                np.testing.assert_array_equal(got[3].numpy(), want[3])
                np.testing.assert_array_equal(got[1][clear].numpy(), want[1][rows_clear], err_msg=f"{kind} {name}")
                probs, _, _ = reference.target_probs(logits, **filters)
                temperature = filters.get("temperature", torch.ones(5))
                work = logits.to(compute_dtype(dtype)) / torch.where(temperature > 0, temperature, 1)[:, None]
                plain = torch.log_softmax(work.masked_fill(torch.from_numpy(probs <= 0), -torch.inf), -1)
                for value, exact, at in (
                    (got[0][:, None], want[0][:, None], tokens[:, None]),
                    (got[2], want[2], got[1]),
                ):
                    expression = plain.gather(1, at.clamp(min=0)).masked_fill(at < 0, -torch.inf)
                    expression[exact == 0] = 0  # one kept id
                    assert_as_good_as_torch(value[clear], exact[rows_clear], expression[clear], f"{kind} {name}")
    assert skipped <= 4


def test_top_ids_stop_at_what_is_kept(ops):
    logits = torch.tensor([[1.0, 4.0, 3.0, 4.0]])
    logprobs, ids, values, status = ops.token_logprobs(logits, torch.tensor([0]), filtered=True, top=4, top_k=2)
    assert ids.tolist() == [[1, 3, -1, -1]]
    assert values[0, 2:].tolist() == [-torch.inf] * 2 and logprobs.tolist() == [-torch.inf] and status.tolist() == [0]
    half = pytest.approx(np.log(0.5))
    assert values[0, :2].tolist() == [half, half]


def test_padding_and_foreign_tokens(ops):
    logits = rows("normal", 2, 9, torch.float32).repeat(2, 1)[:, None].expand(4, 3, 9)
    tokens = torch.tensor([[0, -1, 8], [-1, -1, -1], [9, 3, -2], [2**40, -(2**62), 1]])
    logprobs, ids, _, status = ops.token_logprobs(logits, tokens, top=2)
    assert status.tolist() == [[0, 0, 0], [0, 0, 0], [4, 0, 4], [4, 4, 0]]
    assert (logprobs == 0).tolist() == [[False, True, False], [True] * 3, [False] * 3, [False] * 3]
    assert (logprobs == -torch.inf).tolist() == [[False] * 3, [False] * 3, [True, False, True], [True, True, False]]
    assert (ids[:, :1] >= 0).all()
    assert ops.token_logprobs(logits, tokens)[1].shape == (4, 3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broken_and_inactive_rows(ops, dtype):
    logits = rows("normal", 5, 77, dtype)
    tokens = torch.tensor([5, 5, 5, 5, 5])
    clean = ops.token_logprobs(logits, tokens, top=3)
    logits[1, 76], logits[2, 3] = torch.nan, torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    out = ops.token_logprobs(logits, tokens, top=3, active=torch.tensor([True, True, True, True, False]))
    assert out[3].tolist() == [0, 1, 1, 2, 0]
    assert (out[0][1:] == 0).all() and (out[1][1:] == -1).all()
    for a, b in zip(clean, out):
        assert same_bits(a[:1], b[:1])


def test_bans_and_positions(ops):
    logits = torch.zeros(1, 2, 4)
    out = ops.token_logprobs(
        logits,
        torch.tensor([[1, 1]]),
        filtered=True,
        top=4,
        ban_ids=torch.tensor([[1]]),
        min_lengths=torch.tensor([[6]]),
        offset=torch.tensor([5]),
    )
    assert out[0][0, 0] == -torch.inf and out[0][0, 1].item() == pytest.approx(np.log(0.25))
    assert out[1].tolist() == [[[0, 2, 3, -1], [0, 1, 2, 3]]]


def test_views(ops):
    logits = rows("normal", 12, 65, torch.float32).reshape(4, 3, 65)
    tokens = random_tokens(65, (4, 3), 1)
    want = ops.token_logprobs(logits, tokens, top=2)
    for name, view in views(logits):
        assert_same(want, ops.token_logprobs(view, tokens, top=2), name)
    for name, view in views(tokens):
        assert_same(want, ops.token_logprobs(logits, view, top=2), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    inputs = {"logits": rows("normal", 9, 5000, dtype), "tokens": random_tokens(5000, (9,), 3)}
    check_rows_independent(lambda **t: ops.token_logprobs(**t, top=5), inputs)
    filters = {"filtered": True, "top_p": 0.7, "temperature": 0.6}
    check_rows_independent(lambda **t: ops.token_logprobs(**t, top=5, **filters), inputs)


def test_filters_need_filtered(ops):
    for wrong in ({"temperature": 0.5}, {"top_k": 3}, {"ban_ids": torch.tensor([[1]])}, {"bias": torch.zeros(4)}):
        with raises("^token_logprobs: "):
            ops.token_logprobs(torch.zeros(1, 4), torch.tensor([0]), **wrong)


def test_empty_batch(ops):
    out = ops.token_logprobs(torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64), top=2)
    assert [tuple(o.shape) for o in out] == [(0, 3), (0, 3, 2), (0, 3, 2), (0, 3)]


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    logits = rows("normal", 3, 33, torch.float32)
    tokens = torch.tensor([3, -1, 32])
    everything = {
        "temperature": torch.ones(3),
        "top_k": torch.full((3,), 4, dtype=torch.int32),
        "top_p": torch.full((3,), 0.9),
        "min_p": torch.full((3,), 0.01),
        "bias": torch.zeros(3, 33),
        "ban_ids": torch.tensor([[1, -1]] * 3),
        "min_lengths": torch.full((3, 2), 9),
        "offset": torch.arange(3),
        "active": torch.tensor([True, False, True]),
    }
    check_op(lambda: ops.token_logprobs(logits, tokens))
    check_op(
        lambda: ops.token_logprobs(
            logits.double()[:, None].expand(3, 2, 33), tokens[:, None].repeat(1, 2), filtered=True, top=3, **everything
        )
    )


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    logits, tokens = rows("normal", 3, 33, torch.float32), torch.tensor([3, -1, 32])
    check_op(lambda: ops.token_logprobs(logits, tokens, top=2), inductor=True)
