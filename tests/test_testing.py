"""The test kit tests itself: right toys pass, wrong ones do not."""

from __future__ import annotations

import doctest
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastdecode.testing
from fastdecode.generation import generate
from fastdecode.testing import (
    Law,
    Model,
    chi_square_z,
    exact_law,
    law_error,
    pooled_bins,
    random_model,
    sequence_law,
    speculative_law,
)
from fastdecode.testing.drafters import Known, Random, ragged
from fastdecode.testing.models import Broken, Chain, noisy

V = 4


def test_documented_examples_run():
    result = doctest.testmod(fastdecode.testing)
    assert result.attempted == 7 and result.failed == 0


def test_imports_without_a_test_framework():
    code = "import sys, fastdecode.testing; print([m for m in ('pytest', '_pytest', 'hypothesis') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_everything_public_is_documented():
    from fastdecode.testing import chi_square, drafters, law, models, reference

    modules = [chi_square, drafters, law, models, reference.rng, reference.sample, reference.verify]
    for module in [fastdecode.testing, reference, *modules]:
        assert module.__doc__
        for name in module.__all__:
            value = getattr(module, name)
            assert not callable(value) or isinstance(value, type(Law)) or value.__doc__, f"{module.__name__}.{name}"


# ----------------------------------------------------------------------------------------------------------------------
# A verifier of two draft tokens in plain Python, and ways to get it wrong (Leviathan et al. 2023)


def softmax(model: Model) -> Model:
    def probs(context: tuple[int, ...]) -> np.ndarray:
        weights = np.exp(model(context))
        return weights / weights.sum()

    return probs


TARGET, DRAFT = softmax(random_model(V, seed=1)), softmax(random_model(V, seed=2))


def verify(draft: tuple[int, ...], uniforms: np.ndarray, mistake: str = "") -> list[int]:
    """One round: accepted drafts and the token after them."""
    emitted: list[int] = []
    for i, x in enumerate(draft):
        p, q = TARGET(draft[:i]), DRAFT(draft[:i])
        if mistake == "no ratio":
            accepted = uniforms[i] < p[x]
        elif mistake == "one uniform for all":
            accepted = uniforms[0] * q[x] < p[x]
        elif mistake == "threshold off by 1e-9":
            accepted = uniforms[i] * q[x] < p[x] + 1e-9
        else:
            accepted = uniforms[i] * q[x] < p[x]
        if not accepted:
            weights = p if mistake == "no residual" else np.maximum(p - q, 0)
            return [*emitted, draw(weights, uniforms[-1])]
        emitted.append(x)
    return [*emitted, draw(TARGET(draft[:1] if mistake == "bonus of the wrong row" else draft), uniforms[-1])]


