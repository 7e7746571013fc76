"""Ops on rows of logits: statistics, the largest, the target law, draws from it, log-probabilities (csrc/sample)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import (
    check_devices,
    filters,
    per_request,
    per_request_rows,
    requests_of,
    value_dtype,
    with_filter_doc,
)


class RowStats(NamedTuple):
    """One value per row of logits, see `row_stats`."""

    max: Tensor
    argmax: Tensor
    second: Tensor
    logsumexp: Tensor
    entropy: Tensor
    status: Tensor


class TargetProbs(NamedTuple):
    """See `target_probs`."""

    probs: Tensor
    status: Tensor


class Sampled(NamedTuple):
    """See `sample`."""

    tokens: Tensor
    status: Tensor


class TopkLogits(NamedTuple):
    """See `topk_logits`."""

    values: Tensor
    ids: Tensor
    status: Tensor


class TokenLogprobs(NamedTuple):
    """See `token_logprobs`."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    status: Tensor


def row_stats(logits: Tensor, *, active: Tensor | None = None) -> RowStats:
    """Statistics of each row of logits, from one read.

    Args:
        logits: float64, float32, float16 or bfloat16, [B, V] or [B, n, V]; rows may be strided, last dim contiguous.
        active: bool [B]; requests that are False are not read.
    Returns:
        max, second (second largest, with multiplicity; -inf if V is 1), logsumexp, entropy (nats, of the softmax):
        float32, or float64 for float64 logits; argmax: int64, lowest id among ties; status: int32, 1 = NaN or +inf in
        the row, 2 = all -inf. All are [B] or [B, n]; argmax is -1 and the values are 0 where inactive or in error.
        Does not synchronise.
    Raises:
        ValueError: wrong rank, dtype, layout or device.
    Reference: fastdecode.testing.reference.sample.
    """
    return RowStats(*torch.ops.fastdecode.row_stats.default(logits, _active("row_stats", active, logits)))


@torch.library.register_fake("fastdecode::row_stats")
def _(logits: Tensor, *others: object) -> tuple[Tensor, ...]:
    check_devices("row_stats", logits, *others)

    def new(dtype: torch.dtype) -> Tensor:
        return logits.new_empty(logits.shape[:-1], dtype=dtype)

    value = value_dtype(logits)
    return new(value), new(torch.int64), new(value), new(value), new(value), new(torch.int32)


def topk_logits(logits: Tensor, k: int, *, active: Tensor | None = None) -> TopkLogits:
    """The k largest logits of each row, largest first, ties by lowest id. One read of the row.

    Args:
        logits: float64, float32, float16 or bfloat16, [B, V] or [B, n, V]; rows may be strided, last dim contiguous.
        k: 1..V.
        active: bool [B]; requests that are False are not read.
    Returns:
        values: [B, k] or [B, n, k], float32 (float64 for float64 logits); ids: int64, the same shape; -inf and -1 where
        fewer than k logits are finite, and in rows that are inactive or in error; status: int32 [B] or [B, n],
        1 = NaN or +inf in the row, 2 = all -inf. Does not synchronise.
    Raises:
        ValueError: wrong rank, dtype, layout or device; k outside 1..V.
    Reference: fastdecode.testing.reference.sample.
    """
    if not isinstance(k, int) or isinstance(k, bool):
        raise ValueError(f"topk_logits: k: expected an int, got {k!r}")
    return TopkLogits(*torch.ops.fastdecode.topk_logits.default(logits, k, _active("topk_logits", active, logits)))


