"""Ops that change rows of logits before anything is chosen from them: grammar masks, penalties (csrc/sample)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import check_devices, per_request, value_dtype


class Penalized(NamedTuple):
    """See `penalize`."""

    logits: Tensor
    status: Tensor


def apply_token_bitmask_(
    logits: Tensor, bitmask: Tensor, *, indices: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """Forbid, in place, the ids that a grammar does not allow: logits become -inf where the id's bit is 0.

    The masks are those that XGrammar, llguidance and outlines-core fill: id v is bit v % 32, from the least
    significant, of word v // 32; 1 = allowed. Words of 32 allowed ids (-1) are skipped without touching the logits.

    Args:
        logits: float64, float32, float16 or bfloat16, [B, V] or [B, n, V], changed in place; rows may be strided but
            not overlap, last dim contiguous.
        bitmask: int32 [B, W] or [B, n, W], W <= ceil(V / 32); rows may be strided or shared (stride 0). Ids from
            32 * W on are forbidden: a mask is as wide as the tokenizer's vocabulary, logits may be padded.
        indices: int32 [m], for logits [B, V]: bitmask is [m, W] and its row j is for logits row indices[j]. Indices
            outside 0..B - 1 (-1, say) are skipped, rows without an index stay as they are, and of an index that
            comes twice both masks hold. (XGrammar's indices choose the same row of both: here that is `active`.)
        active: bool [B]; requests that are False are neither read nor changed.
    Returns:
        logits, the tensor given. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device; a mask wider than the vocabulary.
    Source: Dong et al. 2024, XGrammar (the layout). Reference: fastdecode.testing.reference.logits.
    """
    torch.ops.fastdecode.apply_token_bitmask_.default(
        logits, bitmask, indices, per_request("apply_token_bitmask_", "active", active, logits, torch.bool)
    )
    return logits


@torch.library.register_fake("fastdecode::apply_token_bitmask_")
def _(logits: Tensor, *others: object) -> None:
    check_devices("apply_token_bitmask_", logits, *others)


def penalize(
    logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    prompt_lengths: Tensor | int | None = None,
    draft_tokens: Tensor | None = None,
    repetition: Tensor | float | None = None,
    presence: Tensor | float | None = None,
    frequency: Tensor | float | None = None,
    active: Tensor | None = None,
) -> Penalized:
    """Lower the logits of ids that the text already holds, once per request and row of a verification.

    For an id of the text, in this order: `repetition` divides a positive logit and multiplies another one, whether the
    id is in the prompt or in the output; `frequency` times its count in the output is subtracted, and `presence` once
    if that count is not 0. In row i of a verification the first i draft tokens are output too, so that the row is the
    one that plain decoding would have after emitting them, and speculation keeps its law.

    Args:
        logits: float64, float32, float16 or bfloat16, [B, V] or [B, n, V]; rows may be strided, last dim contiguous.
            Not changed.
        tokens: int64 [B, T]: prompt and output so far; entries from lengths[b] on are not read, ids outside
            0..V - 1 are ignored.
        lengths: int32 [B], 0..T.
        prompt_lengths: int32 [B], 0..lengths[b]: where the output begins; None means 0, all of the text counts.
        draft_tokens: int64 [B, n - 1], rows may be strided; ids outside 0..V - 1 are ignored. None: no row counts any.
        repetition: float32 [B]; 1 is off, and so is <= 0. None is off.
        presence: float32 [B]; 0 or None is off; negative values reward.
        frequency: float32 [B]; 0 or None is off; negative values reward.
        active: bool [B]; requests that are False are not read and get zeros.
    Returns:
        logits: shape of logits, float32 (float64 for float64 logits; a penalty of 0.1 is lost in a bfloat16); -inf
        stays -inf; status: int32 [B], 32 = lengths or prompt_lengths outside its range, and the request's rows are NaN.
        Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device.
    Source: Keskar et al. 2019, CTRL, section 4.1 (repetition, applied as transformers and vLLM do: by sign); OpenAI
    API reference (frequency and presence). Reference: fastdecode.testing.reference.logits.
    """
    op = "penalize"
    return Penalized(
        *torch.ops.fastdecode.penalize.default(
            logits,
            tokens,
            per_request(op, "lengths", lengths, logits, torch.int32),
            per_request(op, "prompt_lengths", prompt_lengths, logits, torch.int32),
            draft_tokens,
            per_request(op, "repetition", repetition, logits, torch.float32),
            per_request(op, "presence", presence, logits, torch.float32),
            per_request(op, "frequency", frequency, logits, torch.float32),
            per_request(op, "active", active, logits, torch.bool),
        )
    )


@torch.library.register_fake("fastdecode::penalize")
def _(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    check_devices("penalize", logits, *others)
    return logits.new_empty(logits.shape, dtype=value_dtype(logits)), logits.new_empty(
        logits.shape[:1], dtype=torch.int32
    )
