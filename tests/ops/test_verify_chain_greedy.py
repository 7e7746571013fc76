from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdecode.testing.reference import verify as reference
from support import assert_same, check_op, generator, views


def compare(got, want: reference.Verified) -> None:
    assert [o.dtype for o in got] == [torch.int64, torch.int32, torch.int32, torch.int32]
    for name in ("tokens", "num_accepted", "num_emitted", "status"):
        np.testing.assert_array_equal(getattr(got, name).numpy(), getattr(want, name), err_msg=name)


@pytest.mark.parametrize("longest", [0, 1, 2, 3])
def test_every_small_case(ops, longest):
    """All drafts, targets over two tokens and all lengths, -1 .. K + 1 included."""
    cases = list(
        itertools.product(
            itertools.product((0, 1), repeat=longest),
            itertools.product((0, 1), repeat=longest + 1),
            range(-1, longest + 2),
        )
    )
    draft = torch.tensor([c[0] for c in cases], dtype=torch.int64).reshape(len(cases), longest)
    target = torch.tensor([c[1] for c in cases])
    lens = torch.tensor([c[2] for c in cases], dtype=torch.int32)
    compare(ops.verify_chain_greedy(draft, target, lens), reference.verify_chain_greedy(draft, target, lens))
    compare(ops.verify_chain_greedy(draft, target), reference.verify_chain_greedy(draft, target))


@given(batch=st.integers(0, 9), longest=st.integers(0, 40), vocab_size=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_random_shapes(ops, batch, longest, vocab_size, seed):
    g = generator(seed)
    draft = torch.randint(vocab_size, (batch, longest), generator=g)
    target = torch.randint(vocab_size, (batch, longest + 1), generator=g)
    lens = torch.randint(longest + 1, (batch,), generator=g, dtype=torch.int32)
    active = torch.rand(batch, generator=g) < 0.7
    got = ops.verify_chain_greedy(draft, target, lens, active=active)
    compare(got, reference.verify_chain_greedy(draft, target, lens, active=active))
    for b in range(batch):  # the accepted prefix is a prefix of the draft
        n = int(got.num_accepted[b])
        assert got.tokens[b, :n].tolist() == draft[b, :n].tolist()


def test_bad_lengths_emit_nothing(ops):
    draft, target = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64)
    extreme = torch.tensor([-1, 4, 2**31 - 1, -(2**31)], dtype=torch.int32)
    out = ops.verify_chain_greedy(draft, target, extreme)
    assert out.status.tolist() == [32] * 4
    assert (out.tokens == -1).all() and (out.num_accepted == 0).all() and (out.num_emitted == 0).all()


def test_slots_past_the_length_do_not_matter(ops):
    draft, target = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 9, 9, 9]])
    for junk in (-1, 7, 2**62):
        changed, changed_target = draft.clone(), target.clone()
        changed[:, 2:], changed_target[:, 3:] = junk, junk
        out = ops.verify_chain_greedy(changed, changed_target, torch.tensor([2], dtype=torch.int32))
        assert out.tokens.tolist() == [[5, 6, 9, -1, -1]] and out.num_emitted.tolist() == [3]


def test_views(ops):
    g = generator(4)
    draft, target = torch.randint(2, (6, 5), generator=g), torch.randint(2, (6, 6), generator=g)
    want = ops.verify_chain_greedy(draft, target)
    for name, view in views(draft):
        assert_same(want, ops.verify_chain_greedy(view, target), name)
    for name, view in views(target):
        assert_same(want, ops.verify_chain_greedy(draft, view), name)
    one = ops.verify_chain_greedy(draft[:1].expand(6, 5), target[:1].expand(6, 6))
    assert_same(tuple(o[:1].repeat(6, *[1] * (o.dim() - 1)) for o in want), one, "stride 0")


def test_rows_are_independent(ops, check_rows_independent):
    g = generator(5)
    check_rows_independent(
        ops.verify_chain_greedy,
        {
            "draft_tokens": torch.randint(2, (300, 9), generator=g),
            "target_ids": torch.randint(2, (300, 10), generator=g),
            "draft_lens": torch.randint(10, (300,), generator=g, dtype=torch.int32),
            "active": torch.rand(300, generator=g) < 0.8,
        },
    )


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    draft, target = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2, 3], [4, 4, 4]])
    lens, active = torch.tensor([2, 1], dtype=torch.int32), torch.tensor([True, False])
    check_op(lambda: ops.verify_chain_greedy(draft, target))
    check_op(lambda: ops.verify_chain_greedy(draft, target, lens, active=active))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    draft, target = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2, 3], [4, 4, 4]])
    check_op(lambda: ops.verify_chain_greedy(draft, target), inductor=True)
