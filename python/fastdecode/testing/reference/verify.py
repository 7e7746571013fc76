"""Verification of draft chains and the commit step, one request at a time (Leviathan et al. 2023, Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rng, sample
from .sample import NAN, NO_MASS, REAL, UNMAPPED, Row

__all__ = [
    "BAD_LENGTH",
    "RESIDUAL_FALLBACK",
    "ZERO_DRAFT_PROB",
    "Randomness",
    "Result",
    "Verified",
    "commit",
    "coupled_chain",
    "ratio_chain",
    "row_from_probs",
    "verify_chain",
    "verify_chain_greedy",
]

ZERO_DRAFT_PROB, RESIDUAL_FALLBACK, BAD_LENGTH = 8, 16, 32


@dataclass
class Result:
    """What one request emits."""

    tokens: list[int]
    num_accepted: int
    status: int
    margin: float  # of the closest decision of this request; small = rounding may choose otherwise


@dataclass(frozen=True)
class Randomness:
    """Explicit uniforms [K + 1] (last = final draw), or the counters of a seed."""

    uniforms: np.ndarray | None = None
    seed: int = 0
    offset: int = 0

    def acceptance(self, i: int) -> float:
        """Accepts draft i."""
        if self.uniforms is not None:
            return float(self.uniforms[i])
        return rng.acceptance_uniform(self.seed, self.offset, slot=i + 1)

    def final(self, weights: np.ndarray, scores: np.ndarray, stream: int, node: int) -> tuple[int, float]:
        """The last token and the margin of its draw, from a row of weights, or of their logs in the compute dtype."""
        if self.uniforms is not None:
            return sample.inverse_cdf(weights, float(self.uniforms[-1]))
        return sample.race(scores, rng.row_noise(self.seed, self.offset, weights.size, stream, node))


def row_from_probs(probs: np.ndarray, compute: type) -> Row:
    """A row given as probabilities, used as they are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.log(probs.astype(compute))
    status = NAN if np.isnan(probs).any() or np.isposinf(probs).any() else 0 if (probs > 0).any() else NO_MASS
    return Row(probs.astype(REAL), scores, scores.astype(REAL), status, np.inf)


def ratio_chain(
    draft: list[int],
    row: Callable[[int], tuple[Row, np.ndarray]],
    draft_row: Callable | None,
    random: Randomness,
    compute: type,
    emit_bonus: bool = True,
) -> Result:
    """Leviathan et al. 2023, Alg. 1: accept draft x of row i iff u q(x) < p(x), else draw from norm((p - q)+).

    row(i) gives the target row and its probabilities, draft_row(i) the drafter's probabilities; both are called
    only for rows that the rule has to read. Without draft_row the draft is a one-hot proposal.
    """
    tokens: list[int] = []
    status, margin = 0, np.inf
    for i, x in enumerate(draft):
        target, p = row(i)
        margin = min(margin, target.margin)
        if target.status:
            return Result([], 0, target.status, np.inf)
        inside = 0 <= x < p.size
        q = np.zeros(p.size, REAL) if draft_row is None else draft_row(i).astype(REAL)
        if draft_row is None and inside:
            q[x] = 1
        accepted = False
        if not inside:
            status |= UNMAPPED
        elif np.isnan(q[x]):
            return Result([], 0, NAN, np.inf)
        elif q[x] == 0:
            status |= ZERO_DRAFT_PROB
        else:
            uq = REAL(random.acceptance(i)) * q[x]
            accepted = bool(uq < p[x])
            margin = min(margin, float(abs(uq - p[x]) / (uq + p[x])) if uq + p[x] > 0 else np.inf)
        if accepted:
            tokens.append(x)
            continue
        if np.isnan(q).any():
            return Result([], 0, NAN, np.inf)
        residual = np.maximum(p - q, 0)
        if draft_row is None:
            residual = np.where(q > 0, 0, p)  # one-hot: p without x, whatever p(x) was
        with np.errstate(divide="ignore"):
            scores = np.log(np.maximum(p.astype(compute) - q.astype(compute), 0)) if draft_row else np.log(residual)
            scores = scores.astype(compute)
        if not (residual > 0).any():
            status |= RESIDUAL_FALLBACK
            residual, scores = p, target.scores
        token, lead = random.final(residual, scores, rng.RESIDUAL, node=i)
        return Result([*tokens, token], i, status, min(margin, lead))
    if not emit_bonus:
        return Result(tokens, len(draft), status, margin)
    target, p = row(len(draft))
    if target.status:
        return Result([], 0, target.status, np.inf)
    token, lead = random.final(target.weights, target.scores, rng.BONUS, node=len(draft))
    return Result([*tokens, token], len(draft), status, min(margin, lead, target.margin))


def coupled_chain(
    draft: list[int], row: Callable[[int], tuple[Row, np.ndarray]], random: Randomness, emit_bonus: bool = True
) -> Result:
    """Sample-and-match: the draw of plain sampling at every row, and the draft only decides how many rows count."""
    tokens: list[int] = []
    status, margin = 0, np.inf
    for i in range(len(draft) + int(emit_bonus)):
        target, p = row(i)
        if target.status:
            return Result([], 0, target.status, np.inf)
        uniform = None if random.uniforms is None else float(random.uniforms[i])
        token, lead = sample.draw(target, uniform=uniform, seed=random.seed, offset=random.offset + i)
        margin = min(margin, lead)
        tokens.append(token)
        if i < len(draft) and token != draft[i]:
            return Result(tokens, i, status | (0 if 0 <= draft[i] < p.size else UNMAPPED), margin)
    return Result(tokens, len(draft), status, margin)


