from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdecode
from fastdecode.testing.reference import logits as reference
from support import DTYPES, assert_same, check_op, compute_dtype, generator, raises, rows, same_bits, views

I32, F32 = torch.int32, torch.float32
SIZES = (1, 2, 7, 17, 64, 257, 2049)
PENALTIES = ("repetition", "presence", "frequency")
INF, NAN = float("inf"), float("nan")


def inputs(batch: int, num_rows: int, vocab_size: int, length: int, dtype: torch.dtype, seed: int = 0) -> dict:
    """Logits [batch, num_rows, vocab_size] and everything else the op takes, as tensors with the batch first."""
    g = generator(batch, num_rows, vocab_size, length, seed)
    lengths = torch.randint(length + 1, (batch,), generator=g, dtype=I32)
    logits = rows("masked" if seed % 2 else "normal", batch * num_rows, vocab_size, dtype, seed)
    return {
        "logits": logits.reshape(batch, num_rows, vocab_size),
        "tokens": torch.randint(-1, vocab_size + 1, (batch, length), generator=g),  # a few outside the vocabulary
        "lengths": lengths,
        "prompt_lengths": (lengths * torch.rand(batch, generator=g)).to(I32),
        "draft_tokens": torch.randint(-1, vocab_size + 1, (batch, num_rows - 1), generator=g),
        "repetition": 0.5 + torch.rand(batch, generator=g),
        "presence": torch.randn(batch, generator=g),
        "frequency": torch.randn(batch, generator=g),
    }


