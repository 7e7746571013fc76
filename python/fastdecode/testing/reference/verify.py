"""Verification of draft chains and the commit step, one request at a time.

Rules that keep the law: ratio (Leviathan et al. 2023, Chen et al. 2023), block (Sun et al. 2024), coupled (sample and
match). Rules that do not: typical (Cai et al. 2024, Medusa), top_beta (greedy with slack).
"""

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
    "TargetRow",
    "Verified",
    "block_chain",
    "commit",
    "coupled_chain",
    "ratio_chain",
    "row_from_probs",
    "top_beta_chain",
    "typical_chain",
    "verify_chain",
    "verify_chain_greedy",
]

ZERO_DRAFT_PROB, RESIDUAL_FALLBACK, BAD_LENGTH = 8, 16, 32

TargetRow = Callable[[int], tuple[Row, np.ndarray]]  # i -> row i of the target and its probabilities


@dataclass
class Result:
    """What one request emits."""

    tokens: list[int]
    num_accepted: int
    status: int
    margin: float  # of the closest decision of this request; small = rounding may choose otherwise


def _failed(status: int) -> Result:
    return Result([], 0, status, np.inf)


@dataclass(frozen=True)
class Randomness:
    """Explicit uniforms [K + 1] (last = final draw), or the counters of a seed; neither for rules that draw nothing."""

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


def _draft_law(draft_row: Callable[[int], np.ndarray] | None, i: int, x: int, vocab_size: int) -> np.ndarray:
    """q of draft i over the target's vocabulary: as given, or one-hot at x (zero where x has no image)."""
    if draft_row is not None:
        return draft_row(i).astype(REAL)
    q = np.zeros(vocab_size, REAL)
    if 0 <= x < vocab_size:
        q[x] = 1
    return q


def _log_difference(p: np.ndarray, q: np.ndarray, compute: type) -> np.ndarray:
    """log (p - q)+ with the subtraction in the compute dtype, as the kernels have it."""
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(p.astype(compute) - q.astype(compute), 0)).astype(compute)


def _redraw(
    residual: np.ndarray, scores: np.ndarray, target: Row, p: np.ndarray, random: Randomness, node: int
) -> tuple[int, float, int]:
    """Token after a rejection, its margin and status: from the residual, or where that has no mass from the target."""
    mass = float(residual.sum())
    if mass == 0:
        return *random.final(p, target.scores, rng.RESIDUAL, node), RESIDUAL_FALLBACK
    token, lead = random.final(residual, scores, rng.RESIDUAL, node)
    return token, min(lead, mass), 0  # a residual of rounding errors may look like anything


def _margin_of_less(left: np.longdouble, right: np.longdouble) -> float:
    """How far left < right is from turning, relative to both."""
    return float(abs(left - right) / (left + right)) if left + right > 0 else np.inf