@dataclass(frozen=True)
class Verified:
    """The four outputs of a verification, and per request the margin of its closest decision."""

    tokens: np.ndarray
    num_accepted: np.ndarray
    num_emitted: np.ndarray
    status: np.ndarray
    margin: np.ndarray


def _collect(results: list[Result | None], width: int) -> Verified:
    """Pads; None is an inactive request. A request in error has no tokens and no counts."""
    batch = len(results)
    counts = np.zeros((3, batch), np.int32)
    out = Verified(np.full((batch, width), -1, np.int64), counts[0], counts[1], counts[2], np.full(batch, np.inf))
    for b, result in enumerate(results):
        if result is None:
            continue
        out.tokens[b, : len(result.tokens)] = result.tokens
        out.num_accepted[b], out.num_emitted[b] = result.num_accepted, len(result.tokens)
        out.status[b], out.margin[b] = result.status, result.margin
    return out


def verify_chain(
    draft_tokens: Tensor,
    draft_probs: Tensor | None = None,
    draft_lens: Tensor | None = None,
    *,
    target_logits: Tensor | None = None,
    target_probs: Tensor | None = None,
    rule: str = "ratio",
    uniforms: Tensor | None = None,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    active: Tensor | None = None,
    emit_bonus: bool = True,
    **filters: Any,
) -> Verified:
    """`fastdecode.ops.verify_chain`, request by request. Parameters are tensors; scalars do not broadcast."""
    batch, longest = draft_tokens.shape
    source = target_logits if target_logits is not None else target_probs
    assert source is not None
    compute = sample.compute_dtype(source)
    parameters = filters | ({"offset": offset} if filters.get("min_lengths") is not None else {})
    results: list[Result | None] = []
    for b in range(batch):
        length = longest if draft_lens is None else int(draft_lens[b])
        if active is not None and not active[b]:
            results.append(None)
            continue
        if not 0 <= length <= longest:
            results.append(Result([], 0, BAD_LENGTH, np.inf))
            continue

        def row(i: int, b: int = b) -> tuple[Row, np.ndarray]:
            values = sample.numpy_row(source[b, i])
            if target_logits is None:
                made = row_from_probs(values, compute)
                return made, made.weights
            made = sample.law(values, sample.row_filters(b, i, **parameters), compute)
            return made, made.probs

        if uniforms is not None:
            random = Randomness(uniforms=uniforms[b].numpy())
        else:
            assert seed is not None and offset is not None
            random = Randomness(seed=int(seed[b]), offset=int(offset[b]))
        draft = [int(x) for x in draft_tokens[b, :length]]
        if rule == "coupled":
            results.append(coupled_chain(draft, row, random, emit_bonus))
        else:
            draft_row = None if draft_probs is None else lambda i, q=draft_probs[b]: sample.numpy_row(q[i])
            results.append(ratio_chain(draft, row, draft_row, random, compute, emit_bonus))
    return _collect(results, longest + 1)


def verify_chain_greedy(
    draft_tokens: Tensor, target_ids: Tensor, draft_lens: Tensor | None = None, *, active: Tensor | None = None
) -> Verified:
    """`fastdecode.ops.verify_chain_greedy`, request by request."""
    batch, longest = draft_tokens.shape
    results: list[Result | None] = []
    for b in range(batch):
        length = longest if draft_lens is None else int(draft_lens[b])
        if active is not None and not active[b]:
            results.append(None)
        elif not 0 <= length <= longest:
            results.append(Result([], 0, BAD_LENGTH, np.inf))
        else:
            kept = 0
            while kept < length and draft_tokens[b, kept] == target_ids[b, kept]:
                kept += 1
            results.append(Result(target_ids[b, : kept + 1].tolist(), kept, 0, np.inf))
    return _collect(results, longest + 1)


def commit(
    tokens: Tensor,
    num_emitted: Tensor,
    lengths: Tensor,
    finished: Tensor,
    *,
    max_lengths: Tensor | None = None,
    stop_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`fastdecode.ops.commit` on copies: (num_committed, reason, lengths, finished); 0 none, 1 stop id, 2 length."""
    batch, width = tokens.shape
    lengths, finished = lengths.clone(), finished.clone()
    num_committed, reason = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    for b in range(batch):
        if finished[b]:
            continue
        emitted = int(num_emitted[b]) if 0 <= int(num_emitted[b]) <= width else 0  # nothing can be trusted: take none
        room = width if max_lengths is None else int(max_lengths[b]) - int(lengths[b])
        stops = set() if stop_ids is None else {int(s) for s in stop_ids[b] if s >= 0}
        for i in range(emitted):
            if i >= room:
                break
            num_committed[b] += 1
            if int(tokens[b, i]) in stops:
                reason[b] = 1
                break
        if reason[b] == 0 and max_lengths is not None and int(num_committed[b]) >= room:
            reason[b] = 2
        lengths[b] += num_committed[b]
        finished[b] = bool(reason[b] != 0)
    return num_committed, reason, lengths, finished