def check(got: tuple, want: tuple, what: str = "") -> None:
    assert_same(tuple(got), want, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_equals_reference(ops, vocab_size, dtype):
    for num_rows, length, seed in ((1, 0, 0), (1, 13, 1), (4, 13, 2), (5, 1, 3), (3, 300, 4)):
        given = inputs(5, num_rows, vocab_size, length, dtype, seed)
        got = ops.penalize(**given)
        assert got.logits.dtype == compute_dtype(dtype) and got.status.dtype == I32
        check(got, reference.penalize(**given), f"{num_rows} {length}")


def test_each_argument_alone(ops):
    """Every subset of the optional arguments, and two dimensions."""
    given = inputs(6, 3, 40, 30, F32)
    optional = ("prompt_lengths", "draft_tokens", *PENALTIES)
    for bits in range(2 ** len(optional)):
        chosen = {k: v for k, v in given.items() if k not in optional or bits >> optional.index(k) & 1}
        check(ops.penalize(**chosen), reference.penalize(**chosen), str(list(chosen)))
        chosen["logits"] = given["logits"][:, 0]
        chosen.pop("draft_tokens", None)
        got = ops.penalize(**chosen)
        assert got.logits.shape == (6, 40)
        check(got, reference.penalize(**chosen), str(list(chosen)))
    plain = {k: given[k] for k in ("logits", "tokens", "lengths")}
    assert same_bits(ops.penalize(**plain).logits, given["logits"])


def test_by_hand(ops):
    """Prompt 0 1, output 1 2 2, then drafts 3 and 2; repetition 2, frequency 0.25, presence 1."""
    logits = torch.tensor([4.0, 4.0, -4.0, 4.0, 4.0]).expand(1, 3, 5)
    got = ops.penalize(
        logits,
        torch.tensor([[0, 1, 1, 2, 2, 4]]),
        torch.tensor([5], dtype=I32),
        prompt_lengths=2,
        draft_tokens=torch.tensor([[3, 2]]),
        repetition=2.0,
        presence=1.0,
        frequency=0.25,
    )
    assert got.status.tolist() == [0]
    assert got.logits[0].tolist() == [
        [2.0, 0.75, -9.5, 4.0, 4.0],
        [2.0, 0.75, -9.5, 0.75, 4.0],
        [2.0, 0.75, -9.75, 0.75, 4.0],
    ]


def test_a_row_is_the_one_of_plain_decoding(ops):
    """Row i with i drafts, and one row after these drafts were emitted: the same bits."""
    given = inputs(4, 5, 30, 20, F32, seed=2)
    got = ops.penalize(**given)
    for i in range(5):
        tokens, lengths = torch.full((4, 25), 7), given["lengths"] + i
        for b, length in enumerate(given["lengths"].tolist()):
            tokens[b, :length] = given["tokens"][b, :length]
            tokens[b, length : length + i] = given["draft_tokens"][b, :i]
        others = {k: given[k] for k in ("prompt_lengths", *PENALTIES)}
        alone = ops.penalize(given["logits"][:, i], tokens, lengths, **others)
        assert same_bits(alone.logits, got.logits[:, i].contiguous())


def test_equals_transformers(ops):
    process = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor
    g = generator(4)
    logits, tokens = torch.randn(5, 100, generator=g), torch.randint(100, (5, 40), generator=g)
    for penalty in (1.3, 0.7):
        got = ops.penalize(logits, tokens, torch.full((5,), 40, dtype=I32), repetition=penalty)
        assert torch.equal(got.logits, process(penalty)(tokens, logits.clone()))


def test_off_is_off(ops):
    given = inputs(3, 2, 50, 40, torch.bfloat16)
    for repetition in (1.0, 0.0, -2.0, -INF):
        got = ops.penalize(**{**given, "repetition": repetition, "presence": 0.0, "frequency": 0.0})
        assert same_bits(got.logits, given["logits"].float()), repetition


def test_requests_with_and_without_penalties(ops):
    given = inputs(6, 3, 50, 40, F32)
    off = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    for name in PENALTIES:
        given[name][::2] = off[name]
    got = ops.penalize(**given)
    check(got, reference.penalize(**given))
    assert same_bits(got.logits[::2], given["logits"][::2].contiguous())


@pytest.mark.parametrize("value", [INF, -INF, NAN, 3e38])
def test_parameters_out_of_this_world(ops, value):
    """Taken as given where they are no switch; what is forbidden stays forbidden."""
    given = inputs(3, 1, 20, 30, F32)
    given["lengths"][:] = 30
    given["logits"][:, :, ::2] = -INF
    for name in PENALTIES:
        got = ops.penalize(**{k: v for k, v in given.items() if k not in PENALTIES}, **{name: value})
        want = reference.penalize(
            **{k: v for k, v in given.items() if k not in PENALTIES}, **{name: torch.full((3,), value)}
        )
        torch.testing.assert_close(got.logits, want[0], rtol=0, atol=0, equal_nan=True)
        assert (got.logits[:, :, ::2] == -INF).all()


def test_broken_logits_pass(ops):
    """NaN and +inf are for the next op to report; other rows do not change."""
    given = inputs(3, 2, 20, 30, F32)
    clean = ops.penalize(**given).logits
    for value in (NAN, INF):
        given["logits"][1] = value
        got = ops.penalize(**given).logits
        assert same_bits(got[::2].contiguous(), clean[::2].contiguous())
        assert not got[1].isfinite().any()


@pytest.mark.parametrize("name", ["lengths", "prompt_lengths"])
def test_lengths_out_of_range(ops, name):
    given = inputs(5, 3, 20, 30, torch.float16)
    clean = ops.penalize(**given)
    for wrong in (-1, 31, -(2**31), 2**31 - 1):
        bad = {**given, name: given[name].clone()}
        bad[name][2] = wrong
        got = ops.penalize(**bad)
        assert got.status.tolist() == [0, 0, fastdecode.Status.BAD_LENGTH, 0, 0] and got.logits[2].isnan().all()
        others = [0, 1, 3, 4]
        assert same_bits(got.logits[others], clean.logits[others])
    bad = {**given, "prompt_lengths": given["lengths"] + 1}
    assert (ops.penalize(**bad).status == fastdecode.Status.BAD_LENGTH).all()


def test_inactive_requests_are_not_read(ops):
    given = inputs(4, 3, 30, 20, F32)
    clean = ops.penalize(**given)
    active = torch.tensor([True, False, True, False])
    given["logits"][~active], given["lengths"][~active] = NAN, 99
    got = ops.penalize(**given, active=active)
    assert same_bits(got.logits[active], clean.logits[active])
    assert not got.logits[~active].any() and not got.status.any()


def test_nothing_past_the_lengths_is_read(ops):
    given = inputs(4, 3, 30, 20, F32)
    clean = ops.penalize(**given)
    for b, length in enumerate(given["lengths"].tolist()):
        given["tokens"][b, length:] = 5
    assert_same(clean, ops.penalize(**given))


def test_ids_outside_the_vocabulary(ops):
    given = inputs(1, 3, 30, 6, F32)
    given["lengths"][:] = 6
    outside = torch.tensor([-1, 30, 2**62, -(2**63), 2**63 - 1, 2**32 + 3])
    given["tokens"][0], given["draft_tokens"][0] = outside, outside[4:]
    assert same_bits(ops.penalize(**given).logits, given["logits"])


def test_inputs_are_not_changed(ops):
    given = inputs(4, 3, 30, 20, F32)
    before = {k: v.clone() for k, v in given.items()}
    ops.penalize(**given)
    assert_same(tuple(before.values()), tuple(given.values()))


def test_views(ops):
    given = inputs(4, 3, 65, 20, F32)
    want = ops.penalize(**given)
    for name in ("logits", "tokens", "draft_tokens"):
        for kind, view in views(given[name]):
            assert_same(want, ops.penalize(**{**given, name: view}), f"{name} {kind}")
    shared = {**given, "logits": given["logits"][:1].expand(4, 3, 65), "tokens": given["tokens"][:1].expand(4, 20)}
    dense = {k: v.contiguous() for k, v in shared.items()}
    assert_same(ops.penalize(**dense), ops.penalize(**shared), "stride 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    """5 rows on 3 threads: a request's rows are then counted from the middle on."""
    check_rows_independent(ops.penalize, inputs(7, 5, 5000, 300, dtype))


def test_every_level_equals_the_reference(ops, cpu_level):
    for dtype in DTYPES:
        given = inputs(3, 3, 2049, 300, dtype)
        check(ops.penalize(**given), reference.penalize(**given), cpu_level)


@given(
    batch=st.integers(0, 4),
    num_rows=st.integers(0, 4),
    vocab_size=st.integers(1, 40),
    length=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_random_shapes(ops, batch, num_rows, vocab_size, length, seed):
    given = inputs(batch, max(num_rows, 1), vocab_size, length, F32, seed)
    if num_rows == 0:
        given["logits"] = given["logits"][:, :0]
    check(ops.penalize(**given), reference.penalize(**given))


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    given = inputs(3, 2, 33, 9, F32)
    check_op(lambda: ops.penalize(**given))
    check_op(
        lambda: ops.penalize(
            given["logits"][:, 0].double(), given["tokens"], given["lengths"], presence=0.5,
            active=torch.tensor([True, False, True]),
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    given = inputs(3, 2, 33, 9, F32)
    check_op(lambda: ops.penalize(**given), inductor=True)


WRONG = [
    ({"logits": torch.zeros(6)}, "logits: expected 2 to 3 dimensions"),
    ({"logits": torch.zeros(3, 2, 6, dtype=torch.int64)}, "logits: expected float64, float32, float16 or bfloat16"),
    ({"logits": torch.zeros(3, 2, 0)}, "logits: expected a vocabulary of at least 1"),
    ({"logits": torch.zeros(3, 2, 12)[..., ::2]}, "logits: expected a contiguous last dimension"),
    ({"logits": torch.zeros(2, 2, 6)}, r"tokens: expected \[2, 4\], got \[3, 4\]"),
    ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: expected 2 dimensions, got \[3\]"),
    ({"tokens": torch.zeros(3, 4, dtype=I32)}, "tokens: expected int64, got int32"),
    ({"tokens": torch.zeros(3, 8, dtype=torch.int64)[:, ::2]}, "tokens: expected a contiguous last dimension"),
    ({"tokens": torch.zeros(3, 4, dtype=torch.int64, device="meta")}, "tokens: expected cpu, got meta"),
    ({"lengths": torch.zeros(2, dtype=I32)}, r"lengths: expected \[3\], got \[2\]"),
    ({"lengths": torch.zeros(3, dtype=torch.int64)}, "lengths: expected int32, got int64"),
    ({"prompt_lengths": torch.zeros(2, dtype=I32)}, r"prompt_lengths: expected \[3\], got \[2\]"),
    ({"draft_tokens": torch.zeros(3, 2, dtype=torch.int64)}, r"draft_tokens: expected \[3, 1\], got \[3, 2\]"),
    ({"draft_tokens": torch.zeros(3, 1, dtype=I32)}, "draft_tokens: expected int64, got int32"),
    *(({name: torch.zeros(2)}, rf"{name}: expected \[3\], got \[2\]") for name in PENALTIES),
    *(({name: torch.zeros(3).double()}, f"{name}: expected float32, got float64") for name in PENALTIES),
    *(({name: "much"}, f"{name}: expected a torch.float32 number") for name in PENALTIES),
    ({"active": torch.zeros(3)}, "active: expected bool, got float32"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[m[:40] for _, m in WRONG])
def test_bad_input_is_named(ops, change, message):
    good = {"logits": torch.zeros(3, 2, 6), "tokens": torch.zeros(3, 4, dtype=torch.int64)}
    with raises(f"^penalize: {message}"):
        ops.penalize(**{**good, "lengths": torch.zeros(3, dtype=I32), **change})
