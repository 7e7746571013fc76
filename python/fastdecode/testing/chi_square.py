"""Counts against a law, for what cannot be enumerated."""

from __future__ import annotations

import numpy as np

__all__ = ["chi_square_z", "pooled_bins"]


def pooled_bins(counts: np.ndarray, probs: np.ndarray, min_expected: float = 10.0) -> tuple[np.ndarray, np.ndarray]:
    """Observed and expected counts, float64, where unlikely outcomes share a bin.

    Outcomes join in order of rising expectation until a bin holds `min_expected`, below which the chi-square law does
    not hold; an incomplete last bin joins the one before it.

    Args:
        counts: draws per outcome, any shape.
        probs: probability of each outcome, the same shape, sum 1.
    Raises:
        ValueError: shapes that differ, probabilities that do not sum to 1, a draw of an outcome of probability 0.
    """
    if counts.shape != probs.shape:
        raise ValueError(f"pooled_bins: probs: expected shape {counts.shape}, got {probs.shape}")
    observed, expected = counts.astype(np.float64).ravel(), np.asarray(probs, dtype=np.float64).ravel()
    if not abs(expected.sum() - 1) < 1e-4:
        raise ValueError(f"pooled_bins: probs: expected the sum 1, got {expected.sum():.6g}")
    if (observed[expected == 0] > 0).any():
        at = int(np.flatnonzero((expected == 0) & (observed > 0))[0])
        raise ValueError(f"pooled_bins: counts: expected no draw of outcome {at} of probability 0, got {observed[at]}")
    expected = expected * observed.sum()
    bins: list[list[float]] = [[0.0, 0.0]]
    for i in np.argsort(expected):
        if bins[-1][1] >= min_expected:
            bins.append([0.0, 0.0])
        bins[-1][0] += observed[i]
        bins[-1][1] += expected[i]
    if len(bins) > 1 and bins[-1][1] < min_expected:
        low = bins.pop()
        bins[-1] = [bins[-1][0] + low[0], bins[-1][1] + low[1]]
    table = np.array(bins)
    return table[:, 0], table[:, 1]


def chi_square_z(counts: np.ndarray, probs: np.ndarray, min_expected: float = 10.0) -> float:
    """Chi-square of counts against probabilities, over pooled bins, as a standard normal deviate.

    Wilson and Hilferty 1931: |z| < 4 keeps a right sampler with p = 1 - 6e-5. Every test needs its negative control, a
    wrong sampler for which z is large at the same number of draws.

    Args:
        counts: draws per outcome, any shape.
        probs: probability of each outcome, the same shape, sum 1.
        min_expected: see `pooled_bins`.
    Raises:
        ValueError: as `pooled_bins`.
    """
    observed, expected = pooled_bins(counts, probs, min_expected)
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = max(len(observed) - 1, 1)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))
