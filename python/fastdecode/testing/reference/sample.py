"""The target law of a row of logits, and draws from it, in extended precision.

NumPy in long double (80 bits on x86) instead of torch float64, so that float64 kernels have a better reference
than themselves. One row at a time, sorted where the kernels select: slow and obviously right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rng

__all__ = [
    "NAN",
    "NO_MASS",
    "REAL",
    "UNMAPPED",
    "Filters",
    "Row",
    "Stats",
    "compute_dtype",
    "draw",
    "inverse_cdf",
    "law",
    "laws",
    "numpy_row",
    "race",
    "row_filters",
    "row_stats",
    "rows_of",
    "sample",
    "target_probs",
    "token_logprobs",
]

REAL = np.longdouble
NAN, NO_MASS, UNMAPPED = 1, 2, 4


@dataclass(frozen=True)
class Filters:
    """Sampling parameters of one row; the defaults leave softmax(logits). Ban positions are resolved by the caller."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    bias: np.ndarray | None = None  # [V], added to the logits
    bans: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """What the law makes of one row."""

    weights: np.ndarray  # [V] long double, unnormalised, exp(z) where kept and 0 elsewhere
    scores: np.ndarray  # [V] z in the compute dtype (float32, float64 for float64 logits), -inf where not kept
    logprobs: np.ndarray  # [V] long double, finite where kept even if exp(z) underflows
    status: int
    margin: float  # relative distance of the nearest filter decision from flipping; 0 = a tie in exact arithmetic

    @property
    def probs(self) -> np.ndarray:
        """Weights over their sum; zeros for a row in error."""
        total = self.weights.sum()
        return self.weights / total if total > 0 else self.weights


def numpy_row(row: Tensor) -> np.ndarray:
    """A tensor of any dtype as float64, which holds all of them exactly."""
    return row.detach().cpu().double().numpy()


def compute_dtype(tensor: Tensor) -> type:
    """What an op computes rows of this dtype in."""
    return np.float64 if tensor.dtype == torch.float64 else np.float32


def _broken(vocab_size: int, status: int, compute: type) -> Row:
    nothing = np.full(vocab_size, -np.inf)
    return Row(np.zeros(vocab_size, REAL), nothing.astype(compute), nothing.astype(REAL), status, np.inf)


def law(row: np.ndarray, filters: Filters = Filters(), compute: type = np.float64) -> Row:
    """Logits + bias, bans, temperature, top-k, top-p, min-p; each filter sees the renormalised result before it."""
    logits: np.ndarray = row.astype(compute)
    if filters.bias is not None:
        logits = logits + filters.bias.astype(compute)  # in the compute dtype, as the contract's z is
    logits = logits.copy()
    logits[list(filters.bans)] = -np.inf
    vocab_size = logits.size
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return _broken(vocab_size, NAN, compute)
    if not np.isfinite(logits).any():
        return _broken(vocab_size, NO_MASS, compute)

    order = np.argsort(-logits, kind="stable")  # larger first, lower id first among equals
    order = order[np.isfinite(logits[order])]
    if filters.temperature <= 0:
        weights = np.zeros(vocab_size, REAL)
        scores: np.ndarray = np.full(vocab_size, -np.inf, compute)
        weights[order[0]], scores[order[0]] = 1, 0
        return Row(weights, scores, scores.astype(REAL), 0, np.inf)

    largest = logits[order[0]]
    temperature = compute(np.float32(filters.temperature))
    scores = -((largest - logits) / temperature)
    exponent = (logits.astype(REAL) - REAL(largest)) / REAL(temperature)
    exact = np.exp(exponent)
    margin = np.inf
    if 0 < filters.top_k < vocab_size:
        order = order[: filters.top_k]
    if filters.top_p < 1:
        top_p = REAL(np.float32(filters.top_p))
        before = np.cumsum(exact[order]) - exact[order]
        keep = before < top_p * exact[order].sum()
        keep[0] = True  # "the id that crosses p is kept": never an empty nucleus
        margin = min(margin, float(np.abs(before / exact[order].sum() - top_p).min()))
        order = order[keep]
    if filters.min_p > 0:
        min_p = REAL(np.float32(filters.min_p))
        relative = exact[order] / exact[order].max()
        keep = (relative >= min_p) | (relative == 1)  # the largest, and its ties, always stay
        margin = min(margin, float(np.abs(relative[relative < 1] / min_p - 1).min(initial=np.inf)))
        order = order[keep]
    kept = np.zeros(vocab_size, bool)
    kept[order] = True
    weights = np.where(kept, exact, 0)
    logprobs = np.where(kept, exponent - np.log(weights.sum()), -np.inf)
    return Row(weights, np.where(kept, scores, -np.inf).astype(compute), logprobs, 0, margin)


