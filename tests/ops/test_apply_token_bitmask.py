from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdecode.testing.reference import logits as reference
from support import DTYPES, check_op, generator, raises, rows, same_bits, views

SIZES = (1, 2, 31, 32, 33, 63, 64, 65, 95, 257, 2048, 2049)
INF = float("inf")


def masks(kind: str, *shape: int) -> torch.Tensor:
    """Words: random ones, and the ones with shortcuts of their own."""
    word = torch.randint(-(2**31), 2**31, shape, generator=generator(*shape), dtype=torch.int64).int()
    pick = torch.rand(shape, generator=generator(7, *shape))
    if kind == "runs":
        word = torch.where(pick < 0.4, -1, torch.where(pick < 0.8, 0, word)).int()
    if kind == "few":  # 0 to about 6 ids of a word forbidden
        taken = torch.rand(*shape, 32, generator=generator(8, *shape)) < 0.2 * pick[..., None]
        word = ~(taken.long() << torch.arange(32)).sum(-1).int()
    return word


def bits(mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bool [..., V], by shifts in torch."""
    allowed = (mask[..., None].long() >> torch.arange(32) & 1).bool().flatten(-2)
    return torch.nn.functional.pad(allowed, (0, max(0, vocab_size - allowed.shape[-1])))[..., :vocab_size]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_equals_reference(ops, vocab_size, dtype):
    for kind in ("random", "runs", "few"):
        logits = rows("normal", 5, vocab_size, dtype)
        for words in {0, 1, -(-vocab_size // 32) // 2, -(-vocab_size // 32)}:
            mask = masks(kind, 5, words)
            got = logits.clone()
            assert ops.apply_token_bitmask_(got, mask) is got
            assert same_bits(got, reference.apply_token_bitmask(logits, mask)), (kind, words)
            assert same_bits(got, logits.masked_fill(~bits(mask, vocab_size), -INF))


def test_the_layout_in_full(ops):
    """Ids 0, 31 and 33, written as the grammar engines write them; the sign bit is id 31."""
    logits = torch.arange(40.0)[None]
    ops.apply_token_bitmask_(logits, torch.tensor([[1 - 2**31, 2]], dtype=torch.int32))
    assert [v for v in range(40) if logits[0, v] > -INF] == [0, 31, 33]


def test_rows_of_a_verification(ops):
    logits, mask = rows("normal", 12, 70, torch.float32).reshape(3, 4, 70), masks("runs", 3, 4, 3)
    got = ops.apply_token_bitmask_(logits.clone(), mask)
    assert same_bits(got, reference.apply_token_bitmask(logits, mask))
    shared = mask[:, :1].expand(3, 4, 3)
    got = ops.apply_token_bitmask_(logits.clone(), shared)
    assert same_bits(got, reference.apply_token_bitmask(logits, shared))


def test_indices(ops):
    logits, mask = rows("normal", 6, 70, torch.float32), masks("random", 5, 3)
    for indices in ([4, 0, -1, 2, 6], [0, 1, 2, 3, 4], [2**31 - 1, -(2**31), 5, -1, 3], [3, 3, 3, 0, 0]):
        index = torch.tensor(indices, dtype=torch.int32)
        got = ops.apply_token_bitmask_(logits.clone(), mask, indices=index)
        assert same_bits(got, reference.apply_token_bitmask(logits, mask, indices=index)), indices
        untouched = [b for b in range(6) if b not in indices]
        assert same_bits(got[untouched], logits[untouched])
    none = torch.empty(0, dtype=torch.int32)
    assert same_bits(ops.apply_token_bitmask_(logits.clone(), mask[:0], indices=none), logits)


def test_two_masks_of_one_row_both_hold(ops):
    logits, mask = rows("normal", 2, 4099, torch.float32), masks("random", 2, 129)
    both = ops.apply_token_bitmask_(logits.clone(), mask, indices=torch.tensor([1, 1], dtype=torch.int32))
    one = ops.apply_token_bitmask_(logits[1:].clone(), mask[:1] & mask[1:])
    assert same_bits(both[1:], one) and same_bits(both[0], logits[0])


def test_inactive_rows_are_neither_read_nor_changed(ops):
    logits, mask = rows("normal", 4, 70, torch.float32), masks("random", 4, 3)
    active = torch.tensor([True, False, True, False])
    for index in (None, torch.tensor([3, 2, 1, 0], dtype=torch.int32)):
        got = ops.apply_token_bitmask_(logits.clone(), mask, indices=index, active=active)
        assert same_bits(got, reference.apply_token_bitmask(logits, mask, indices=index, active=active))
        assert same_bits(got[~active], logits[~active])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allowed_values_pass_as_bits(ops, dtype):
    """NaN with a payload, infinities, -0, subnormals: unchanged where allowed, gone where not."""
    size = torch.tensor([], dtype=dtype).element_size()
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    some = torch.randint(-(2**15), 2**15, (3, 333), generator=generator(size)).to(as_int) << (8 * size - 16)
    logits = some.view(dtype)
    mask = masks("random", 3, 11)
    got, allowed = ops.apply_token_bitmask_(logits.clone(), mask), bits(mask, 333)
    assert same_bits(got[allowed], logits[allowed]) and (got[~allowed] == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_nothing_outside(ops, dtype):
    logits, mask = rows("normal", 12, 65, dtype), masks("runs", 12, 3)
    for shape, mask_shape in (((12, 65), (12, 3)), ((3, 4, 65), (3, 4, 3))):
        want = reference.apply_token_bitmask(logits.view(shape), mask.view(mask_shape))
        for name, view in views(mask.view(mask_shape)):
            assert same_bits(ops.apply_token_bitmask_(logits.view(shape).clone(), view), want), name
        for name, view in views(logits.view(shape).clone()):
            # the views' gaps hold NaN; a sum over the whole storage would see a write there
            whole = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
            before = whole.isnan().sum()
            assert same_bits(ops.apply_token_bitmask_(view, mask.view(mask_shape)), want), name
            assert whole.isnan().sum() == before, name


def test_every_level_equals_the_reference(ops, cpu_level):
    for dtype in DTYPES:
        for kind in ("random", "runs", "few"):
            logits, mask = rows("normal", 3, 1003, dtype), masks(kind, 3, 32)
            got = ops.apply_token_bitmask_(logits.clone(), mask)
            assert same_bits(got, reference.apply_token_bitmask(logits, mask)), (cpu_level, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    check_rows_independent(
        lambda logits, bitmask: (ops.apply_token_bitmask_(logits.clone(), bitmask),),
        {"logits": rows("normal", 9, 5000, dtype), "bitmask": masks("runs", 9, 157)},
    )


@given(batch=st.integers(0, 5), vocab_size=st.integers(1, 200), count=st.integers(0, 8), seed=st.integers(0, 2**31))
@settings(max_examples=50)
def test_random_shapes_and_indices(ops, batch, vocab_size, count, seed):
    g = generator(seed)
    logits = torch.randn(batch, vocab_size, generator=g)
    words = int(torch.randint(-(-vocab_size // 32) + 1, (), generator=g))
    mask = torch.randint(-(2**31), 2**31, (count, words), generator=g, dtype=torch.int64).int()
    options = {
        "indices": torch.randint(-1, batch + 1, (count,), generator=g, dtype=torch.int32),
        "active": torch.rand(batch, generator=g) < 0.8,
    }
    got = ops.apply_token_bitmask_(logits.clone(), mask, **options)
    assert same_bits(got, reference.apply_token_bitmask(logits, mask, **options))


def test_empty(ops):
    for shape in ((0, 5), (0, 3, 5), (2, 0, 5)):
        logits = torch.zeros(shape)
        assert ops.apply_token_bitmask_(logits, torch.zeros(*shape[:-1], 1, dtype=torch.int32)) is logits


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    logits, mask = rows("normal", 3, 33, torch.float32), masks("random", 3, 2)
    options = {"indices": torch.tensor([2, -1, 0], dtype=torch.int32), "active": torch.tensor([True, False, True])}
    check_op(lambda: (ops.apply_token_bitmask_(logits.clone(), mask),))
    check_op(lambda: (ops.apply_token_bitmask_(logits.clone(), mask, **options),))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    logits, mask = rows("normal", 3, 33, torch.float32), masks("random", 3, 2)
    check_op(lambda: (ops.apply_token_bitmask_(logits.clone(), mask),), inductor=True)


def test_rows_that_share_memory_are_refused(ops):
    row, mask = torch.zeros(1, 40), torch.zeros(3, 2, dtype=torch.int32)
    with raises(
        r"^apply_token_bitmask_: logits: expected rows that do not overlap, got strides 0 and 0 for \[3, 40\]$"
    ):
        ops.apply_token_bitmask_(row.expand(3, 40), mask)
    flat = torch.zeros(400)
    three = torch.zeros(2, 3, 2, dtype=torch.int32)
    for shape, strides in (((3, 40), (39, 1)), ((2, 3, 40), (100, 40, 1)), ((2, 3, 40), (20, 40, 1))):
        view = flat.as_strided(shape, strides)
        with raises("expected rows that do not overlap"):
            ops.apply_token_bitmask_(view, mask if view.dim() == 2 else three)
    assert not flat.any() and not row.any()
    ops.apply_token_bitmask_(flat.as_strided((2, 3, 40), (40, 80, 1)), three)
    ops.apply_token_bitmask_(flat.as_strided((1, 3, 40), (0, 40, 1)), three[:1])
    assert flat[:240].isneginf().all() and not flat[240:].any()


INT = torch.int32
WRONG = [
    ({"logits": torch.zeros(6)}, "logits: expected 2 to 3 dimensions, got"),
    ({"logits": torch.zeros(3, 6, dtype=torch.int64)}, "logits: expected float64, float32, float16 or bfloat16, got"),
    ({"logits": torch.zeros(3, 0)}, "logits: expected a vocabulary of at least 1"),
    ({"logits": torch.zeros(3, 12)[:, ::2]}, "logits: expected a contiguous last dimension"),
    ({"logits": torch.zeros(3, 2, 6), "indices": torch.zeros(3, dtype=INT)}, "logits: expected 2 dimensions, got"),
    ({"bitmask": torch.zeros(3, 2, dtype=INT)}, r"bitmask: expected at most 1 words per row, got \[3, 2\]"),
    ({"bitmask": torch.zeros(2, 1, dtype=INT)}, r"bitmask: expected \[3, 1\], got \[2, 1\]"),
    ({"bitmask": torch.zeros(3, dtype=INT)}, r"bitmask: expected 2 dimensions, got \[3\]"),
    ({"bitmask": torch.zeros(3, 1, 1, dtype=INT)}, r"bitmask: expected 2 dimensions, got"),
    ({"bitmask": torch.zeros(3, 1, dtype=torch.int64)}, "bitmask: expected int32, got int64"),
    ({"logits": torch.zeros(3, 2, 6)}, r"bitmask: expected 3 dimensions, got \[3, 1\]"),
    (
        {"logits": torch.zeros(3, 2, 6), "bitmask": torch.zeros(3, 1, 1, dtype=INT)},
        r"bitmask: expected \[3, 2, 1\], got",
    ),
    ({"indices": torch.zeros(2, dtype=INT)}, r"indices: expected \[3\], got \[2\]"),
    ({"indices": torch.zeros(3, dtype=torch.int64)}, "indices: expected int32, got int64"),
    ({"active": torch.zeros(2, dtype=torch.bool)}, r"active: expected \[3\], got \[2\]"),
    ({"active": torch.zeros(3)}, "active: expected bool, got float32"),
    ({"bitmask": torch.zeros(3, 1, dtype=INT, device="meta")}, "bitmask: expected cpu, got meta"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[m[:40] for _, m in WRONG])
def test_bad_input_is_named(ops, change, message):
    good = {"logits": torch.zeros(3, 6), "bitmask": torch.zeros(3, 1, dtype=INT)}
    with raises(f"^apply_token_bitmask_: {message}"):
        ops.apply_token_bitmask_(**{**good, **change})
