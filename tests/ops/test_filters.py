"""Bitmasks, locally typical sampling, the joint order and flat ragged rows, in every op that has the filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdecode
from chain_inputs import pack
from fastdecode.testing import law
from fastdecode.testing.reference import sample as reference
from support import (
    DTYPES,
    ROW_KINDS,
    assert_same,
    check_op,
    check_target_probs,
    compute_dtype,
    generator,
    raises,
    rows,
    same_bits,
    views,
)

# The entropy that typical compares with is a sum of its own; two ids that stand on either side of it come near.
NEAR_TYPICAL = {torch.float64: 1e-12, torch.float32: 2e-6}
CDF_MARGIN = {torch.float64: 1e-12, torch.float32: 1e-5}
RACE_MARGIN = 1e-5
ODD_SIZES = (1, 2, 31, 32, 33, 64, 65, 100, 2047, 2049)


def words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


def random_masks(*shape: int, vocab_size: int, seed: int = 0, keep: float = 0.4) -> Tensor:
    """int32 [*shape, W] with about `keep` of the ids allowed; the bits past V are random too."""
    g = generator(seed, vocab_size, *shape)
    bits = torch.rand(*shape, words(vocab_size) * 32, generator=g) < keep
    return pack(bits)


def unpack(mask: Tensor, vocab_size: int) -> Tensor:
    return (mask.long()[..., None] >> torch.arange(32) & 1).flatten(-2)[..., :vocab_size].bool()


def tensor(values: list, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor((values * batch)[:batch], dtype=dtype)


def filter_sets(batch: int, vocab_size: int) -> dict[str, dict]:
    """Every new filter alone, among the old ones, and with per-request on, off and extreme values."""
    typical = tensor([0.9, 0.2, 1.0, 0.0, 0.5, 1e-6, -3.0, 7.0, 0.999], batch)
    top_k = tensor([5, 0, 1, vocab_size, 40, -3, 3], batch, torch.int32)
    top_p = tensor([0.9, 1.0, 0.3, 0.97, 0.05], batch)
    old = {
        "temperature": tensor([0.7, 1.0, 0.0, 1.6, 0.3], batch),
        "top_k": top_k,
        "top_p": top_p,
        "min_p": tensor([0.0, 0.02, 0.0, 0.001], batch),
    }
    mask = random_masks(batch, vocab_size=vocab_size, keep=0.7)
    return {
        "bitmask": {"bitmask": mask},
        "typical": {"typical_p": typical},
        "joint": {"top_k": top_k, "top_p": top_p.flip(0), "order": "joint"},
        "joint, top-p alone": {"top_p": top_p, "order": "joint"},
        "all": old | {"bitmask": mask, "typical_p": typical.flip(0)},
        "all, joint": old | {"bitmask": mask, "typical_p": typical.roll(2), "order": "joint"},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 33, 100, 257, 2049])
def test_target_probs_equals_reference(ops, vocab_size, dtype):
    skipped = compared = 0
    for kind in ROW_KINDS if vocab_size < 300 else ("normal", "ties", "near_tie"):
        logits = rows(kind, 7, vocab_size, dtype)
        for name, filters in filter_sets(7, vocab_size).items():
            skipped += check_target_probs(ops, logits, f"{kind}, {name}", NEAR_TYPICAL, **filters)
            compared += 7
    assert skipped <= 0.1 * compared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [3, 33, 300])
def test_token_logprobs_equals_reference(ops, vocab_size, dtype):
    logits = rows("normal", 7, vocab_size, dtype)
    tokens = torch.randint(vocab_size, (7,), generator=generator(3, vocab_size))
    work, compared = compute_dtype(dtype), 0
    for name, filters in filter_sets(7, vocab_size).items():
        got = ops.token_logprobs(logits, tokens, filtered=True, top=3, **filters)
        want, ids, top, status, margin = reference.token_logprobs(logits, tokens, filtered=True, top=3, **filters)
        clear = margin > NEAR_TYPICAL[work]
        compared += clear.sum()
        np.testing.assert_array_equal(got.status.numpy(), status, err_msg=name)
        np.testing.assert_array_equal(got.top_ids.numpy()[clear], ids[clear], err_msg=name)
        # ln of a probability above 1e-30, in the compute dtype: a few roundings of the distance and of the sum
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}[work]
        for ours, exact in ((got.logprobs, want), (got.top_logprobs, top)):
            np.testing.assert_allclose(ours.double().numpy()[clear], exact[clear].astype(float), rtol=0, atol=tolerance)
    assert compared > 30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [2, 33, 300])
def test_sample_equals_reference(ops, vocab_size, dtype):
    g = generator(5, vocab_size)
    skipped = compared = 0
    seeds = {"seed": torch.randint(2**62, (7,), generator=g), "offset": torch.randint(2**40, (7,), generator=g)}
    uniforms = torch.rand(7, generator=g, dtype=torch.float64)
    for kind in ROW_KINDS:
        logits = rows(kind, 7, vocab_size, dtype)
        for name, filters in filter_sets(7, vocab_size).items():
            for random, near in ((seeds, RACE_MARGIN), ({"uniforms": uniforms}, CDF_MARGIN[compute_dtype(dtype)])):
                got = ops.sample(logits, **random, **filters)
                want, status, margin = reference.sample(logits, **random, **filters)
                clear = margin > near
                np.testing.assert_array_equal(got.status.numpy(), status, err_msg=f"{kind}, {name}")
                np.testing.assert_array_equal(got.tokens.numpy()[clear], want[clear], err_msg=f"{kind}, {name}")
                skipped, compared = skipped + int((~clear).sum()), compared + 7
    assert skipped <= 0.1 * compared


def test_every_level_equals_the_reference(ops, cpu_level):
    logits = rows("normal", 7, 2500, torch.float32)
    for name, filters in filter_sets(7, 2500).items():
        check_target_probs(ops, logits, f"{cpu_level}, {name}", NEAR_TYPICAL, **filters)


LAW_FILTERS: dict[str, dict] = {
    "bitmask": {"bitmask": 0b1011011},
    "typical": {"typical_p": 0.6},
    "joint": {"top_k": 4, "top_p": 0.75, "order": "joint"},
    "all": {"bitmask": 0b1110111, "temperature": 1.4, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
    "all, joint": {"bitmask": 0b1111110, "temperature": 0.8, "top_k": 5, "top_p": 0.8, "typical_p": 0.9, "order": 1},
}
WRONG = {  # for the negative control: the nearest mistake
    "bitmask": {"bitmask": 0b1011010},
    "typical": {"typical_p": 0.3},
    "joint": {"order": "k_then_p"},
    "all": {"typical_p": 1.0},
    "all, joint": {"temperature": 0.82},
}


@pytest.mark.parametrize("name", LAW_FILTERS)
def test_law_by_bisection(ops, name):
    vocab_size = 7
    logits = rows("normal", 6, vocab_size, torch.float64) / 2
    filters = LAW_FILTERS[name]
    mask = {"bitmask": torch.tensor([filters["bitmask"]], dtype=torch.int32)} if "bitmask" in filters else {}

    def outcome(case: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        tokens, status = ops.sample(logits[case], uniforms=torch.from_numpy(uniforms[:, 0].copy()), **filters | mask)
        assert (status == 0).all()
        return tokens.numpy()[:, None]

    def expected(row: Tensor, **chosen) -> law.Law:
        if "bitmask" in chosen:
            chosen["bitmask"] = np.array([chosen["bitmask"]])
        probs = reference.law(row.numpy(), reference.Filters(**chosen)).probs
        return {(v,): float(p) for v, p in enumerate(probs) if p > 0}

    found = law.exact_law(outcome, 1, 6)
    assert max(law.law_error(f, expected(row, **filters)) for f, row in zip(found, logits)) < 1e-12
    wrong = filters | WRONG[name]
    assert max(law.law_error(f, expected(row, **wrong)) for f, row in zip(found, logits)) > 1e-3


INF, NAN = float("inf"), float("nan")
STRANGE = {  # per parameter: values at, past and far from the ends of its range; NaN is off, as is every value past it
    "temperature": [0.0, -1.0, NAN, 1e-30, 1e-3, 1e3, 1e30, 1.0],
    "top_k": [-(2**31), -1, 0, 1, 2, 99, 100, 101, 2**31 - 1],
    "top_p": [-INF, -1.0, 0.0, 1e-9, 0.5, 1 - 2.0**-24, 1.0, 2.0, INF, NAN],
    "min_p": [-INF, -1.0, 0.0, 1e-30, 0.5, 1.0, 2.0, INF, NAN],
    "typical_p": [-INF, -1.0, 0.0, 1e-9, 0.5, 1 - 2.0**-24, 1.0, 2.0, INF, NAN],
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strange_parameters_equal_reference(ops, name, dtype):
    values = torch.tensor(STRANGE[name], dtype=torch.int32 if name == "top_k" else torch.float32)
    batch = len(values)
    near, tolerance = {torch.float64: (1e-9, 1e-13), torch.float32: (1e-5, 2e-6)}[compute_dtype(dtype)]
    for kind in ROW_KINDS:
        logits = rows(kind, batch, 100, dtype)
        others = {"top_k": torch.full((batch,), 9, dtype=torch.int32), "typical_p": torch.full((batch,), 0.7)}
        for more in ({}, {k: v for k, v in others.items() if k != name}):
            got, status = ops.target_probs(logits, **{name: values}, **more)
            want, want_status, margin = reference.target_probs(logits, **{name: values}, **more)
            np.testing.assert_array_equal(status.numpy(), want_status)
            clear = margin > near
            np.testing.assert_allclose(got.double().numpy()[clear], want[clear].astype(float), tolerance, 1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_both_signs_tie(ops, dtype):
    """Whichever sign comes first: 0 and -0 are equal logits, kept by lowest id."""
    g = generator(9)
    for vocab_size in (4, 17, 300):
        logits = torch.randint(-3, 1, (40, vocab_size), generator=g).to(dtype)
        signed = torch.where((logits == 0) & (torch.rand(logits.shape, generator=g) < 0.5), -logits, logits)
        assert torch.equal(logits, signed) and not same_bits(logits, signed)
        for filters in (
            {"top_k": 2},
            {"top_p": 0.5},
            {"top_p": 0.1, "temperature": 50.0},
            {"min_p": 1.0},
            {"typical_p": 0.3},
            {"typical_p": 0.2, "top_k": 3},
            {"top_k": 2, "top_p": 0.3, "order": "joint"},
            {"temperature": 0.0},
        ):
            assert_same(ops.target_probs(logits, **filters), ops.target_probs(signed, **filters), f"{filters}")


# ----------------------------------------------------------------------------------------------------------------------
# Bitmask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", ODD_SIZES)
def test_bitmask_is_a_bias_of_minus_infinity(ops, vocab_size, dtype):
    """Bit for bit; and the bits past V, which are random here, are not looked at."""
    logits = rows("normal", 6, vocab_size, dtype)
    mask = random_masks(6, vocab_size=vocab_size)
    forbidden = torch.zeros(6, vocab_size).masked_fill(~unpack(mask, vocab_size), -torch.inf)
    for more in ({}, {"top_k": 3, "typical_p": 0.9}, {"temperature": 0.0}, {"top_p": 0.8, "order": "joint"}):
        assert_same(ops.target_probs(logits, bias=forbidden, **more), ops.target_probs(logits, bitmask=mask, **more))
    flipped = mask ^ pack(torch.arange(words(vocab_size) * 32) >= vocab_size)
    assert_same(ops.target_probs(logits, bitmask=mask), ops.target_probs(logits, bitmask=flipped), "bits past V")


@pytest.mark.parametrize("vocab_size", [32, 33, 64, 70])
def test_the_sign_bit_is_id_31(ops, vocab_size):
    logits = rows("normal", 2, vocab_size, torch.float32)
    mask = torch.zeros(2, words(vocab_size), dtype=torch.int32)
    mask[0, 0] = -(2**31)
    mask[1, :] = 2**31 - 1  # everything but the sign bits
    probs, status = ops.target_probs(logits, bitmask=mask)
    assert probs[0].nonzero().flatten().tolist() == [31]
    assert (probs[1] == 0).nonzero().flatten().tolist() == [31, 63][: vocab_size // 32]
    assert status.tolist() == [0, 0]
    assert ops.sample(logits, bitmask=mask, uniforms=torch.rand(2, dtype=torch.float64)).tokens[0] == 31


def test_bitmask_shapes(ops):
    """[W] for all, [B, W] per request, [B, n, W] per row: the same bits as their expansions, from any view."""
    logits = rows("normal", 12, 70, torch.float32).reshape(4, 3, 70)
    each = random_masks(4, 3, vocab_size=70, keep=0.6)
    per_request, one = each[:, 0].contiguous(), each[0, 0].contiguous()
    for name, small in (("[W]", one), ("[B, W]", per_request)):
        full = small.expand(4, 3, -1) if small.dim() == 1 else small[:, None].expand(-1, 3, -1)
        want = ops.target_probs(logits, bitmask=full.contiguous())
        assert_same(want, ops.target_probs(logits, bitmask=small), name)
        assert_same(want, ops.target_probs(logits, bitmask=full), f"{name} expanded")
    for i in range(3):
        rows_i = ops.target_probs(logits[:, i].contiguous(), bitmask=each[:, i].contiguous())
        whole = ops.target_probs(logits, bitmask=each)
        assert_same(tuple(rows_i), (whole.probs[:, i].contiguous(), whole.status[:, i].contiguous()), f"row {i}")
    for name, view in views(each):
        assert_same(ops.target_probs(logits, bitmask=each), ops.target_probs(logits, bitmask=view), name)
    for name, view in views(per_request):
        assert_same(ops.target_probs(logits, bitmask=per_request), ops.target_probs(logits, bitmask=view), name)
        draw = {"uniforms": torch.rand(4, generator=generator(2), dtype=torch.float64)}
        first = logits[:, 0]
        assert_same(
            ops.sample(first, bitmask=per_request, **draw), ops.sample(first, bitmask=view, **draw), f"sample {name}"
        )


def test_everything_forbidden_and_broken_rows(ops):
    logits = torch.zeros(6, 40)
    mask = torch.full((6, 2), -1, dtype=torch.int32)
    mask[0] = 0
    mask[1, 0], mask[1, 1] = 0, -256  # only bits past V
    mask[2:, 0] = -2  # id 0 is forbidden below
    logits[2, 0] = torch.nan
    logits[3, 0] = torch.inf
    logits[4, 0] = -torch.inf
    for more in ({}, {"typical_p": 0.9}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.9, "order": "joint"}):
        probs, status = ops.target_probs(logits, bitmask=mask, **more)
        assert status.tolist() == [2, 2, 1, 1, 0, 0]
        assert (probs[:4] == 0).all() and (probs[4:].sum(1) > 0.99).all()
        assert (probs[4:, 0] == 0).all()
        for random in (
            {"seed": torch.arange(6), "offset": torch.arange(6)},
            {"uniforms": torch.full((6,), 0.3, dtype=torch.float64)},
        ):
            drawn = ops.sample(logits, bitmask=mask, **random, **more)
            assert drawn.status.tolist() == [2, 2, 1, 1, 0, 0]
            assert drawn.tokens[:4].tolist() == [-1] * 4 and (drawn.tokens[4:] > 0).all()
        scored = ops.token_logprobs(logits, torch.zeros(6, dtype=torch.int64), filtered=True, bitmask=mask, **more)
        assert scored.status.tolist() == [2, 2, 1, 1, 0, 0]
        assert scored.logprobs[4:].tolist() == [-torch.inf] * 2


def test_bitmask_and_bans_add_up(ops):
    logits = torch.zeros(1, 4)
    probs, _ = ops.target_probs(
        logits, bitmask=torch.tensor([[0b1101]], dtype=torch.int32), ban_ids=torch.tensor([[0, -1]])
    )
    assert probs.tolist() == [[0, 0, 0.5, 0.5]]
    both = ops.target_probs(logits, bitmask=torch.tensor([0b0001], dtype=torch.int32), ban_ids=torch.tensor([0]))
    assert both.status.tolist() == [2]


# ----------------------------------------------------------------------------------------------------------------------
# Typical


def kept(ops, probs: list[float], **filters: object) -> list[int]:
    found, _ = ops.target_probs(torch.tensor([probs], dtype=torch.float64).log(), **filters)
    return found[0].nonzero().flatten().tolist()


def test_typical_by_hand(ops):
    """p = .5 .2 .2 .1: H = 1.2206; from it 1 and 2 are .3888 away, 0 is .5275, 3 is 1.082."""
    probs = [0.5, 0.2, 0.2, 0.1]
    for mass, want in (
        (1.0, [0, 1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (0.85, [0, 1, 2]),
        (0.5, [0, 1, 2]),
        (0.35, [1, 2]),
        (0.15, [1]),
        (0.0, [1]),
        (-1.0, [1]),
    ):
        assert kept(ops, probs, typical_p=mass) == want, mass
    assert kept(ops, probs, typical_p=0.15, temperature=0.0) == [0]
    assert kept(ops, probs, typical_p=0.15, top_k=1) == [0]
    # After top-k 3 what is left is 5/9 2/9 2/9, entropy .9950: 0 is .4072 away, 1 and 2 are .5091.
    assert kept(ops, probs, typical_p=0.4, top_k=3) == [0]


@pytest.mark.parametrize("vocab_size", [4, 64, 2048, 4096])
def test_typical_ties_keep_the_lowest_ids(ops, vocab_size):
    for dtype in DTYPES:
        flat = torch.full((1, vocab_size), 1.5, dtype=dtype)
        for mass, count in ((0.5, vocab_size // 2), (0.25, vocab_size // 4), (1e-9, 1), (0.0, 1)):
            probs, _ = ops.target_probs(flat, typical_p=mass)
            assert probs[0].nonzero().flatten().tolist() == list(range(count)), (dtype, mass)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_typical_off_and_greedy_change_no_bit(ops, dtype):
    logits = rows("normal", 5, 300, dtype)
    for off in (1.0, 2.5, torch.inf):
        assert_same(ops.target_probs(logits, top_p=0.9), ops.target_probs(logits, top_p=0.9, typical_p=off), str(off))
    for mass in (0.0, 0.5):
        greedy = ops.target_probs(logits, temperature=0.0)
        assert_same(greedy, ops.target_probs(logits, temperature=0.0, typical_p=mass), "greedy")


def test_typical_is_that_of_transformers(ops):
    """Where no two ids tie, TypicalLogitsWarper keeps the same ids."""
    transformers = pytest.importorskip("transformers")
    logits = rows("normal", 50, 200, torch.float64, seed=3)
    for mass in (0.1, 0.5, 0.9, 0.99):
        warped = transformers.TypicalLogitsWarper(mass=mass)(None, logits.clone())
        probs, _ = ops.target_probs(logits, typical_p=mass)
        assert torch.equal(probs > 0, warped > -torch.inf), mass


@pytest.mark.parametrize("temperature", [0.01, 1.0, 50.0])
def test_typical_mass_is_reached_and_not_overshot(ops, temperature):
    """What is kept holds the mass, and would not without the one of its ids that is farthest from the entropy."""
    logits = rows("normal", 40, 500, torch.float64, seed=4)
    probs, _ = ops.target_probs(logits, temperature=temperature)
    left, _ = ops.target_probs(logits, temperature=temperature, typical_p=0.7)
    surprise = -probs.log()
    entropy = torch.where(probs > 0, probs * surprise, 0).sum(1, keepdim=True)
    distance = (surprise - entropy).abs()
    inside = left > 0
    mass = (probs * inside).sum(1)
    farthest = distance.masked_fill(~inside, -1).argmax(1, keepdim=True)
    assert (mass >= 0.7 - 1e-9).all()
    assert (mass - probs.gather(1, farthest)[:, 0] < 0.7).all()
    outside = distance.masked_fill(inside, torch.inf).amin(1)
    assert (outside >= distance.gather(1, farthest)[:, 0] - 1e-9).all()


# ----------------------------------------------------------------------------------------------------------------------
# Order


def test_joint_by_hand(ops):
    """p = .4 .3 .2 .1: after top-k 2 the first id alone holds .57 of what is left; before it two ids hold .5."""
    probs = [0.4, 0.3, 0.2, 0.1]
    assert kept(ops, probs, top_k=2, top_p=0.5) == [0]
    assert kept(ops, probs, top_k=2, top_p=0.5, order="k_then_p") == [0]
    for joint in ("joint", fastdecode.Order.JOINT, 1):
        assert kept(ops, probs, top_k=2, top_p=0.5, order=joint) == [0, 1]
    assert kept(ops, probs, top_k=1, top_p=0.5, order="joint") == [0]
    assert kept(ops, probs, top_k=3, top_p=0.65, order="joint", min_p=0.7) == [0, 1]
    for wrong in ("p_then_k", 2, -1, None, 1.0):
        with raises("^target_probs: order: expected "):
            ops.target_probs(torch.zeros(1, 4), top_k=2, order=wrong)


def test_joint_equals_sequential_where_one_filter_is_off(ops):
    logits = rows("normal", 6, 333, torch.float32)
    for chosen in ({}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 333, "top_p": 0.8}, {"top_k": 20, "top_p": 1.0}):
        for more in ({}, {"min_p": 0.01}, {"typical_p": 0.8}, {"temperature": 0.0}):
            assert_same(
                ops.target_probs(logits, **chosen, **more), ops.target_probs(logits, **chosen, **more, order="joint")
            )


def test_joint_keeps_at_least_the_sequential_ids(ops):
    logits = rows("normal", 40, 333, torch.float32, seed=2)
    more = 0
    for top_k in (3, 20, 100):
        sequential, _ = ops.target_probs(logits, top_k=top_k, top_p=0.6)
        joint, _ = ops.target_probs(logits, top_k=top_k, top_p=0.6, order="joint")
        nucleus, _ = ops.target_probs(logits, top_p=0.6)
        largest, _ = ops.target_probs(logits, top_k=top_k)
        assert ((joint > 0) >= (sequential > 0)).all()
        assert torch.equal(joint > 0, (nucleus > 0) & (largest > 0))
        more += int(((joint > 0) & (sequential == 0)).sum())
    assert more > 50


# ----------------------------------------------------------------------------------------------------------------------
# Flat ragged rows

LENS = (3, 0, 1, 4, 2)


def ragged(dtype: torch.dtype, vocab_size: int = 70, before: int = 2, after: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Padded [B, n, V], the same rows flat among unowned rows of NaN, and row_start."""
    padded = rows("normal", len(LENS) * max(LENS), vocab_size, dtype).reshape(len(LENS), max(LENS), vocab_size)
    row_start = torch.tensor([before, *(before + np.cumsum(LENS))], dtype=torch.int32)
    flat = torch.full((before + sum(LENS) + after, vocab_size), torch.nan, dtype=dtype)
    flat[before : before + sum(LENS)] = torch.cat([padded[b, :n] for b, n in enumerate(LENS)])
    return padded, flat, row_start