def inverse_cdf(weights: np.ndarray, uniform: float) -> tuple[int, float]:
    """First id whose cumulative weight exceeds uniform * total, and how far (in probability) it is from another id."""
    total = weights.sum()
    if not total > 0:
        return -1, np.inf
    cumulative, aim = np.cumsum(weights), REAL(uniform) * total
    above = np.flatnonzero(cumulative > aim)
    token = int(above[0]) if above.size else int(np.flatnonzero(weights > 0)[-1])
    below = cumulative[token] - weights[token]
    gaps = [abs(float((cumulative[token] - aim) / total))] if token < np.flatnonzero(weights > 0)[-1] else []
    gaps += [abs(float((aim - below) / total))] if token > np.flatnonzero(weights > 0)[0] else []
    return token, min(gaps, default=np.inf)


def race(scores: np.ndarray, noise: np.ndarray) -> tuple[int, float]:
    """argmax of scores + noise over ids of finite score, and the lead of the winner over the second."""
    alive = np.flatnonzero(scores > -np.inf)
    if alive.size == 0:
        return -1, np.inf
    keys = (scores + noise.astype(scores.dtype))[alive]
    winner = int(np.argmax(keys))
    rest = np.delete(keys, winner)
    return int(alive[winner]), float(keys[winner] - rest.max()) if rest.size else np.inf


def draw(
    row: Row, *, uniform: float | None = None, seed: int = 0, offset: int = 0, stream: int = rng.TOKEN, node: int = 0
) -> tuple[int, float]:
    """Token of one row and the margin of the decision: by inverse CDF from a uniform, else by the seeded race."""
    if row.status:
        return -1, np.inf
    if uniform is not None:
        token, margin = inverse_cdf(row.weights, uniform)
    else:
        token, margin = race(row.scores, rng.row_noise(seed, offset, row.scores.size, stream, node))
    return token, min(margin, row.margin)


# ----------------------------------------------------------------------------------------------------------------------
# Whole-tensor forms with the ops' own arguments.


def row_filters(
    b: int,
    i: int,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    bias: Tensor | None = None,
    ban_ids: Tensor | None = None,
    min_lengths: Tensor | None = None,
    offset: Tensor | None = None,
) -> Filters:
    """Parameters of request b, row i, from tensors [B] (or None)."""

    def pick(value: Tensor | None, off: float) -> Any:
        return off if value is None else value[b].item()

    bans = []
    for s in range(0 if ban_ids is None else ban_ids.shape[1]):
        assert ban_ids is not None
        banned = int(ban_ids[b, s])
        held = min_lengths is None or offset is None or int(offset[b]) + i < int(min_lengths[b, s])
        if banned >= 0 and held:
            bans.append(banned)
    row_bias = None if bias is None else numpy_row(bias if bias.dim() == 1 else bias[b])
    return Filters(pick(temperature, 1.0), pick(top_k, 0), pick(top_p, 1.0), pick(min_p, 0.0), row_bias, tuple(bans))


def rows_of(logits: Tensor) -> list[tuple[int, int, tuple]]:
    """(request, row within it, index) of every row of [B, V] or [B, n, V]."""
    if logits.dim() == 2:
        return [(b, 0, (b,)) for b in range(logits.shape[0])]
    return [(b, i, (b, i)) for b in range(logits.shape[0]) for i in range(logits.shape[1])]


