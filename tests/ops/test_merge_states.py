from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdecode.testing.reference import attention as reference
from support import DTYPES, assert_as_good_as_torch, check_op, generator, raises, same_bits

F64 = torch.float64


def states(count: int, rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[list, list]:
    """Random states, a fifth of them empty."""
    g = generator(seed, count, rows, heads, head_dim)
    lses = 5 * torch.randn(count, rows, heads, generator=g, dtype=F64)
    outs = torch.randn(count, rows, heads, head_dim, generator=g, dtype=F64)
    empty = torch.rand(lses.shape, generator=g) < 0.2
    lses[empty], outs[empty] = -torch.inf, 0
    return list(outs.to(dtype)), list(lses.to(F64 if dtype == F64 else torch.float32))


def plain(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The PyTorch expression in the dtype of the outputs."""
    logs = torch.stack(lses)
    lse = torch.logsumexp(logs, 0)
    weights = torch.softmax(logs, 0).nan_to_num().to(outs[0].dtype)
    return (weights[..., None] * torch.stack(outs)).sum(0), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_equals_reference(ops, count, dtype):
    for rows, heads, head_dim in ((1, 1, 1), (7, 3, 17), (65, 4, 64), (3, 2, 257)):
        outs, lses = states(count, rows, heads, head_dim, dtype)
        out, lse = ops.merge_states(outs, lses)
        want, want_lse = reference.merge_states(outs, lses)
        plain_out, plain_lse = plain(outs, lses)
        assert_as_good_as_torch(out, want, plain_out, f"{rows} {heads} {head_dim}")
        assert_as_good_as_torch(lse, want_lse, plain_lse, "lse")


def attention(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One pass; of no keys (0, -inf)."""
    out = torch.softmax(scores, -1).nan_to_num() @ values
    return out, torch.logsumexp(scores, -1)


def test_any_partition_in_any_order_is_one_pass(ops):
    g = generator(3)
    scores, values = 4 * torch.randn(5, 40, generator=g, dtype=F64), torch.randn(40, 8, generator=g, dtype=F64)
    want_out, want_lse = attention(scores, values)
    for parts in (1, 2, 5, 11):
        owner = torch.randint(parts, (40,), generator=g)
        owner[owner == 1] = 0  # an empty part
        pieces = [attention(scores[:, owner == p], values[owner == p]) for p in range(parts)]
        for turn in range(3):
            order = torch.randperm(parts, generator=generator(turn, parts)).tolist()
            out, lse = ops.merge_states([pieces[p][0][:, None] for p in order], [pieces[p][1][:, None] for p in order])
            torch.testing.assert_close(out[:, 0], want_out, rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(lse[:, 0], want_lse, rtol=1e-13, atol=1e-14)
        pair = pieces[0][0][:, None], pieces[0][1][:, None]
        for piece in pieces[1:]:  # step by step
            pair = ops.merge_states([pair[0], piece[0][:, None]], [pair[1], piece[1][:, None]])
        torch.testing.assert_close(pair[0][:, 0], want_out, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_states_change_no_bit(ops, dtype):
    outs, lses = states(1, 9, 2, 33, dtype)
    nothing, never = torch.full_like(outs[0], torch.nan), torch.full_like(lses[0], -torch.inf)
    alone = ops.merge_states(outs, lses)
    for order in itertools.permutations(range(3)):
        triple = [(outs[0], lses[0]), (nothing, never), (nothing, never)]
        out, lse = ops.merge_states([triple[i][0] for i in order], [triple[i][1] for i in order])
        assert same_bits(out, alone[0]) and same_bits(lse, alone[1])
    out, lse = ops.merge_states([nothing, nothing], [never, never])
    assert (out == 0).all() and torch.isneginf(lse).all()


def test_an_attention_sink_is_a_state(ops):
    g = generator(4)
    scores, values = torch.randn(3, 12, generator=g, dtype=F64), torch.randn(12, 16, generator=g, dtype=F64)
    sink = torch.tensor([0.0, 2.0, -3.0], dtype=F64)
    out, lse = attention(scores, values)
    merged = ops.merge_states([out[:, None], torch.zeros(3, 1, 16, dtype=F64)], [lse[:, None], sink[:, None]])
    weights = torch.softmax(torch.cat((scores, sink[:, None]), 1), -1)
    torch.testing.assert_close(merged.out[:, 0], weights[:, :-1] @ values, rtol=1e-13, atol=1e-14)


def test_large_logits_do_not_overflow(ops):
    for dtype in (F64, torch.float32):
        big = torch.tensor([[1e30], [-1e30], [700.0]], dtype=dtype)
        ones = torch.ones(3, 1, 4, dtype=dtype)
        out, lse = ops.merge_states([ones, 3 * ones], [big, big])
        torch.testing.assert_close(out, 2 * ones)
        assert torch.isfinite(lse).all()
        out, lse = ops.merge_states([ones, 3 * ones], [big, -big])
        assert out[:, 0, 0].tolist() == [1.0, 3.0, 1.0] and torch.equal(lse, big.abs())


def test_nan_is_kept_where_it_is(ops):
    outs, lses = states(2, 6, 1, 8, torch.float32, seed=5)
    lses[0][:], lses[1][:] = 0.5, 1.0
    lses[0][2], outs[1][4] = torch.nan, torch.nan
    out, lse = ops.merge_states(outs, lses)
    assert torch.isnan(out[2]).all() and torch.isnan(lse[2]).all() and torch.isnan(out[4]).all()
    fine = [0, 1, 3, 5]
    assert torch.isfinite(out[fine]).all() and torch.isfinite(lse[[*fine, 4]]).all()


def test_rows_are_independent(ops, check_rows_independent):
    outs, lses = states(3, 400, 2, 65, torch.bfloat16)

    def call(a: Tensor, b: Tensor, c: Tensor, la: Tensor, lb: Tensor, lc: Tensor) -> tuple:
        return tuple(ops.merge_states([a, b, c], [la, lb, lc]))

    check_rows_independent(call, dict(zip(("a", "b", "c", "la", "lb", "lc"), [*outs, *lses], strict=True)))


def test_no_rows(ops):
    for shape in ((0, 3, 16), (4, 0, 16), (4, 3, 0)):
        out, lse = ops.merge_states([torch.zeros(shape)], [torch.zeros(shape[:2])])
        assert out.shape == shape and lse.shape == shape[:2]


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    outs, lses = states(3, 4, 2, 16, torch.float32)
    check_op(lambda: tuple(ops.merge_states(outs, lses)))


def test_messages(ops):
    outs, lses = states(2, 4, 2, 16, torch.float32)

    def wrong(message: str, outs: list = outs, lses: list = lses) -> None:
        with raises(f"^merge_states: {message}"):
            ops.merge_states(outs, lses)

    wrong("lses: expected 2 states, got 1", lses=lses[:1])
    wrong("outs: expected 1 to 16 states, got 17", outs=[outs[0]] * 17, lses=[lses[0]] * 17)
    wrong(r"outs: expected 3 dimensions, got \[4, 2\]", outs=lses)
    wrong(r"outs: expected \[4, 2, 16\], got \[3, 2, 16\]", outs=[outs[0], outs[1][:3]])
    wrong("outs: expected float32, got float64", outs=[outs[0], outs[1].double()])
    wrong(r"lses: expected \[4, 2\], got \[4, 1\]", lses=[lses[0], lses[1][:, :1].contiguous()])
    wrong("lses: expected float32, got float64", lses=[lses[0], lses[1].double()])
    wrong("outs: expected contiguous tensors", outs=[outs[0], outs[1].transpose(0, 1).contiguous().transpose(0, 1)])
    assert np.isfinite(ops.merge_states(outs, lses).out).all()
