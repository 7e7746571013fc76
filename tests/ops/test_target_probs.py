from __future__ import annotations

import pytest
import torch

from support import (
    DTYPES,
    ROW_KINDS,
    SIZES,
    assert_same,
    check_op,
    check_target_probs,
    generator,
    raises,
    rows,
    same_bits,
    views,
)


def filter_sets(batch: int, vocab_size: int) -> dict[str, dict]:
    """Per-request parameters, each set with on, off and extreme values next to each other."""

    def tensor(values, dtype):
        return torch.tensor((values * batch)[:batch], dtype=dtype)

    temperature = tensor([0.7, 1.0, 0.0, 1.6, 0.05], torch.float32)
    top_k = tensor([5, 0, 1, vocab_size, 40, -3, 3], torch.int32)
    top_p = tensor([0.9, 1.0, 0.3, 0.97, 0.05], torch.float32)
    min_p = tensor([0.05, 0.0, 0.3, 1.0, -1.0], torch.float32)
    return {
        "none": {},
        "temperature": {"temperature": temperature},
        "top_k": {"top_k": top_k},
        "top_p": {"top_p": top_p},
        "min_p": {"min_p": min_p},
        "k and p": {"top_k": top_k.flip(0), "top_p": top_p},
        "all": {"temperature": temperature, "top_k": top_k, "top_p": top_p.flip(0), "min_p": min_p.roll(1)},
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_equals_reference(ops, vocab_size, dtype):
    skipped = compared = 0
    for kind in ROW_KINDS if vocab_size < 300 else ("normal", "ties", "near_tie"):
        logits = rows(kind, 5, vocab_size, dtype)
        for name, filters in filter_sets(5, vocab_size).items():
            skipped += check_target_probs(ops, logits, f"{kind}, {name}", **filters)
            compared += 5
    assert skipped <= 0.1 * compared  # top-p of 5000 ids ends among weights near 1e-6


def test_bias_and_bans(ops):
    g = generator(1)
    for dtype in DTYPES:
        for vocab_size in (3, 17, 300):
            logits = rows("normal", 4, vocab_size, dtype)
            bias = torch.randn(4, vocab_size, generator=g)
            bias[2, 1] = -torch.inf
            bans = torch.tensor([[0, -1], [-1, -1], [1, 1], [2, 0]])
            for chosen in ({"bias": bias}, {"bias": bias[3]}, {"ban_ids": bans}, {"bias": bias, "ban_ids": bans}):
                check_target_probs(ops, logits, str(chosen.keys()), **chosen)
                check_target_probs(
                    ops,
                    logits,
                    str(chosen.keys()),
                    top_k=torch.full((4,), 2, dtype=torch.int32),
                    temperature=torch.tensor([0.0, 0.5, 1.0, 2.0]),
                    **chosen,
                )


def test_everything_banned(ops):
    probs, status = ops.target_probs(torch.zeros(2, 2), ban_ids=torch.tensor([[0, 1], [1, -1]]))
    assert status.tolist() == [2, 0]
    assert probs.tolist() == [[0, 0], [1, 0]]


def test_min_lengths_hold_below_their_position(ops):
    logits = torch.zeros(2, 3, 4)
    probs, status = ops.target_probs(
        logits,
        ban_ids=torch.tensor([[0, 1], [2, -1]]),
        min_lengths=torch.tensor([[11, 12], [7, 99]]),
        offset=torch.tensor([10, 7]),
    )
    third, half = pytest.approx(1 / 3), 0.5
    assert probs[0].tolist() == [[0, 0, half, half], [third, 0, third, third], [0.25] * 4]
    assert probs[1].tolist() == [[0.25] * 4] * 3  # offset 7 is not below 7
    assert (status == 0).all()
    for n in (1, 4):
        random_logits = rows("normal", 2 * n, 33, torch.float64).reshape(2, n, 33)
        check_target_probs(
            ops,
            random_logits,
            "min_lengths",
            ban_ids=torch.tensor([[0, 1], [2, 5]]),
            min_lengths=torch.tensor([[11, 12], [8, 9]]),
            offset=torch.tensor([10, 7]),
        )


def test_k_then_p_is_not_joint(ops):
    """p = .4 .3 .2 .1: after top-k 2 the first id holds .57, so top-p .5 keeps it alone; jointly two would stay."""
    logits = torch.tensor([[0.1, 0.3, 0.4, 0.2]]).log()
    probs, _ = ops.target_probs(logits, top_k=2, top_p=0.5)
    assert probs.tolist() == [[0, 0, 1, 0]]
    alone, _ = ops.target_probs(logits, top_p=0.5)
    assert (alone[0] > 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("vocab_size", [4, 64, 256, 4096, 6144])
def test_ties_keep_the_lowest_ids(ops, vocab_size):
    """Equal weights sum exactly, so the counts are exact in every dtype; min-p keeps all ties."""
    for dtype in DTYPES:
        flat = torch.full((1, vocab_size), 1.5, dtype=dtype)
        for filters, kept in (
            ({"top_k": 3}, 3),
            ({"top_p": 0.5}, vocab_size // 2),
            ({"top_p": 0.25}, vocab_size // 4),
            ({"min_p": 1.0}, vocab_size),
            ({"temperature": 0.0}, 1),
            ({"top_p": 1e-7}, 1),
            ({"top_p": 0.0}, 1),
            ({"top_k": vocab_size - 1, "min_p": 1.0}, vocab_size - 1),
        ):
            probs, _ = ops.target_probs(flat, **filters)
            assert (probs[0] > 0).sum() == kept, filters
            assert (probs[0, :kept] == probs[0, 0]).all(), filters
        # Ties below a larger id: the threshold value is shared, the lowest of it stay.
        logits = flat.clone()
        logits[0, vocab_size // 2] = 3.0
        probs, _ = ops.target_probs(logits, top_k=3)
        assert torch.nonzero(probs[0])[:, 0].tolist() == [0, 1, vocab_size // 2]


def test_greedy_takes_the_lowest_of_equal_ids(ops):
    logits = torch.tensor([[0.0, 7.0, 7.0, 1.0], [-torch.inf, -3.0, -3.0, -torch.inf]])
    probs, status = ops.target_probs(logits, temperature=0.0)
    assert probs.tolist() == [[0, 1, 0, 0]] * 2
    assert status.tolist() == [0, 0]
    banned, _ = ops.target_probs(logits, temperature=0.0, ban_ids=torch.tensor([[1], [1]]))
    assert banned.tolist() == [[0, 0, 1, 0]] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broken_and_inactive_rows(ops, dtype):
    logits = rows("normal", 5, 77, dtype)
    clean, _ = ops.target_probs(logits, top_p=0.8)
    logits[1, 76], logits[2, 3] = torch.nan, torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    probs, status = ops.target_probs(logits, top_p=0.8, active=torch.tensor([True, True, True, True, False]))
    assert status.tolist() == [0, 1, 1, 2, 0]
    assert (probs[1:] == 0).all()
    assert same_bits(probs[:1], clean[:1])


@pytest.mark.parametrize("shape", [(4, 300), (3, 5, 65)])
def test_views_and_scalars(ops, shape):
    batch = shape[0]
    logits = rows("normal", batch * (shape[1] if len(shape) == 3 else 1), shape[-1], torch.float32).reshape(shape)
    scalars = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    tensors = {
        k: torch.full((batch,), v, dtype=torch.int32 if k == "top_k" else torch.float32) for k, v in scalars.items()
    }
    want = ops.target_probs(logits, **tensors)
    assert_same(want, ops.target_probs(logits, **scalars), "scalars")
    for name, view in views(logits):
        assert_same(want, ops.target_probs(view, **tensors), name)
    wide_bias = torch.full((batch, shape[-1] + 4), torch.nan)
    wide_bias[:, 2:-2] = torch.randn(batch, shape[-1], generator=generator(5))
    bias = wide_bias[:, 2:-2]
    assert_same(ops.target_probs(logits, bias=bias.contiguous()), ops.target_probs(logits, bias=bias), "bias view")
    one = ops.target_probs(logits, bias=bias[0].contiguous())
    assert_same(one, ops.target_probs(logits, bias=bias[:1].expand(batch, -1)), "bias stride 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    for name, filters in filter_sets(9, 5000).items():
        out = check_rows_independent(ops.target_probs, {"logits": rows("normal", 9, 5000, dtype), **filters})
        assert (out[1] == 0).all(), name


def test_every_level_equals_the_reference(ops, cpu_level):
    logits = rows("normal", 5, 2500, torch.float32)
    for name, filters in filter_sets(5, 2500).items():
        check_target_probs(ops, logits, f"{cpu_level}, {name}", **filters)


def test_empty_batch(ops):
    for shape in ((0, 5), (0, 3, 5), (2, 0, 5)):
        probs, status = ops.target_probs(torch.zeros(shape), top_k=3)
        assert probs.shape == shape and status.shape == shape[:-1]


def test_offset_needs_min_lengths(ops):
    with raises("target_probs: offset"):
        ops.target_probs(torch.zeros(1, 4), offset=torch.tensor([3]))


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    logits = rows("normal", 3, 33, torch.float32)
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
    check_op(lambda: ops.target_probs(logits))
    check_op(lambda: ops.target_probs(logits.double()[:, None].expand(3, 2, 33), **everything))
    check_op(lambda: ops.target_probs(logits, temperature=0.5, top_k=3))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    logits = rows("normal", 3, 33, torch.float32)
    check_op(lambda: ops.target_probs(logits, top_p=torch.full((3,), 0.9)), inductor=True)