def ratio_chain(
    draft: list[int],
    row: TargetRow,
    draft_row: Callable[[int], np.ndarray] | None,
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
            return _failed(target.status)
        q = _draft_law(draft_row, i, x, p.size)
        accepted = False
        if not 0 <= x < p.size:
            status |= UNMAPPED
        elif np.isnan(q[x]):
            return _failed(NAN)
        elif q[x] == 0:
            status |= ZERO_DRAFT_PROB
        else:
            uq = REAL(random.acceptance(i)) * q[x]
            accepted = bool(uq < p[x])
            margin = min(margin, _margin_of_less(uq, p[x]))
            if uq < p[x] < np.finfo(compute).tiny:  # 0 to a kernel
                margin = 0.0
        if accepted:
            tokens.append(x)
            continue
        if np.isnan(q).any():
            return _failed(NAN)
        if draft_row is None:
            residual = np.where(q > 0, 0, p)  # one-hot: p without x, whatever p(x) was
            scores = _log_difference(residual, np.zeros_like(q), compute)
        else:
            residual, scores = np.maximum(p - q, 0), _log_difference(p, q, compute)
        token, lead, fallback = _redraw(residual, scores, target, p, random, node=i)
        return Result([*tokens, token], i, status | fallback, min(margin, lead))
    return _with_bonus(tokens, row, random, status, margin, emit_bonus)


def _with_bonus(
    tokens: list[int], row: TargetRow, random: Randomness, status: int, margin: float, emit_bonus: bool
) -> Result:
    """All drafts were accepted: one more token, from the row after them."""
    length = len(tokens)
    if not emit_bonus:
        return Result(tokens, length, status, margin)
    target, _ = row(length)
    if target.status:
        return _failed(target.status)
    token, lead = random.final(target.weights, target.scores, rng.BONUS, node=length)
    return Result([*tokens, token], length, status, min(margin, lead, target.margin))


def block_chain(
    draft: list[int],
    row: TargetRow,
    draft_row: Callable[[int], np.ndarray] | None,
    random: Randomness,
    compute: type,
    emit_bonus: bool = True,
) -> Result:
    """Sun et al. 2024, "Block Verification Accelerates Speculative Decoding", Alg. 2.

    With p_i, q_i the rows that draft x_i was verified with and drawn from, i = 1..gamma:
        w_0 = 1,  w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i))
        S_i = sum_x (w_i p_{i+1}(x) - q_{i+1}(x))+,  h_i = S_i / (S_i + 1 - w_i) for i < gamma,  h_gamma = w_gamma
        tau = max{i : u_i < h_i}, 0 if none
    The token after x_tau comes from norm((w_tau p_{tau+1} - q_{tau+1})+), after x_gamma from p_{gamma+1}. Unlike the
    ratio rule, a draft may be kept because of what follows it, so every row up to gamma counts.
    """
    gamma = len(draft)
    status, margin = 0, np.inf
    weight, laws = [REAL(1)], []
    for i, x in enumerate(draft):
        if weight[i] == 0:  # and so are w and h of all that follows: nothing behind can be kept, nothing is read
            break
        target, p = row(i)
        margin = min(margin, target.margin)
        if target.status:
            return _failed(target.status)
        q = _draft_law(draft_row, i, x, p.size)
        if np.isnan(q).any():
            return _failed(NAN)
        laws.append((target, p, q))
        following = REAL(0)
        if not 0 <= x < p.size:
            status |= UNMAPPED
        elif q[x] == 0:
            status |= ZERO_DRAFT_PROB
        else:
            following = min(REAL(1), weight[i] * p[x] / q[x])
        if 0 < following < np.finfo(compute).tiny:  # 0 to a kernel, which then looks no further
            margin = 0.0
        weight.append(following)

    accepted, distance = [True], [np.inf]  # of 0..gamma
    for i, w in enumerate(weight[1:], start=1):
        surplus, total = w, REAL(1)
        if i < len(laws):
            _, p, q = laws[i]
            surplus = np.maximum(w * p - q, 0).sum()
            total = surplus + 1 - w
        if total == 0:  # nothing is left to choose: w = 1, and the next row is drafted as the target has it
            surplus = total = REAL(1)
        aim = REAL(random.acceptance(i - 1)) * total
        accepted.append(bool(aim < surplus))
        distance.append(float(abs(aim - surplus)) if w > 0 else np.inf)
    tau = max(i for i, kept in enumerate(accepted) if kept)
    margin = min(margin, *distance[tau:])  # a decision before tau changes nothing
    if tau == gamma:
        return _with_bonus(list(draft), row, random, status, margin, emit_bonus)
    target, p, q = laws[tau]
    residual, scores = np.maximum(weight[tau] * p - q, 0), _log_difference(weight[tau] * p, q, compute)
    token, lead, fallback = _redraw(residual, scores, target, p, random, node=tau)
    return Result([*draft[:tau], token], tau, status | fallback, min(margin, lead))


def coupled_chain(draft: list[int], row: TargetRow, random: Randomness, emit_bonus: bool = True) -> Result:
    """Sample-and-match: the draw of plain sampling at every row, and the draft only decides how many rows count."""
    tokens: list[int] = []
    status, margin = 0, np.inf
    for i in range(len(draft) + int(emit_bonus)):
        target, p = row(i)
        if target.status:
            return _failed(target.status)
        uniform = None if random.uniforms is None else float(random.uniforms[i])
        token, lead = sample.draw(target, uniform=uniform, seed=random.seed, offset=random.offset + i)
        margin = min(margin, lead)
        tokens.append(token)
        if i < len(draft) and token != draft[i]:
            return Result(tokens, i, status | (0 if 0 <= draft[i] < p.size else UNMAPPED), margin)
    return Result(tokens, len(draft), status, margin)


def typical_chain(
    draft: list[int],
    row: TargetRow,
    random: Randomness | None,
    *,
    eps: float = 0.09,
    delta: float = 0.3,
    emit_bonus: bool = True,
) -> Result:
    """Typical acceptance (Cai et al. 2024, Medusa, section 3.3.1): accept x iff p(x) > min(eps, delta exp(-H(p))).

    The last token is the most likely one of its row, or with `random` a draw from the ids above the row's threshold,
    of which the most likely one is always one. Not lossless.
    """
    largest, scale = REAL(np.float32(eps)), REAL(np.float32(delta))
    margin = np.inf
    for i in range(len(draft) + 1):
        full = i == len(draft)
        if full and not emit_bonus:
            break
        target, p = row(i)
        margin = min(margin, target.margin)
        if target.status:
            return _failed(target.status)
        alive = p[p > 0]
        threshold = min(largest, scale * np.exp((alive * np.log(alive)).sum()))
        mapped = not full and 0 <= draft[i] < p.size
        if mapped:
            margin = min(margin, _margin_of_less(threshold, p[draft[i]]))
            if p[draft[i]] > threshold:
                continue
        best = int(np.argmax(p))
        if random is None:
            token, lead = best, _margin_of_less(np.max(p, where=p != p[best], initial=0), p[best])
        else:
            keep = p > threshold
            keep[best] = True
            lead = min(_margin_of_less(threshold, value) for value in p[p > 0])
            weights, scores = np.where(keep, p, 0), np.where(keep, target.scores, -np.inf)
            stream = rng.BONUS if full else rng.RESIDUAL
            token, drawn = random.final(weights, scores.astype(target.scores.dtype), stream, node=i)
            lead = min(lead, drawn)
        return Result([*draft[:i], token], i, 0 if full or mapped else UNMAPPED, min(margin, lead))
    return Result(list(draft), len(draft), 0, margin)


def top_beta_chain(
    draft: list[int],
    logits: Callable[[int], tuple[np.ndarray, int]],
    *,
    beta: int = 1,
    tau: float = 0.0,
    emit_bonus: bool = True,
) -> Result:
    """Greedy with slack: accept x iff it is among the `beta` best ids of its row and at most `tau` below the best one.

    logits(i) gives row i in the compute dtype, -inf where forbidden, and its status; ties rank by lowest id, and a
    forbidden id is never accepted. The last token is the best id of its row. Not lossless, but for beta = 1.
    """
    for i in range(len(draft) + int(emit_bonus)):
        row, status = logits(i)
        if status:
            return _failed(status)
        best = int(np.argmax(row))
        if i < len(draft):
            x = draft[i]
            if not 0 <= x < row.size:
                return Result([*draft[:i], best], i, UNMAPPED, np.inf)
            rank = int((row > row[x]).sum() + (row[:x] == row[x]).sum())
            if row[x] > -np.inf and rank < beta and row[best] - row[x] <= np.float32(tau):
                continue
        return Result([*draft[:i], best], i, 0, np.inf)
    return Result(list(draft), len(draft), 0, np.inf)


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
    row_start: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    rule: str = "ratio",
    eps: Tensor | float = 0.09,
    delta: Tensor | float = 0.3,
    bonus: str = "greedy",
    beta: Tensor | int = 1,
    tau: Tensor | float = 0.0,
    uniforms: Tensor | None = None,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    active: Tensor | None = None,
    emit_bonus: bool = True,
    **filters: Any,
) -> Verified:
    """`fastdecode.ops.verify_chain`, request by request. `bias`, bans and random numbers are tensors, not scalars."""
    batch, longest = draft_tokens.shape
    source = target_logits if target_logits is not None else target_probs
    assert source is not None
    compute, vocab_size = sample.compute_dtype(source), source.shape[-1]
    parameters = filters | ({"offset": offset} if filters.get("min_lengths") is not None else {})
    image = None if draft_to_target is None else draft_to_target.tolist()
    results: list[Result | None] = []

    def pick(value: Tensor | float, b: int) -> Any:
        return value[b].item() if isinstance(value, Tensor) else value

    def mapped(x: int) -> int:
        """The target's id of a draft id, or -1."""
        if image is not None:
            x = image[x] if 0 <= x < len(image) else -1
        return x if 0 <= x < vocab_size else -1

    def mapped_law(q: np.ndarray) -> np.ndarray:
        """Probability that a draft proposes each of the target's ids; the rest of q stands on ids without one."""
        if image is None:
            return q
        out = np.zeros(vocab_size, REAL)
        for x, value in enumerate(q):
            if mapped(x) >= 0:
                out[mapped(x)] += value
        return out

    for b in range(batch):
        if active is not None and not active[b]:
            results.append(None)
            continue
        length = longest if draft_lens is None else int(draft_lens[b])
        first, end = (0, longest + 1) if row_start is None else (int(row_start[b]), int(row_start[b + 1]))
        rows_fit = row_start is None or 0 <= first <= end <= source.shape[0]
        if not 0 <= length <= longest or not rows_fit or end - first < length + 1:
            results.append(_failed(BAD_LENGTH))
            continue

        def at(i: int, b: int = b, first: int = first) -> tuple[np.ndarray, sample.Filters]:
            flat = None if row_start is None else first + i
            values = sample.numpy_row(source[b, i] if flat is None else source[flat])
            return values, sample.row_filters(b, i, flat=flat, **parameters)

        def row(i: int, at: Callable = at) -> tuple[Row, np.ndarray]:
            values, chosen = at(i)
            if target_logits is None:
                made = row_from_probs(values, compute)
                return made, made.weights
            made = sample.law(values, chosen, compute)
            return made, made.probs

        random = None
        if uniforms is not None:
            random = Randomness(uniforms=uniforms[b].numpy())
        elif seed is not None and offset is not None:
            random = Randomness(seed=int(seed[b]), offset=int(offset[b]))
        draft = [mapped(int(x)) for x in draft_tokens[b, :length]]
        if rule in ("ratio", "block"):
            assert random is not None
            chain = ratio_chain if rule == "ratio" else block_chain
            law = None if draft_probs is None else lambda i, q=draft_probs[b]: mapped_law(sample.numpy_row(q[i]))
            results.append(chain(draft, row, law, random, compute, emit_bonus))
        elif rule == "coupled":
            assert random is not None
            results.append(coupled_chain(draft, row, random, emit_bonus))
        elif rule == "typical":
            drawn = random if bonus == "sample" else None
            accepts = {"eps": pick(eps, b), "delta": pick(delta, b)}
            results.append(typical_chain(draft, row, drawn, **accepts, emit_bonus=emit_bonus))
        else:

            def logits(i: int, at: Callable = at) -> tuple[np.ndarray, int]:
                values, chosen = at(i)
                return sample.allowed_logits(values, chosen, compute)

            slack = {"beta": pick(beta, b), "tau": pick(tau, b)}
            results.append(top_beta_chain(draft, logits, **slack, emit_bonus=emit_bonus))
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
