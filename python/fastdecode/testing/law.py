"""The exact law of an op, recovered through the op.

Given its uniforms, an op is a function from [0, 1)^n to outcomes, and a step function of each coordinate when the
others are fixed. `exact_law` finds every step by bisection in float64 and returns the measure of each outcome, so an
op's distribution is known to about 1e-15 instead of to the noise of a chi-square test.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["Law", "Model", "Outcome", "exact_law", "law_error", "random_model", "sequence_law", "speculative_law"]

# outcome(case int64 [R], uniforms float64 [R, n]) -> int64 [R, m]: R independent rows of one op call.
Outcome = Callable[[np.ndarray, np.ndarray], np.ndarray]
Law = dict[tuple[int, ...], float]

LAST = float(np.nextafter(1.0, 0.0))
_STEPS = 80  # 53 halvings separate doubles near 1; near 0 the measure below 2^-80 does not matter


def _fingerprints(
    outcome: Outcome, case: np.ndarray, prefix: np.ndarray, value: np.ndarray, probes: np.ndarray
) -> np.ndarray:
    """What is left of the op once coordinates 0..j are fixed, seen at a few values of the later ones: [R, ...]."""
    rows, count = value.size, probes.shape[0]
    uniforms = np.concatenate(
        [np.repeat(prefix, count, 0), np.repeat(value, count)[:, None], np.tile(probes, (rows, 1))], axis=1
    )
    return outcome(np.repeat(case, count), uniforms).reshape(rows, -1)


def exact_law(outcome: Outcome, num_uniforms: int, num_cases: int = 1, *, grid: int = 9, seed: int = 0) -> list[Law]:
    """Measure of every outcome, per case.

    Coordinates are split in the order in which the op uses them, so that a coordinate's steps are seen in the outcome
    itself: two values of a coordinate are taken as equivalent when the op agrees at `probes` of the later ones. Steps
    narrower than the grid are still found when the values on their two sides differ (a threshold, an inverse CDF).

    Args:
        outcome: the op, on many rows at once: outcome(case, uniforms) -> int64 [R, m], where row r has the inputs of
            case[r] (int64 [R]) and the uniforms uniforms[r] (float64 [R, num_uniforms], in [0, 1)). Rows must not
            depend on each other, and a row's outcome on nothing but its case and its uniforms.
        num_uniforms: how many uniforms a row takes, in the order in which the op uses them.
        num_cases: how many different inputs there are.
        grid: points per coordinate from which steps are searched; more find steps between equal outcomes.
        seed: of the grid and the probes.
    Returns:
        one dictionary per case: outcome -> probability.
    """
    generator = np.random.default_rng(seed)
    case = np.arange(num_cases)
    prefix = np.zeros((num_cases, 0))
    measure = np.ones(num_cases)
    for coordinate in range(num_uniforms):
        later = num_uniforms - coordinate - 1
        probes = generator.random((3 if later else 1, later))
        points = np.concatenate([[0.0], np.sort(generator.random(grid)), [LAST]])
        shape = (case.size, points.size)
        seen = _fingerprints(
            outcome, np.repeat(case, points.size), np.repeat(prefix, points.size, 0), np.tile(points, case.size), probes
        ).reshape(*shape, -1)

        # Brackets (node, low, high) whose ends differ; halved until the doubles are adjacent.
        node, cell = np.nonzero((seen[:, 1:] != seen[:, :-1]).any(-1))
        low, high = points[cell], points[cell + 1]
        at_low, at_high = seen[node, cell], seen[node, cell + 1]
        for _ in range(_STEPS):
            middle = low + (high - low) / 2
            live = (middle > low) & (middle < high)
            if not live.any():
                break
            at_middle = at_low.copy()
            at_middle[live] = _fingerprints(outcome, case[node[live]], prefix[node[live]], middle[live], probes)
            left, right = (at_middle != at_low).any(-1) & live, (at_middle != at_high).any(-1) & live
            closed = ~live
            keep_left, keep_right = left | closed, right & live
            node = np.concatenate([node[keep_left], node[keep_right]])
            low, high, at_low, at_high = (
                np.concatenate([low[keep_left], middle[keep_right]]),
                np.concatenate([np.where(live, middle, high)[keep_left], high[keep_right]]),
                np.concatenate([at_low[keep_left], at_middle[keep_right]]),
                np.concatenate([np.where(live[:, None], at_middle, at_high)[keep_left], at_high[keep_right]]),
            )

        # Children: the intervals between breakpoints, each represented by a value inside it.
        children: list[tuple[int, float, float]] = []
        for n in range(case.size):
            edges = [0.0, *np.unique(high[node == n]), 1.0]
            children += [(n, value, after - value) for value, after in itertools.pairwise(edges) if after > value]
        parent = np.array([c[0] for c in children])
        # A value half-way into its interval stays clear of the rounding at the step itself.
        start, width = np.array([c[1] for c in children]), np.array([c[2] for c in children])
        inside = np.minimum(start + width / 2, LAST)
        prefix = np.concatenate([prefix[parent], inside[:, None]], axis=1)
        case, measure = case[parent], measure[parent] * width

    laws: list[Law] = [defaultdict(float) for _ in range(num_cases)]
    for c, weight, row in zip(case, measure, outcome(case, prefix)):
        laws[c][tuple(int(x) for x in row)] += float(weight)
    return [dict(law) for law in laws]


def law_error(left: Law, right: Law) -> float:
    """Largest difference of the probabilities of any outcome."""
    return float(max(abs(left.get(k, 0.0) - right.get(k, 0.0)) for k in left.keys() | right.keys()))


# ----------------------------------------------------------------------------------------------------------------------
# Tabular language models: the next-token distribution after every context, as plain dictionaries.

Model = Callable[[tuple[int, ...]], np.ndarray]


def random_model(vocab_size: int, seed: int, sharpness: float = 1.5) -> Model:
    """Float64 logits per context, fixed by the seed and the context alone."""

    def logits(context: tuple[int, ...]) -> np.ndarray:
        return sharpness * np.random.default_rng([seed, len(context), *context]).normal(size=vocab_size)

    return logits


def sequence_law(probs: Model, length: int, prefix: tuple[int, ...] = ()) -> Law:
    """Joint law of `length` tokens of which `prefix` is given: the product of the model's rows."""
    law: Law = {prefix[:length]: 1.0}
    for _ in range(length - min(length, len(prefix))):
        law = {
            (*context, x): weight * float(p)
            for context, weight in law.items()
            for x, p in enumerate(probs(context))
            if p > 0
        }
    return law


def speculative_law(emitted: Sequence[tuple[float, Law]], probs: Model, length: int) -> Law:
    """Joint law of the first `length` tokens when one round verifies a draft and the target continues alone.

    Args:
        emitted: per draft that may be proposed, its probability and the law of the tokens that the round emits for it
            (as from `exact_law`; negative ids are padding).
        probs: the target's rows.
        length: how many tokens to compare; longer emissions are cut.
    """
    total: Law = defaultdict(float)
    for draft_weight, tokens_law in emitted:
        for tokens, weight in tokens_law.items():
            prefix = tuple(t for t in tokens if t >= 0)
            for sequence, continued in sequence_law(probs, length, prefix).items():
                total[sequence] += draft_weight * weight * continued
    return dict(total)
