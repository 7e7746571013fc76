"""Ops that verify drafts against the target and take what holds (csrc/verify)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._host import Bonus, Rule
from ._arguments import check_devices, filters, number_of, per_request, per_request_rows, requests_of, with_filter_doc


class Verified(NamedTuple):
    """What a verification emits, see `verify_chain`."""

    tokens: Tensor
    num_accepted: Tensor
    num_emitted: Tensor
    status: Tensor


class Committed(NamedTuple):
    """See `commit`."""

    num_committed: Tensor
    reason: Tensor


def verify_chain_greedy(
    draft_tokens: Tensor, target_ids: Tensor, draft_lens: Tensor | None = None, *, active: Tensor | None = None
) -> Verified:
    """Keep the draft tokens that greedy target decoding would have emitted itself, and the token after them.

    Args:
        draft_tokens: proposed tokens, int64 [B, K]; rows may be strided, last dim contiguous; K may be 0.
        target_ids: target argmax at the root and after each draft token, int64 [B, K + 1], same device; a request that
            comes to a row without one (-1, see row_stats) ends in error.
        draft_lens: drafts in use per request, int32 [B], 0..K; None means K.
        active: bool [B]; requests that are False are not read and emit nothing.
    Returns:
        tokens: int64 [B, K + 1] padded with -1; num_accepted: int32 [B], drafts kept; num_emitted: int32 [B],
        num_accepted + 1 (0 where inactive or in error); status: int32 [B], see `fastdecode.Status`.
        Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype or device.
    Source: Stern et al. 2018, "verify" substep. Reference: fastdecode.testing.reference.verify.
    """
    return Verified(
        *torch.ops.fastdecode.verify_chain_greedy.default(
            draft_tokens,
            target_ids,
            _counts("verify_chain_greedy", "draft_lens", draft_lens, draft_tokens),
            per_request("verify_chain_greedy", "active", active, draft_tokens, torch.bool),
        )
    )


@torch.library.register_fake("fastdecode::verify_chain_greedy")
def _(draft_tokens: Tensor, *others: object) -> tuple[Tensor, ...]:
    check_devices("verify_chain_greedy", draft_tokens, *others)
    return _fake_verified(draft_tokens)


@with_filter_doc
def verify_chain(
    draft_tokens: Tensor,
    draft_probs: Tensor | None = None,
    draft_lens: Tensor | None = None,
    *,
    target_logits: Tensor | None = None,
    target_probs: Tensor | None = None,
    row_start: Tensor | None = None,
    rule: str | int = "ratio",
    temperature: Tensor | float | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    typical_p: Tensor | float | None = None,
    bias: Tensor | None = None,
    ban_ids: Tensor | None = None,
    min_lengths: Tensor | None = None,
    bitmask: Tensor | None = None,
    order: str | int = "k_then_p",
    draft_to_target: Tensor | None = None,
    eps: Tensor | float | None = None,
    delta: Tensor | float | None = None,
    bonus: str | int = "greedy",
    beta: Tensor | int | None = None,
    tau: Tensor | float | None = None,
    uniforms: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    active: Tensor | None = None,
    emit_bonus: bool = True,
) -> Verified:
    """Verify a chain of draft tokens against the target's rows: keep a prefix, emit one token after it.

    Rules that keep the target's law:
    "ratio": accept draft x with probability min(1, target(x) / draft(x)); at the first rejection emit one token
    from norm((target - draft)+), after full acceptance one from the next row. Exact in law if every draft was drawn
    from its row of draft_probs; without draft_probs any draft will do.
    "block": the same law and inputs, but prefixes are judged instead of tokens, which keeps at least as many on
    average. Needs draft noise that does not repeat when a position is drafted again: key it by the round.
    "coupled": emit what `sample` would draw from each row with the same seed, and go on while the draft agrees.
    The tokens are those of plain sampling, whatever the drafts are.

    Rules that do not, and promise no distribution:
    "typical": accept x if target(x) > min(eps, delta exp(-entropy)); then the argmax of the next row, or with bonus
    "sample" a draw from its ids that clear the threshold (the most likely always does).
    "top_beta": accept x if it is among the beta largest logits, ties by id, and at most tau below the largest; then the
    argmax. beta 1 and tau 0 are greedy decoding.

    Args:
        draft_tokens: int64 [B, K]; rows may be strided, last dim contiguous; K may be 0.
        draft_probs: [B, K, V] in the dtype of the target, or in that of `target_probs` of it (float32; float64 for
            float64): the law each draft token was drawn from, after the same filters; None means deterministic
            drafts. Rules ratio and block only.
        draft_lens: drafts in use per request, int32 [B], 0..K; None means K.
        target_logits: float64, float32, float16 or bfloat16 [B, K + 1, V]: row 0 predicts the token after the last
            committed one, row i + 1 the token after draft i.
        target_probs: the same as probabilities that sum to 1 (used as given); exactly one of the two; without filters,
            not for coupled and top_beta. Rows of probabilities are read only where a decision needs them.
        row_start: int32 [B + 1], for flat targets [R, V]: request b's rows are row_start[b] .. row_start[b + 1] - 1, at
            least draft_lens[b] + 1; fewer, or a start outside 0..R, is status 32.
        rule: one of the names above, or a `fastdecode.Rule`.
        {filters}
        draft_to_target: int64 [V_draft]: draft_tokens, and the last dim of draft_probs [B, K, V_draft], are ids of
            another vocabulary, and this is what each means in the target's; -1 for nothing. Draft ids of one meaning
            add up. A draft that means nothing is rejected, with draft probabilities as one of target probability 0.
        eps, delta: float32 [B]; rule typical; None means 0.09 and 0.3.
        bonus: "greedy", "sample" or a `fastdecode.Bonus`; rule typical.
        beta: int32 [B]; rule top_beta; None means 1.
        tau: float32 [B], difference of logits; rule top_beta; None means 0.
        uniforms: float64 [B, K + 1] in (0, 1). [b, i] accepts draft i (block: the prefix that ends with it), the last
            column makes the final draw by inverse CDF; coupled: [b, i] draws from row i. Excludes seed.
        seed: int64 [B]. Rules that draw nothing (top_beta, typical with bonus "greedy") take neither.
        offset: int64 [B]: absolute position of the token that row 0 predicts; required with seed.
        active: bool [B]; requests that are False are not read and emit nothing.
        emit_bonus: False emits nothing after full acceptance.
    Returns:
        tokens: int64 [B, K + 1] padded with -1, ids of the target; num_accepted: int32 [B], drafts kept; num_emitted:
        int32 [B], num_accepted + 1, or num_accepted after full acceptance without bonus; status: int32 [B], bits of
        `fastdecode.Status`; a request in error (NaN, no mass, bad length) has tokens -1 and counts 0. A draft id
        outside the vocabulary is rejected, or is a mismatch. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; arguments that conflict or that the rule does not use.
    Source: Leviathan et al. 2023, Chen et al. 2023 (ratio); Sun et al. 2024 (block); Cai et al. 2024 (typical, Medusa);
    Xia et al. 2023 (top_beta, SpecDec). Reference: fastdecode.testing.reference.verify.
    """
    op = "verify_chain"
    requests_of(op, draft_tokens, row_start)
    chosen = (temperature, top_k, top_p, min_p, typical_p, bias, ban_ids, min_lengths)
    if row_start is not None and target_logits is not None:
        bitmask = per_request_rows(op, "bitmask", bitmask, target_logits)
    return Verified(
        *torch.ops.fastdecode.verify_chain.default(
            draft_tokens,
            draft_probs,
            _counts(op, "draft_lens", draft_lens, draft_tokens),
            target_logits,
            target_probs,
            row_start,
            number_of(op, "rule", rule, Rule),
            *filters(op, draft_tokens, *chosen, bitmask, order),
            draft_to_target,
            per_request(op, "eps", eps, draft_tokens, torch.float32),
            per_request(op, "delta", delta, draft_tokens, torch.float32),
            number_of(op, "bonus", bonus, Bonus),
            _counts(op, "beta", beta, draft_tokens),
            per_request(op, "tau", tau, draft_tokens, torch.float32),
            uniforms,
            per_request(op, "seed", seed, draft_tokens, torch.int64),
            per_request(op, "offset", offset, draft_tokens, torch.int64),
            per_request(op, "active", active, draft_tokens, torch.bool),
            emit_bonus,
        )
    )


@torch.library.register_fake("fastdecode::verify_chain")
def _(draft_tokens: Tensor, *others: object) -> tuple[Tensor, ...]:
    check_devices("verify_chain", draft_tokens, *others)
    return _fake_verified(draft_tokens)


def commit(
    tokens: Tensor,
    num_emitted: Tensor,
    lengths: Tensor,
    finished: Tensor,
    *,
    max_lengths: Tensor | None = None,
    stop_ids: Tensor | None = None,
) -> Committed:
    """Take a round's tokens up to the first stop id and the length cap; advance `lengths`, set `finished`.

    Args:
        tokens: int64 [B, K + 1]; rows may be strided, last dim contiguous.
        num_emitted: int32 [B], tokens in use per request; a number outside 0..K + 1 counts as 0.
        lengths: int32 [B], contiguous, changed in place: tokens the request has, prompt included.
        finished: bool [B], contiguous, changed in place; requests that are True already stay as they are.
        max_lengths: int32 [B]; None means 2^31 - 1.
        stop_ids: int64 [B, S] or [S], padded with -1; None means none.
    Returns:
        num_committed: int32 [B], the stop id included; reason: int32 [B], a `fastdecode.FinishReason`: 0 goes on,
        1 stop id, 2 length; stop wins where both hold. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device.
    Reference: fastdecode.testing.reference.verify.
    """
    return Committed(
        *torch.ops.fastdecode.commit.default(
            tokens,
            _counts("commit", "num_emitted", num_emitted, tokens),
            lengths,
            finished,
            _counts("commit", "max_lengths", max_lengths, tokens),
            per_request_rows("commit", "stop_ids", stop_ids, tokens),
        )
    )


@torch.library.register_fake("fastdecode::commit")
def _(tokens: Tensor, num_emitted: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    check_devices("commit", tokens, num_emitted, *others)
    return torch.empty_like(num_emitted), torch.empty_like(num_emitted)


def _counts(op: str, name: str, value: Tensor | int | None, like: Tensor) -> Tensor | None:
    return per_request(op, name, value, like, torch.int32)


def _fake_verified(draft_tokens: Tensor) -> tuple[Tensor, ...]:
    batch, width = draft_tokens.shape[0], draft_tokens.shape[1] + 1
    counts = [draft_tokens.new_empty((batch,), dtype=torch.int32) for _ in range(3)]
    return draft_tokens.new_empty((batch, width)), *counts
