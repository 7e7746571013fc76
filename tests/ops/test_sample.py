from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdecode.testing import chi_square_z, law
from fastdecode.testing.reference import rng
from fastdecode.testing.reference import sample as reference
from support import (
    DTYPES,
    ROW_KINDS,
    SIZES,
    assert_same,
    check_op,
    compute_dtype,
    generator,
    raises,
    rows,
    views,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "sample.json"
# Leads of the winning key below this may turn with the last bit of log(); float64 keys carry float32 noise too.
RACE_MARGIN = 1e-5
CDF_MARGIN = {torch.float64: 1e-12, torch.float32: 1e-5}


def seeds(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = generator(99, seed)
    full = torch.iinfo(torch.int64)
    return {
        "seed": torch.randint(full.min, full.max, (batch,), generator=g),
        "offset": torch.randint(0, 2**40, (batch,), generator=g),
    }


def some_filters(batch: int) -> dict[str, torch.Tensor]:
    def tensor(values, dtype):
        return torch.tensor((values * batch)[:batch], dtype=dtype)

    return {
        "temperature": tensor([0.7, 1.0, 0.0, 1.6, 0.3], torch.float32),
        "top_k": tensor([0, 50, 3], torch.int32),
        "top_p": tensor([0.9, 1.0], torch.float32),
        "min_p": tensor([0.0, 0.0, 0.1], torch.float32),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The contract of the random numbers


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_reference_philox_known_answers(counter, key, words):
    """Vectors of the Random123 distribution: the reference itself is pinned to something outside this library."""
    assert " ".join(f"{int(w):08x}" for w in rng.philox(counter, key)) == words


def test_reference_noise_is_finite_at_the_ends():
    ends = rng.gumbel(np.array([0, 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32))
    assert np.isfinite(ends).all() and ends.dtype == np.float32
    assert ends[0] == ends.max() and ends[-1] == ends.min()


def golden_cases() -> list[dict]:
    return json.loads(GOLDEN.read_text())["cases"]


def golden_logits(case: dict) -> torch.Tensor:
    """Integer hash of (row, id): no generator of any library has to stay the same for the file to stay valid."""
    ids = np.arange(case["vocab_size"], dtype=np.uint64)
    mixed = (ids * np.uint64(2654435761) + np.uint64(case["row"]) * np.uint64(40503)) % np.uint64(2**32)
    return torch.from_numpy((mixed >> np.uint64(20)).astype(np.float64) / 512 - 4)


def test_golden_vectors(ops, cpu_level):
    for case in golden_cases():
        for dtype in (torch.float64, torch.float32):
            tokens, status = ops.sample(
                golden_logits(case).to(dtype)[None],
                seed=torch.tensor([case["seed"]]),
                offset=torch.tensor([case["offset"]]),
                stream=case["stream"],
                node=case["node"],
                **case["filters"],
            )
            assert tokens.tolist() == [case["token"]] and status.tolist() == [0], case


def test_golden_vectors_are_the_references():
    for case in golden_cases():
        row = reference.law(golden_logits(case).numpy(), reference.Filters(**case["filters"]), np.float32)
        noise = rng.row_noise(case["seed"], case["offset"], case["vocab_size"], case["stream"], case["node"])
        token, lead = reference.race(row.scores, noise)
        assert token == case["token"] and lead > 1e-4 and row.margin > 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_seeded_tokens_equal_reference(ops, vocab_size, dtype):
    skipped = compared = 0
    for kind in ROW_KINDS if vocab_size < 300 else ("normal", "ties", "near_tie"):
        logits = rows(kind, 10, vocab_size, dtype)
        for filters in ({}, some_filters(10)):
            keys = seeds(10, vocab_size)
            tokens, status = ops.sample(logits, **keys, stream=vocab_size % 8, node=vocab_size % 1000, **filters)
            want, want_status, margin = reference.sample(
                logits, **keys, stream=vocab_size % 8, node=vocab_size % 1000, **filters
            )
            np.testing.assert_array_equal(status.numpy(), want_status)
            clear = margin > RACE_MARGIN
            np.testing.assert_array_equal(tokens.numpy()[clear], want[clear], err_msg=f"{kind} {filters.keys()}")
            skipped, compared = skipped + int((~clear).sum()), compared + 10
    assert skipped <= max(1, 0.1 * compared)  # mostly top_p .9 of 5000 nearly equal ids


@pytest.mark.parametrize("word", ["seed", "offset", "stream", "node"])
def test_every_counter_word_counts(ops, word):
    """Each argument, and each half of the 64-bit ones, reaches the counter; equality with the reference pins where."""
    logits = torch.zeros(1, 4096, dtype=torch.float64)
    values = {
        "seed": [0, 1, -1, 2**32, -(2**63), 2**63 - 1],
        "offset": [0, 1, 2**32, 2**32 + 1, 2**62],
        "stream": [0, 1, 7],
        "node": [0, 1, 1023],
    }[word]
    drawn = []
    for value in values:
        chosen = {"seed": 5, "offset": 6, "stream": 0, "node": 0} | {word: value}
        keys = {k: torch.tensor([chosen[k]]) for k in ("seed", "offset")}
        tokens, _ = ops.sample(logits, **keys, stream=chosen["stream"], node=chosen["node"])
        want, _, margin = reference.sample(logits, **keys, stream=chosen["stream"], node=chosen["node"])
        assert margin[0] > RACE_MARGIN and tokens[0] == want[0]
        drawn.append(int(tokens[0]))
    assert len(set(drawn)) == len(values)


# ----------------------------------------------------------------------------------------------------------------------
# The law


LAW_FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.8, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("vocab_size", [1, 3, 7])
@pytest.mark.parametrize("name", LAW_FILTERS)
def test_law_by_bisection(ops, name, vocab_size):
    logits = rows("normal", 4, vocab_size, torch.float64)
    filters = LAW_FILTERS[name]

    def outcome(case: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        tokens, status = ops.sample(logits[case], uniforms=torch.from_numpy(uniforms[:, 0].copy()), **filters)
        assert (status == 0).all()
        return tokens.numpy()[:, None]

    def expected(row: torch.Tensor, **chosen) -> law.Law:
        probs = reference.law(row.numpy(), reference.Filters(**chosen)).probs
        return {(v,): float(p) for v, p in enumerate(probs) if p > 0}

    found = law.exact_law(outcome, 1, 4)
    assert max(law.law_error(f, expected(row, **filters)) for f, row in zip(found, logits)) < 1e-12
    if vocab_size == 7 and name != "greedy":  # negative control: the same machinery sees a temperature off by 2 %
        wrong = filters | {"temperature": 1.02 * filters.get("temperature", 1.0)}
        assert max(law.law_error(f, expected(row, **wrong)) for f, row in zip(found, logits)) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_uniforms_equal_reference(ops, vocab_size, dtype):
    g = generator(3, vocab_size)
    skipped = compared = 0
    for kind in ROW_KINDS if vocab_size < 300 else ("normal", "ties", "near_tie"):
        logits = rows(kind, 10, vocab_size, dtype)
        uniforms = torch.rand(10, generator=g, dtype=torch.float64)
        uniforms[0], uniforms[1] = 0.0, 1 - 2.0**-53
        for filters in ({}, some_filters(10)):
            tokens, _ = ops.sample(logits, uniforms=uniforms, **filters)
            want, _, margin = reference.sample(logits, uniforms=uniforms, **filters)
            clear = margin > CDF_MARGIN[compute_dtype(dtype)]
            np.testing.assert_array_equal(tokens.numpy()[clear], want[clear], err_msg=f"{kind} {filters.keys()}")
            assert (tokens >= 0).all() and (tokens < vocab_size).all()
            skipped, compared = skipped + int((~clear[2:]).sum()), compared + 8
    assert skipped <= 0.12 * compared  # float32 weights of 5000 flat ids leave little room between ids


def test_uniforms_next_to_zero_and_one_stay_in_the_support(ops):
    logits = torch.full((4, 3000), -torch.inf)
    logits[:, 1000], logits[:, 2500] = 0.0, -40.0
    uniforms = torch.tensor([0.0, 5e-324, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    tokens, status = ops.sample(logits, uniforms=uniforms)
    assert tokens[:3].tolist() == [1000] * 3 and int(tokens[3]) in (1000, 2500)
    assert (status == 0).all()
    only, _ = ops.sample(logits, uniforms=uniforms, top_k=1)
    assert only.tolist() == [1000] * 4


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}], ids=str)
def test_race_by_chi_square(backend, filters):
    """40,000 draws at |z| < 4 (p about 6e-5 per test); wrong temperature and wrong noise must be rejected.

    simt: 5,000 draws, which see a temperature only where it is wrong by more."""
    ops, vocab_size = backend.ops, 60
    draws, warmer = (5_000, 1.4) if backend.name == "simt" else (40_000, 1.1)
    logits = rows("normal", 1, vocab_size, torch.float32, seed=4) / 2
    keys = {"seed": torch.arange(draws) // 8, "offset": torch.arange(draws) % 8}  # neighbouring seeds and positions
    probs = reference.law(logits[0].double().numpy(), reference.Filters(**filters)).probs

    def z(**chosen) -> float:
        tokens, _ = ops.sample(logits.expand(draws, vocab_size), **keys, **chosen)
        counts = np.bincount(tokens.numpy(), minlength=vocab_size)
        return chi_square_z(counts[probs > 0], probs[probs > 0]) if counts[probs == 0].sum() == 0 else np.inf

    assert abs(z(**filters)) < 4
    assert z(**{**filters, "temperature": warmer * filters.get("temperature", 1.0)}) > 6
    uniform_noise = torch.rand(40_000, vocab_size, generator=generator(8)).log()  # wrong: log v instead of -log(-log v)
    row = torch.from_numpy(np.where(probs > 0, np.log(np.maximum(probs, 1e-300)), -np.inf).astype(np.float32))
    counts = np.bincount((row + uniform_noise).argmax(1).numpy(), minlength=vocab_size)
    assert chi_square_z(counts[probs > 0], probs[probs > 0]) > 6


def test_neighbouring_positions_are_independent(backend):
    """Joint counts of the tokens at (seed, t) and (seed, t + 1) against the product law."""
    ops, draws, vocab_size = backend.ops, 5_000 if backend.name == "simt" else 30_000, 8
    logits = rows("normal", 1, vocab_size, torch.float32, seed=6) / 3
    probs = reference.law(logits[0].double().numpy()).probs
    seed, at = torch.arange(draws), torch.full((draws,), 1000)
    first, _ = ops.sample(logits.expand(draws, -1), seed=seed, offset=at)
    second, _ = ops.sample(logits.expand(draws, -1), seed=seed, offset=at + 1)
    joint = np.bincount((first * vocab_size + second).numpy(), minlength=vocab_size**2)
    assert abs(chi_square_z(joint, np.outer(probs, probs).ravel())) < 4
    same = np.bincount((first * vocab_size + first).numpy(), minlength=vocab_size**2)  # negative control
    assert chi_square_z(same, np.outer(probs, probs).ravel()) > 6


# ----------------------------------------------------------------------------------------------------------------------
# Rows, views, edges


def test_temperature_zero_is_greedy_for_any_randomness(ops):
    logits = torch.tensor([[0.0, 7.0, 7.0], [3.0, -torch.inf, 3.0]])
    for random in ({"uniforms": torch.tensor([0.999, 0.999], dtype=torch.float64)}, seeds(2)):
        assert ops.sample(logits, temperature=0.0, **random)[0].tolist() == [1, 0]


def test_lone_id_is_drawn_by_every_seed(ops):
    """The noise is capped: were v to round to 1, the only id would have key -inf."""
    logits = torch.full((4000, 5), -torch.inf)
    logits[:, 3] = -1e4
    tokens, status = ops.sample(logits, seed=torch.arange(4000), offset=torch.zeros(4000, dtype=torch.int64))
    assert (tokens == 3).all() and (status == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broken_and_inactive_rows(ops, dtype):
    logits = rows("normal", 5, 77, dtype)
    logits[1, 76], logits[2, 3] = torch.nan, torch.inf
    logits[3] = -torch.inf
    logits[4] = torch.nan
    active = torch.tensor([True, True, True, True, False])
    for random in (seeds(5), {"uniforms": torch.full((5,), 0.3, dtype=torch.float64)}):
        tokens, status = ops.sample(logits, top_p=0.8, active=active, **random)
        clean, _ = ops.sample(logits[:1], top_p=0.8, **{k: t[:1] for k, t in random.items()})
        assert status.tolist() == [0, 1, 1, 2, 0]
        assert tokens.tolist() == [int(clean), -1, -1, -1, -1]


def test_bans_and_min_lengths(ops):
    logits = torch.tensor([[0.0, 9.0, 5.0]] * 3)
    arguments = {"ban_ids": torch.tensor([[1, -1], [1, 2], [-1, -1]]), "temperature": 0.0}
    assert ops.sample(logits, **arguments, **seeds(3))[0].tolist() == [2, 0, 1]
    offset = torch.tensor([4, 4, 4])
    minimum = {"min_lengths": torch.tensor([[4, 0], [5, 4], [9, 9]]), "offset": offset, **arguments}
    assert ops.sample(logits, seed=torch.zeros(3, dtype=torch.int64), **minimum)[0].tolist() == [1, 2, 1]
    assert ops.sample(logits, uniforms=torch.zeros(3, dtype=torch.float64), **minimum)[0].tolist() == [1, 2, 1]


def test_views(ops):
    logits = rows("normal", 6, 333, torch.float32)
    want = ops.sample(logits, top_p=0.9, **seeds(6))
    for name, view in views(logits):
        assert_same(want, ops.sample(view, top_p=0.9, **seeds(6)), name)
    one = ops.sample(logits[:1].expand(6, 333), **seeds(6))
    assert_same(one, ops.sample(logits[:1].repeat(6, 1), **seeds(6)), "stride 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(ops, check_rows_independent, dtype):
    logits = rows("normal", 9, 5000, dtype)
    uniforms = torch.rand(9, generator=generator(2), dtype=torch.float64)
    for filters in ({}, some_filters(9)):
        check_rows_independent(ops.sample, {"logits": logits, **seeds(9), **filters})
        check_rows_independent(ops.sample, {"logits": logits, "uniforms": uniforms, **filters})


def test_arguments_that_conflict(ops):
    logits, uniforms, keys = torch.zeros(2, 4), torch.zeros(2, dtype=torch.float64), seeds(2)
    for wrong in (
        {},
        {"uniforms": uniforms, "seed": keys["seed"], "offset": keys["offset"]},
        {"uniforms": uniforms, "offset": keys["offset"]},
        {"seed": keys["seed"]},
        {"offset": keys["offset"]},
        {"uniforms": uniforms, "seed": keys["seed"]},
    ):
        with raises("^sample: "):
            ops.sample(logits, **wrong)


def test_empty_batch(ops):
    tokens, status = ops.sample(torch.zeros(0, 5), uniforms=torch.zeros(0, dtype=torch.float64))
    assert tokens.shape == status.shape == (0,)


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
        "active": torch.tensor([True, False, True]),
    }
    keys, half = seeds(3), torch.full((3,), 0.5, dtype=torch.float64)
    check_op(lambda: ops.sample(logits, **keys))
    check_op(lambda: ops.sample(logits, **keys, stream=3, node=2, **everything))
    check_op(lambda: ops.sample(logits.double(), uniforms=half))
    check_op(lambda: ops.sample(logits, uniforms=half, offset=keys["offset"], **everything))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    logits, keys = rows("normal", 3, 33, torch.float32), seeds(3)
    check_op(lambda: ops.sample(logits, **keys, top_k=4), inductor=True)