def flatten(value: Tensor, like: Tensor, row_start: Tensor, fill: float = 0) -> Tensor:
    """[B, n, ...] to the owned rows of [R, ...]."""
    out = torch.full((like.shape[0], *value.shape[2:]), fill, dtype=value.dtype)
    for b, n in enumerate(LENS):
        first = int(row_start[b])
        out[first : first + n] = value[b, :n]
    return out


def flat_options(vocab_size: int = 70) -> dict[str, dict]:
    batch = len(LENS)
    everything = filter_sets(batch, vocab_size)["all, joint"]
    moving = {
        "ban_ids": torch.tensor([[0, 1], [2, -1], [3, 3], [4, 5], [6, 7]]),
        "min_lengths": torch.tensor([[11, 12], [8, 9], [9, 9], [102, 103], [1, 1]]),
        "offset": torch.tensor([10, 7, 8, 100, 0]),
    }
    bias = torch.randn(batch, vocab_size, generator=generator(6))
    return {
        "plain": {},
        "filters": {k: v for k, v in everything.items() if k != "bitmask"},
        "bias": {"bias": bias},
        "positions": moving,
        "all": {k: v for k, v in everything.items() if k != "bitmask"} | moving | {"bias": bias},
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", flat_options())
def test_flat_rows_equal_padded_rows(ops, name, dtype):
    """Bit for bit: the row of a request does not know how it was stored. Unowned rows give zeros and are not read."""
    padded, flat, row_start = ragged(dtype)
    options = flat_options()[name]
    each = random_masks(len(LENS), max(LENS), vocab_size=70, keep=0.7)
    tokens = torch.randint(70, padded.shape[:2], generator=generator(7))
    for masked in (False, True):
        mask = {"bitmask": each} if masked else {}
        flat_mask = {"bitmask": flatten(each, flat, row_start)} if masked else {}
        want = ops.target_probs(padded, **options, **mask)
        got = ops.target_probs(flat, row_start=row_start, **options, **flat_mask)
        assert_same(tuple(flatten(o, flat, row_start) for o in want), tuple(got), "target_probs")
        assert (got.probs.sum(-1) > 0.9).sum() == sum(LENS)
        filtered = {"filtered": True, **options} if options or masked else {}
        want = ops.token_logprobs(padded, tokens, top=3, **filtered, **mask)
        got = ops.token_logprobs(
            flat, flatten(tokens, flat, row_start, 5), top=3, row_start=row_start, **filtered, **flat_mask
        )
        own = (torch.arange(len(flat)) >= row_start[0]) & (torch.arange(len(flat)) < row_start[-1])
        for o, w, fill in zip(got, want, (0, -1, -torch.inf, 0), strict=True):
            assert same_bits(o[own], flatten(w, flat, row_start)[own]), name
            assert (o[~own] == fill).all()


def test_flat_rows_of_inactive_requests_are_not_read(ops):
    _, flat, row_start = ragged(torch.float32)
    active = torch.tensor([True, True, False, False, True])
    clean = ops.target_probs(flat, row_start=row_start, top_p=0.9)
    idle = torch.zeros(len(flat), dtype=torch.bool)
    for b in (2, 3):
        idle[int(row_start[b]) : int(row_start[b + 1])] = True
    out = ops.target_probs(flat.masked_fill(idle[:, None], torch.nan), row_start=row_start, top_p=0.9, active=active)
    assert same_bits(out.probs[~idle], clean.probs[~idle])
    assert (out.probs[idle] == 0).all() and (out.status == 0).all()


def test_flat_rows_of_any_view_and_of_none(ops):
    _, flat, row_start = ragged(torch.float32)
    want = ops.target_probs(flat, row_start=row_start)
    for name, view in views(flat):
        assert_same(want, ops.target_probs(view, row_start=row_start), name)
    for start in ([0], [0, 0, 0], [3, 3]):
        out = ops.target_probs(flat, row_start=torch.tensor(start, dtype=torch.int32), typical_p=0.9)
        assert (out.probs == 0).all() and (out.status == 0).all()
    empty = ops.target_probs(torch.zeros(0, 7), row_start=torch.zeros(3, dtype=torch.int32), temperature=0.5)
    assert empty.probs.shape == (0, 7) and empty.status.shape == (0,)


@pytest.mark.parametrize("start", [[0, 99, 13], [-5, 3, 13], [9, 2, 13], [0, 2**31 - 1, -(2**31)]])
def test_bad_row_start_reads_nothing_out_of_range(ops, start):
    """Whatever it does to the rows of these two requests, memory outside is neither read nor written."""
    flat = rows("normal", 13, 70, torch.float32)
    probs, status = ops.target_probs(flat, row_start=torch.tensor(start, dtype=torch.int32))
    assert probs.shape == flat.shape and status.shape == (13,)
    assert torch.isfinite(probs).all() and ((probs.sum(1) - 1).abs() < 1e-3).logical_or(probs.sum(1) == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Rows, compilation, errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    logits = rows("normal", 9, 2500, dtype)
    uniforms = torch.rand(9, generator=generator(2), dtype=torch.float64)
    seeds = {"seed": torch.arange(9) - 4, "offset": torch.arange(9) * 2**30}
    for name, filters in filter_sets(9, 2500).items():
        tensors = {k: v for k, v in filters.items() if isinstance(v, Tensor)}
        order = filters.get("order", "k_then_p")
        out = check_rows_independent(
            lambda order=order, **t: ops.target_probs(**t, order=order), {"logits": logits, **tensors}
        )
        assert (out[1] == 0).all(), name
        for random in (seeds, {"uniforms": uniforms}):
            check_rows_independent(
                lambda order=order, **t: ops.sample(**t, order=order), {"logits": logits, **random, **tensors}
            )


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    logits = rows("normal", 3, 70, torch.float32)
    filters = filter_sets(3, 70)["all, joint"]
    seeds = {"seed": torch.arange(3), "offset": torch.arange(3)}
    check_op(lambda: ops.target_probs(logits, **filters))
    check_op(lambda: ops.sample(logits, **seeds, **filters))
    check_op(lambda: ops.token_logprobs(logits, torch.arange(3), filtered=True, top=2, **filters))
    each = random_masks(3, 2, vocab_size=70)
    check_op(lambda: ops.target_probs(logits[:, None].expand(3, 2, 70), bitmask=each, typical_p=0.5))
    row_start = torch.tensor([0, 2, 3], dtype=torch.int32)
    mask = random_masks(3, vocab_size=70)
    check_op(lambda: ops.target_probs(logits, row_start=row_start, bitmask=mask, temperature=0.7))
    check_op(lambda: ops.token_logprobs(logits, torch.arange(3), row_start=row_start, top=1))


def test_unfiltered_logprobs_refuse_the_new_filters(ops):
    logits, tokens = torch.zeros(2, 40), torch.zeros(2, dtype=torch.int64)
    for wrong in (
        {"bitmask": torch.zeros(2, 2, dtype=torch.int32)},
        {"typical_p": 0.5},
        {"typical_p": torch.ones(2)},
        {"order": "joint"},
    ):
        with raises("^token_logprobs: "):
            ops.token_logprobs(logits, tokens, **wrong)