@torch.library.register_fake("fastdecode::topk_logits")
def _(logits: Tensor, k: int, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("topk_logits", logits, k, *others)
    shape = (*logits.shape[:-1], k)
    values, ids = logits.new_empty(shape, dtype=value_dtype(logits)), logits.new_empty(shape, dtype=torch.int64)
    return values, ids, logits.new_empty(logits.shape[:-1], dtype=torch.int32)


@with_filter_doc
def target_probs(
    logits: Tensor,
    *,
    row_start: Tensor | None = None,
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
    offset: Tensor | int | None = None,
    active: Tensor | None = None,
) -> TargetProbs:
    """The law that `sample` draws from and `verify_chain` preserves, as probabilities.

    Bias, bans and bitmask edit the logits; then temperature, top-k, top-p, min-p and typical, each filter seeing the
    renormalised result of the one before, as in transformers and vLLM.

    Args:
        logits: float64, float32, float16 or bfloat16, [B, V] or [B, n, V]; rows may be strided, last dim contiguous.
        row_start: int32 [B + 1], rising, for flat logits [R, V]: request b has rows row_start[b] to
            row_start[b + 1] - 1. Per-request arguments stay [B]; rows that no request has get zeros and status 0.
        {filters}
        offset: int64 [B]: absolute position of the token that row 0 predicts (row i: offset + i); only for min_lengths.
        active: bool [B]; requests that are False are not read and get zeros.
    Returns:
        probs: shape of logits, float32 (float64 for float64 logits); status: int32, one per row, 1 = NaN or +inf in
        the row, 2 = no id left; the row's probs are then 0. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; offset without min_lengths.
    Reference: fastdecode.testing.reference.sample.
    """
    op = "target_probs"
    requests = requests_of(op, logits, row_start)
    bitmask = per_request_rows(op, "bitmask", bitmask, logits)
    chosen = (temperature, top_k, top_p, min_p, typical_p, bias, ban_ids, min_lengths, bitmask, order)
    return TargetProbs(
        *torch.ops.fastdecode.target_probs.default(
            logits,
            row_start,
            *filters(op, requests, *chosen),
            per_request(op, "offset", offset, requests, torch.int64),
            _active(op, active, requests),
        )
    )


@torch.library.register_fake("fastdecode::target_probs")
def _(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    check_devices("target_probs", logits, *others)
    probs = logits.new_empty(logits.shape, dtype=value_dtype(logits))
    return probs, logits.new_empty(logits.shape[:-1], dtype=torch.int32)


@with_filter_doc
def sample(
    logits: Tensor,
    *,
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
    uniforms: Tensor | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    stream: int = 0,
    node: int = 0,
    active: Tensor | None = None,
) -> Sampled:
    """One token per row from the law of `target_probs`.

    Randomness is data. With `seed` and `offset` the draw is an exponential race on Philox noise keyed by (seed, offset,
    stream, node, token id), so the token depends on nothing else: not on batch, thread count or device. With `uniforms`
    it is the first id, in id order, whose cumulative probability exceeds the uniform.

    Args:
        logits: float64, float32, float16 or bfloat16, [B, V]; rows may be strided, last dim contiguous.
        {filters}
        uniforms: float64 [B] in (0, 1); excludes seed.
        seed: int64 [B]; a request's key.
        offset: int64 [B]: absolute position of the token being drawn; required with seed.
        stream: 0..255, who draws; see `fastdecode.Stream`.
        node: 0..2**24 - 1, slot of the row the noise is drawn over; 0 for plain sampling.
        active: bool [B]; requests that are False are not read.
    Returns:
        tokens: int64 [B], -1 where inactive or in error; status: int32 [B], 1 = NaN or +inf in the row, 2 = no id
        left. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; both or neither of uniforms and seed.
    Reference: fastdecode.testing.reference.sample.
    """
    chosen = (temperature, top_k, top_p, min_p, typical_p, bias, ban_ids, min_lengths, bitmask, order)
    return Sampled(
        *torch.ops.fastdecode.sample.default(
            logits,
            *filters("sample", logits, *chosen),
            per_request("sample", "uniforms", uniforms, logits, torch.float64),
            per_request("sample", "seed", seed, logits, torch.int64),
            per_request("sample", "offset", offset, logits, torch.int64),
            stream,
            node,
            _active("sample", active, logits),
        )
    )


@torch.library.register_fake("fastdecode::sample")
def _(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    check_devices("sample", logits, *others)
    batch = logits.shape[:1]
    return logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.int32)


@with_filter_doc
def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    filtered: bool = False,
    top: int = 0,
    row_start: Tensor | None = None,
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
    offset: Tensor | int | None = None,
    active: Tensor | None = None,
) -> TokenLogprobs:
    """Natural-log probabilities of given tokens, and of the most likely ones.

    Args:
        logits: float64, float32, float16 or bfloat16, [B, V] or [B, n, V]; rows may be strided, last dim contiguous.
        tokens: int64 [B], [B, n], or [R] beside row_start; -1 is padding, with log-probability 0.
        filtered: True takes the law of `target_probs` under the filters below; False takes log_softmax(logits), the
            number APIs report, and refuses filters.
        top: how many of the most likely ids to return, 0..V.
        row_start: int32 [B + 1], rising, for flat logits [R, V]: request b has rows row_start[b] to
            row_start[b + 1] - 1; rows that no request has are not read.
        {filters}
        offset: int64 [B]: absolute position of the token that row 0 predicts; only for min_lengths.
        active: bool [B]; requests that are False are not read.
    Returns:
        logprobs: shape of tokens, float32 (float64 for float64 logits), -inf where the law gives 0 and outside the
        vocabulary; top_ids: int64 [..., top], most likely first, ties by id, -1 where fewer are left; top_logprobs
        beside them, -inf beside -1;
        status: int32, 1 = NaN or +inf in the row, 2 = no id left, 4 = a token outside the vocabulary. Does not
        synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; filters without filtered=True.
    Reference: fastdecode.testing.reference.sample.
    """
    op = "token_logprobs"
    requests = requests_of(op, logits, row_start)
    bitmask = per_request_rows(op, "bitmask", bitmask, logits)
    chosen = (temperature, top_k, top_p, min_p, typical_p, bias, ban_ids, min_lengths, bitmask, order)
    given = filters(op, requests, *chosen)
    if not filtered and any(value is not None for value in given[:-1]) | bool(given[-1]):
        raise ValueError("token_logprobs: filtered: expected True beside filters, got False")
    return TokenLogprobs(
        *torch.ops.fastdecode.token_logprobs.default(
            logits,
            tokens,
            top,
            row_start,
            *given,
            per_request(op, "offset", offset, requests, torch.int64),
            _active(op, active, requests),
        )
    )


@torch.library.register_fake("fastdecode::token_logprobs")
def _(logits: Tensor, tokens: Tensor, top: int, *others: object) -> tuple[Tensor, ...]:
    check_devices("token_logprobs", logits, tokens, top, *others)
    rows, value = logits.shape[:-1], value_dtype(logits)
    return (
        logits.new_empty(rows, dtype=value),
        logits.new_empty((*rows, top), dtype=torch.int64),
        logits.new_empty((*rows, top), dtype=value),
        logits.new_empty(rows, dtype=torch.int32),
    )


def _active(op: str, active: Tensor | None, logits: Tensor) -> Tensor | None:
    return per_request(op, "active", active, logits, torch.bool)
