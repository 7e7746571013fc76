"""The target law of a row of logits, and draws from it, in extended precision.

NumPy in long double (80 bits on x86) instead of torch float64, so that float64 kernels have a better reference
than themselves. One row at a time, sorted where the kernels select: slow and obviously right.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
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
    "allowed_logits",
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
    "shortest_prefix",
    "target_probs",
    "token_logprobs",
    "topk_logits",
    "typical",
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
    bitmask: np.ndarray | None = None  # int32 [ceil(V / 32)], bit id & 31 of word id >> 5, 1 = allowed
    typical_p: float = 1.0
    order: str | int = "k_then_p"  # or "joint"


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


def allowed_logits(row: np.ndarray, filters: Filters, compute: type) -> tuple[np.ndarray, int]:
    """Logits + bias in the compute dtype, -inf where banned or masked; and the row's status.

    NaN and +inf break the row wherever they stand, in forbidden ids too.
    """
    logits: np.ndarray = row.astype(compute)
    if filters.bias is not None:
        with np.errstate(invalid="ignore"):
            logits = logits + filters.bias.astype(compute)
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return logits, NAN
    ids = np.arange(logits.size)
    allowed = ~np.isin(ids, filters.bans)
    if filters.bitmask is not None:
        words = filters.bitmask.astype(np.int64) & 0xFFFFFFFF  # the sign bit is id 31 of its word
        allowed &= (words[ids >> 5] >> (ids & 31) & 1) == 1
    logits = np.where(allowed, logits, compute(-np.inf))
    return logits, 0 if np.isfinite(logits).any() else NO_MASS


def law(row: np.ndarray, filters: Filters = Filters(), compute: type = np.float64) -> Row:
    """Bias, bans, bitmask, temperature, top-k, top-p, min-p, typical; each filter renormalises what is left.

    Order "joint": top-p looks at the law before top-k, and what both keep stays. min-p is relative to the most likely
    id, which both keep, so it has one meaning.
    """
    logits, status = allowed_logits(row, filters, compute)
    vocab_size = logits.size
    if status:
        return _broken(vocab_size, status, compute)

    order = np.argsort(-logits, kind="stable")  # larger first, lower id first among equals
    order = order[np.isfinite(logits[order])]
    if not filters.temperature > 0:
        weights = np.zeros(vocab_size, REAL)
        scores: np.ndarray = np.full(vocab_size, -np.inf, compute)
        weights[order[0]], scores[order[0]] = 1, 0
        return Row(weights, scores, scores.astype(REAL), 0, np.inf)

    largest = logits[order[0]]
    temperature = compute(min(np.float32(filters.temperature), np.finfo(np.float32).max))  # inf / inf is no distance
    scores = -((largest - logits) / temperature)
    exponent = (logits.astype(REAL) - REAL(largest)) / REAL(temperature)
    exact = np.exp(exponent)
    margin = np.inf
    count = filters.top_k if 0 < filters.top_k < vocab_size else vocab_size
    after_top_k = order[:count]
    if filters.top_p < 1:
        top_p = REAL(np.float32(filters.top_p))
        seen = order if filters.order in ("joint", 1) else after_top_k
        nucleus, margin = shortest_prefix(exact[seen], top_p)
        order = seen[: min(count, nucleus)]
    else:
        order = after_top_k
    if filters.min_p > 0:
        min_p = min(REAL(np.float32(filters.min_p)), REAL(1))  # the largest, and its ties, always stay
        relative = exact[order] / exact[order].max()
        keep = relative >= min_p
        margin = min(margin, float(np.abs(relative[relative < 1] / min_p - 1).min(initial=np.inf)))
        order = order[keep]
    if filters.typical_p < 1:
        order, closest = typical(exponent, order, REAL(np.float32(filters.typical_p)))
        margin = min(margin, closest)
    kept = np.zeros(vocab_size, bool)
    kept[order] = True
    weights = np.where(kept, exact, 0)
    logprobs = np.where(kept, exponent - np.log(weights.sum()), -np.inf)
    return Row(weights, np.where(kept, scores, -np.inf).astype(compute), logprobs, 0, margin)


def shortest_prefix(weights: np.ndarray, mass: np.longdouble) -> tuple[int, float]:
    """How many of these weights it takes to reach `mass` of their sum, at least one; distance of that decision."""
    before = (np.cumsum(weights) - weights) / weights.sum()
    keep = before < mass
    keep[0] = True  # "the id that crosses is kept": never an empty nucleus
    return int(keep.sum()), float(np.abs(before[1:] - mass).min(initial=np.inf))


def typical(exponent: np.ndarray, order: np.ndarray, mass: np.longdouble) -> tuple[np.ndarray, float]:
    """Locally typical sampling (Meister et al. 2022, eq. 10): the ids whose surprise is nearest to the entropy.

    exponent: logits over temperature up to a constant, of all ids; order: the ids still in play. Returns those that
    are kept, and the margin: of the mass, and of the order in which unequal ids stand around the last one kept.
    """
    ids = np.sort(order)
    weights = np.exp(exponent[ids])
    probs = weights / weights.sum()
    # -log p - H, in which the logarithm of the sum of the weights cancels
    distance = np.abs(exponent[ids] - (probs * exponent[ids]).sum())
    by_distance = np.argsort(distance, kind="stable")
    ids, probs, distance = ids[by_distance], probs[by_distance], distance[by_distance]
    count, margin = shortest_prefix(probs, mass)
    around = np.abs(distance - distance[count - 1])[exponent[ids] != exponent[ids[count - 1]]]
    return ids[:count], min(margin, float(around.min(initial=np.inf)))


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
    temperature: Tensor | float | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    bias: Tensor | None = None,
    ban_ids: Tensor | None = None,
    min_lengths: Tensor | None = None,
    offset: Tensor | None = None,
    bitmask: Tensor | None = None,
    typical_p: Tensor | float | None = None,
    order: str | int = "k_then_p",
    flat: int | None = None,
) -> Filters:
    """Parameters of row i of request b; of those in a flat list of rows, the one at `flat`."""

    def pick(value: Tensor | float | None, off: float) -> Any:
        return off if value is None else value[b].item() if isinstance(value, Tensor) else value

    bans = []
    for s in range(0 if ban_ids is None else ban_ids.shape[1]):
        assert ban_ids is not None
        banned = int(ban_ids[b, s])
        held = min_lengths is None or offset is None or int(offset[b]) + i < int(min_lengths[b, s])
        if banned >= 0 and held:
            bans.append(banned)
    row_bias = None if bias is None else numpy_row(bias if bias.dim() == 1 else bias[b])
    if bitmask is not None and bitmask.dim() > 1:  # [B, W], [R, W] of flat rows, or [B, n, W]
        bitmask = bitmask[b, i] if bitmask.dim() == 3 else bitmask[b if flat is None else flat]
    return Filters(
        temperature=pick(temperature, 1.0),
        top_k=pick(top_k, 0),
        top_p=pick(top_p, 1.0),
        min_p=pick(min_p, 0.0),
        bias=row_bias,
        bans=tuple(bans),
        bitmask=None if bitmask is None else bitmask.numpy(),
        typical_p=pick(typical_p, 1.0),
        order=order,
    )


def rows_of(logits: Tensor, row_start: Tensor | None = None) -> list[tuple[int, int, tuple]]:
    """(request, row within it, index) of every row of [B, V] or [B, n, V], or of the owned rows of flat [R, V]."""
    if row_start is not None:
        starts = row_start.tolist()
        return [(b, r - first, (r,)) for b, (first, end) in enumerate(pairwise(starts)) for r in range(first, end)]
    if logits.dim() == 2:
        return [(b, 0, (b,)) for b in range(logits.shape[0])]
    return [(b, i, (b, i)) for b in range(logits.shape[0]) for i in range(logits.shape[1])]


def laws(logits: Tensor, row_start: Tensor | None = None, **filters: Any) -> dict[tuple, Row]:
    """The law of every row, by index."""
    compute, made = compute_dtype(logits), {}
    for b, i, at in rows_of(logits, row_start):
        chosen = row_filters(b, i, flat=None if row_start is None else at[0], **filters)
        made[at] = law(numpy_row(logits[at]), chosen, compute)
    return made


def target_probs(
    logits: Tensor, *, row_start: Tensor | None = None, **filters: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """probs (long double), status, margin of each row's filter decisions; rows that no request owns: zeros."""
    probs = np.zeros(tuple(logits.shape), REAL)
    status = np.zeros(tuple(logits.shape[:-1]), np.int32)
    margin = np.full(tuple(logits.shape[:-1]), np.inf)
    for at, row in laws(logits, row_start, **filters).items():
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
    logits: Tensor,
    tokens: Tensor,
    *,
    filtered: bool = False,
    top: int = 0,
    row_start: Tensor | None = None,
    **filters: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """logprobs (long double), top_ids, top_logprobs, status, margin; rows in error or without owner: 0, -1, -inf."""
    lead = tuple(logits.shape[:-1])
    logprobs, status, margin = np.zeros(lead, REAL), np.zeros(lead, np.int32), np.full(lead, np.inf)
    top_ids, top_logprobs = np.full((*lead, top), -1, np.int64), np.full((*lead, top), -np.inf, REAL)
    rows = laws(logits, row_start, **(filters if filtered else {}))
    for at, row in rows.items():
        token = int(tokens[at])
        status[at], margin[at] = row.status, row.margin
        if row.status:
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


def topk_logits(logits: Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest logits of every row with their ids, and status; -inf and -1 where fewer are finite."""
    lead = tuple(logits.shape[:-1])
    values: np.ndarray = np.full((*lead, k), -np.inf, compute_dtype(logits))
    ids = np.full((*lead, k), -1, np.int64)
    status = np.zeros(lead, np.int32)
    for _, _, at in rows_of(logits):
        row, status[at] = allowed_logits(numpy_row(logits[at]), Filters(), compute_dtype(logits))
        if status[at]:
            continue
        order = np.argsort(-row, kind="stable")[:k]
        order = order[np.isfinite(row[order])]
        ids[at][: order.size], values[at][: order.size] = order, row[order]
    return values, ids, status