def laws(logits: Tensor, **filters: Any) -> dict[tuple, Row]:
    """The law of every row, by index."""
    compute = compute_dtype(logits)
    return {at: law(numpy_row(logits[at]), row_filters(b, i, **filters), compute) for b, i, at in rows_of(logits)}


def target_probs(logits: Tensor, **filters: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """probs (long double), status, margin of each row's filter decisions."""
    probs = np.zeros(tuple(logits.shape), REAL)
    status = np.zeros(tuple(logits.shape[:-1]), np.int32)
    margin = np.full(tuple(logits.shape[:-1]), np.inf)
    for at, row in laws(logits, **filters).items():
        probs[at], status[at], margin[at] = row.probs, row.status, row.margin
    return probs, status, margin


def sample(
    logits: Tensor,
    *,
    uniforms: Tensor | None = None,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    stream: int = 0,
    node: int = 0,
    **filters: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, status, margin."""
    if filters.get("min_lengths") is not None:
        filters["offset"] = offset
    tokens, status, margin = (np.zeros(logits.shape[0], t) for t in (np.int64, np.int32, np.float64))
    for (b,), row in laws(logits, **filters).items():
        if uniforms is not None:
            tokens[b], margin[b] = draw(row, uniform=float(uniforms[b]))
        else:
            assert seed is not None and offset is not None
            tokens[b], margin[b] = draw(row, seed=int(seed[b]), offset=int(offset[b]), stream=stream, node=node)
        status[b] = row.status
    return tokens, status, margin


@dataclass(frozen=True)
class Stats:
    """See `row_stats`."""

    max: float | np.longdouble
    argmax: int
    second: float | np.longdouble
    logsumexp: float | np.longdouble
    entropy: float | np.longdouble
    status: int


def row_stats(row: np.ndarray) -> Stats:
    """Statistics of one row of raw logits, entropy of softmax(row) in nats."""
    if np.isnan(row).any() or np.isposinf(row).any():
        return Stats(0, -1, 0, 0, 0, NAN)
    if np.isneginf(row).all():
        return Stats(0, -1, 0, 0, 0, NO_MASS)
    values = row.astype(REAL)
    largest = values.max()
    second = np.sort(values)[-2] if row.size > 1 else REAL(-np.inf)
    logsumexp = largest + np.log(np.exp(values - largest).sum())
    finite = values[np.isfinite(values)]
    entropy = -(np.exp(finite - logsumexp) * (finite - logsumexp)).sum()
    return Stats(largest, int(np.argmax(row)), second, logsumexp, entropy, 0)


def token_logprobs(
    logits: Tensor, tokens: Tensor, *, filtered: bool = False, top: int = 0, **filters: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """logprobs (long double), top_ids, top_logprobs, status, margin; rows in error: 0, -1, 0."""
    lead = tuple(logits.shape[:-1])
    logprobs, status, margin = np.zeros(lead, REAL), np.zeros(lead, np.int32), np.full(lead, np.inf)
    top_ids, top_logprobs = np.full((*lead, top), -1, np.int64), np.full((*lead, top), -np.inf, REAL)
    for b, i, at in rows_of(logits):
        row = law(numpy_row(logits[at]), row_filters(b, i, **filters) if filtered else Filters(), compute_dtype(logits))
        token = int(tokens[at])
        status[at], margin[at] = row.status, row.margin
        if row.status:
            top_logprobs[at] = 0
            continue
        values = row.logprobs
        order = np.argsort(-values, kind="stable")[:top]
        order = order[np.isfinite(values[order])]
        top_ids[at][: order.size], top_logprobs[at][: order.size] = order, values[order]
        if 0 <= token < values.size:
            logprobs[at] = values[token]
        elif token != -1:
            status[at] = UNMAPPED
    return logprobs, top_ids, top_logprobs, status, margin