def draw(weights: np.ndarray, uniform: float) -> int:
    return int(np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right"))


def error(mistake: str, length: int = 2) -> float:
    drafts = list(itertools.product(range(V), repeat=length))

    def outcome(case: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        rows = [verify(drafts[c], u, mistake) for c, u in zip(case, uniforms)]
        return np.array([row + [-1] * (length + 1 - len(row)) for row in rows])

    laws = exact_law(outcome, length + 1, len(drafts), grid=5)
    for law in laws:
        assert abs(sum(law.values()) - 1) < 1e-12
    weights = [float(np.prod([DRAFT(x[:i])[x[i]] for i in range(length)])) for x in drafts]
    got = speculative_law(list(zip(weights, laws)), TARGET, length + 1)
    return law_error(got, sequence_law(TARGET, length + 1))


@pytest.mark.parametrize("length", [1, 2])
def test_law_accepts_a_right_verifier(length):
    assert error("", length) < 1e-12


@pytest.mark.parametrize("mistake", ["no ratio", "no residual", "one uniform for all", "bonus of the wrong row"])
def test_law_rejects_wrong_verifiers(mistake):
    assert error(mistake) > 1e-3


def test_law_sees_what_no_histogram_would():
    assert 1e-11 < error("threshold off by 1e-9") < 1e-8


def test_exact_law_of_steps_that_are_known():
    """Thresholds in both coordinates, the second depending on the first, and steps finer than the grid."""

    def outcome(case: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        first = uniforms[:, 0] < np.array([0.3, 1e-13])[case]
        return np.stack([first, uniforms[:, 1] < np.where(first, 0.25, 0.999)], 1).astype(np.int64)

    left, right = exact_law(outcome, 2, 2)
    want = {(1, 1): 0.075, (1, 0): 0.225, (0, 1): 0.7 * 0.999, (0, 0): 0.7 * 0.001}
    assert law_error(left, want) < 1e-15
    assert abs(right[1, 1] + right[1, 0] - 1e-13) < 1e-16
    assert law_error({(0,): 1.0}, {(1,): 1.0}) == 1.0


def test_sequence_law_sums_to_one_and_starts_with_its_prefix():
    law = sequence_law(TARGET, 3, (2,))
    assert all(x[0] == 2 and len(x) == 3 for x in law) and abs(sum(law.values()) - 1) < 1e-12
    assert sequence_law(TARGET, 1, (2, 3)) == {(2,): 1.0}


# ----------------------------------------------------------------------------------------------------------------------
# Chi-square


def test_chi_square_of_right_and_wrong_samplers():
    probs = np.random.default_rng(0).dirichlet(np.full(30, 0.3))
    z = [chi_square_z(np.random.default_rng(seed).multinomial(20_000, probs), probs) for seed in range(200)]
    assert abs(np.mean(z)) < 0.25 and 0.8 < np.std(z) < 1.2 and max(np.abs(z)) < 4.5
    wrong = probs * np.linspace(0.85, 1.15, 30)
    assert chi_square_z(np.random.default_rng(1).multinomial(20_000, wrong / wrong.sum()), probs) > 6


def test_pooled_bins_keep_the_sums_and_reach_the_minimum():
    probs = np.array([[0.0, 1e-4], [2e-4, 0.0097], [0.09, 0.9]])
    counts = np.array([[0, 1], [0, 2], [14, 183]])
    observed, expected = pooled_bins(counts, probs)
    assert observed.sum() == 200 and abs(expected.sum() - 200) < 1e-9 and (expected >= 10).all()
    assert len(observed) == 2
    few, _ = pooled_bins(np.array([1, 2]), np.array([0.5, 0.5]))
    assert few.tolist() == [3]


def test_pooled_bins_refuse_what_cannot_be():
    with pytest.raises(ValueError, match=r"pooled_bins: counts: expected no draw of outcome 1 of probability 0, got 2"):
        pooled_bins(np.array([1, 2]), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"pooled_bins: probs: expected shape \(2,\), got \(3,\)"):
        pooled_bins(np.array([1, 2]), np.full(3, 1 / 3))
    with pytest.raises(ValueError, match=r"pooled_bins: probs: expected the sum 1, got 0\.9"):
        chi_square_z(np.array([1, 2]), np.array([0.5, 0.4]))


# ----------------------------------------------------------------------------------------------------------------------
# Models and drafters


def test_scripted_models_and_drafters():
    chain = Chain(7)
    plain = generate(chain, [2], max_new_tokens=10)
    assert plain.tokens == [(3 + i) % 7 for i in range(10)]
    text = [2, *plain.tokens]
    passes = []
    for shift in (0, 3):
        result = generate(chain, [2], method=Known([text], 7, shift), draft_length=4, max_new_tokens=10)
        assert result.tokens == plain.tokens
        passes.append(result.statistics.target_passes)
    assert passes == [2, 10]
    result = generate(chain, [2], method=Random(7), draft_length=4, max_new_tokens=10)
    assert result.tokens == plain.tokens
    half = noisy(chain, noise=3.0)
    kept = generate(chain, [2], method="speculative", draft_model=half, max_new_tokens=10).statistics
    assert torch.allclose(noisy(chain, noise=0.0).table, chain.table) and kept.drafted > 0


def test_broken_model_ends_its_request_only():
    results = generate(Broken(Chain(7), marked=3, first=2), [[3], [4]], max_new_tokens=5)
    assert [result.finish_reason for result in results] == ["error", "length"]
    assert results[1].tokens == [5, 6, 0, 1, 2]


def test_ragged():
    draft = ragged([[1, 2, 3], [], [4]])
    assert draft.tokens.tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]] and draft.lens.tolist() == [3, 0, 1]
