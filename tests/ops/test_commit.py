from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdecode
from fastdecode.testing.reference import verify as reference
from support import assert_same, check_op, generator, views

I32 = torch.int32


def run(ops, tokens, num_emitted, lengths, finished, **options):
    """The op on copies: (num_committed, reason, lengths, finished)."""
    lengths, finished = lengths.clone(), finished.clone()
    return (*ops.commit(tokens, num_emitted, lengths, finished, **options), lengths, finished)


def test_every_small_case(ops):
    """All emitted counts, room under the cap and places of the stop id, for runs of up to four tokens."""
    cases = list(itertools.product(range(-1, 6), range(-1, 6), itertools.product((7, 1), repeat=4), (False, True)))
    batch = len(cases)
    tokens = torch.tensor([c[2] for c in cases])
    num_emitted = torch.tensor([c[0] for c in cases], dtype=I32)
    lengths = torch.full((batch,), 10, dtype=I32)
    finished = torch.tensor([c[3] for c in cases])
    max_lengths = torch.tensor([10 + c[1] for c in cases], dtype=I32)
    stop_ids = torch.tensor([[7, -1]]).repeat(batch, 1)
    for options in (
        {},
        {"max_lengths": max_lengths},
        {"stop_ids": stop_ids},
        {"max_lengths": max_lengths, "stop_ids": stop_ids},
    ):
        got = run(ops, tokens, num_emitted, lengths, finished, **options)
        want = reference.commit(tokens, num_emitted, lengths, finished, **options)
        for name, g, w in zip(("num_committed", "reason", "lengths", "finished"), got, want):
            wrong = torch.nonzero(g != w)[:, 0]
            assert wrong.numel() == 0, (name, options.keys(), [cases[i] for i in wrong[:5]], g[wrong[:5]], w[wrong[:5]])


@given(batch=st.integers(0, 9), longest=st.integers(0, 12), stops=st.integers(0, 3), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_random_shapes(ops, batch, longest, stops, seed):
    g = generator(seed)
    tokens = torch.randint(6, (batch, longest + 1), generator=g)
    num_emitted = torch.randint(longest + 2, (batch,), generator=g, dtype=I32)
    lengths = torch.randint(100, (batch,), generator=g, dtype=I32)
    finished = torch.rand(batch, generator=g) < 0.3
    options = {
        "max_lengths": lengths + torch.randint(1, longest + 3, (batch,), generator=g, dtype=I32),
        "stop_ids": torch.randint(-1, 6, (batch, stops), generator=g),
    }
    got = run(ops, tokens, num_emitted, lengths, finished, **options)
    assert_same(got, reference.commit(tokens, num_emitted, lengths, finished, **options))
    assert (got[2] == lengths + got[0]).all() and (got[2] <= torch.maximum(options["max_lengths"], lengths)).all()


@pytest.mark.parametrize("slot, committed", [(0, 1), (1, 2), (3, 4), (4, 5)])
def test_stop_at_first_middle_last_and_bonus_slot(ops, slot, committed):
    tokens = torch.tensor([[10, 11, 12, 13, 14]])
    tokens[0, slot] = 2
    out = run(
        ops,
        tokens,
        torch.tensor([5], dtype=I32),
        torch.tensor([20], dtype=I32),
        torch.tensor([False]),
        stop_ids=torch.tensor([[-1, 2]]),
    )
    assert [o.item() for o in out] == [committed, fastdecode.FinishReason.STOP, 20 + committed, True]


def test_stop_wins_over_length_on_the_last_slot_that_fits(ops):
    tokens = torch.tensor([[5, 6, 7]] * 3)
    emitted, lengths = torch.full((3,), 3, dtype=I32), torch.full((3,), 8, dtype=I32)
    out = run(
        ops,
        tokens,
        emitted,
        lengths,
        torch.zeros(3, dtype=torch.bool),
        max_lengths=torch.tensor([10, 10, 99], dtype=I32),
        stop_ids=torch.tensor([[6], [7], [7]]),
    )
    assert out[0].tolist() == [2, 2, 3]
    assert out[1].tolist() == [1, 2, 1]


def test_padding_never_stops(ops):
    """-1 in tokens past num_emitted and -1 in stop_ids must not meet."""
    out = run(
        ops,
        torch.tensor([[4, -1, -1]]),
        torch.tensor([1], dtype=I32),
        torch.tensor([0], dtype=I32),
        torch.tensor([False]),
        stop_ids=torch.tensor([[-1, -1]]),
    )
    assert [o.item() for o in out] == [1, 0, 1, False]


def test_writes_only_lengths_and_finished(ops):
    """Guard words round the two outputs that are changed in place."""
    guarded_lengths, guarded_finished = torch.full((9,), 1234, dtype=I32), torch.ones(9, dtype=torch.bool)
    guarded_finished[::2] = False
    guarded_lengths[3:6], guarded_finished[3:6] = 5, False
    inputs = [torch.arange(12).reshape(3, 4), torch.tensor([4, 2, 0], dtype=I32)]
    options = {"max_lengths": torch.tensor([7, 99, 5], dtype=I32), "stop_ids": torch.tensor([[99], [5], [-1]])}
    before = [t.clone() for t in (*inputs, *options.values())]
    ops.commit(*inputs, guarded_lengths[3:6], guarded_finished[3:6], **options)
    assert_same(tuple(before), (*inputs, *options.values()))
    assert guarded_lengths.tolist() == [1234] * 3 + [7, 7, 5] + [1234] * 3
    assert guarded_finished.tolist() == [False, True, False, True, True, True, False, True, False]


def test_views(ops):
    g = generator(8)
    tokens, stop_ids = torch.randint(4, (6, 5), generator=g), torch.randint(4, (6, 2), generator=g)
    state = (torch.full((6,), 4, dtype=I32), torch.arange(6, dtype=I32), torch.zeros(6, dtype=torch.bool))
    want = run(ops, tokens, *state, stop_ids=stop_ids)
    for name, view in views(tokens):
        assert_same(want, run(ops, view, *state, stop_ids=stop_ids), name)
    for name, view in views(stop_ids):
        assert_same(want, run(ops, tokens, *state, stop_ids=view), name)
    shared = stop_ids[:1].expand(6, 2)
    assert_same(run(ops, tokens, *state, stop_ids=shared.contiguous()), run(ops, tokens, *state, stop_ids=shared), "0")


def test_rows_are_independent(ops, check_rows_independent):
    g = generator(6)
    check_rows_independent(
        lambda **t: run(ops, **t),
        {
            "tokens": torch.randint(9, (300, 5), generator=g),
            "num_emitted": torch.randint(6, (300,), generator=g, dtype=I32),
            "lengths": torch.randint(50, (300,), generator=g, dtype=I32),
            "finished": torch.rand(300, generator=g) < 0.2,
            "max_lengths": torch.randint(20, 60, (300,), generator=g, dtype=I32),
            "stop_ids": torch.randint(-1, 9, (300, 2), generator=g),
        },
    )


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    tokens, emitted = torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 1], dtype=I32)
    state = (torch.tensor([5, 6], dtype=I32), torch.tensor([False, False]))
    options = {"max_lengths": torch.tensor([6, 99], dtype=I32), "stop_ids": torch.tensor([[3], [4]])}
    check_op(lambda: ops.commit(tokens, emitted, state[0].clone(), state[1].clone()))
    check_op(lambda: run(ops, tokens, emitted, *state, **options))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    state = (torch.tensor([5, 6], dtype=I32), torch.tensor([False, False]))
    tokens, emitted = torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 1], dtype=I32)
    check_op(lambda: run(ops, tokens, emitted, *state), inductor=True)
