"""Speculative decoding with one chain of drafts per request.

Steps as in Leviathan et al. 2023 (Algorithm 1) and Chen et al. 2023 (Algorithm 2): draft, score, accept, emit one more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._host import Rule
from ..drafters.base import Context, Drafter
from ..models.base import Model
from ..policies.base import Policy
from ..types import Chunk, Draft, StepStats
from .batch import Batch

__all__ = ["speculative"]


@torch.inference_mode()
def speculative(model: Model, batch: Batch, drafter: Drafter, policy: Policy) -> Iterator[list[Chunk]]:
    """Decode every request of `batch` to its end; yields the chunks of each round.

    Under the coupled rule requests get the tokens of plain decoding, and greedy ones under every rule but top_beta;
    under ratio and block its law; under typical and top_beta neither.
    """
    yield batch.start()
    if not batch.running:
        return
    batch.resume()
    context = batch.context
    cache = batch.prefill(model)
    drafter.begin(context)
    batch.lap("prefill")
    while batch.running:
        # step 1: draft x_1 .. x_gamma; near a request's end only as many as it has room for
        budget = batch.budget(policy.next_length(batch.statistics))
        draft = drafter.propose(context, budget, policy.stop)
        fed, lens = check_draft(type(drafter).__name__, draft, budget, model.config.vocab_size)
        batch.lap("draft")

        # step 2: one target forward scores the root and every draft
        slots = torch.cat((batch.roots(), fed), 1)
        num_tokens = None if min(lens) == draft.tokens.shape[1] else [length + 1 for length in lens]
        output = model.forward(slots, cache=cache, num_tokens=num_tokens)
        assert output.logits is not None
        batch.lap("target")

        # steps 3 and 4: accept a prefix by the batch's rule, and emit one token more
        verified = verify(context, draft, output.logits)
        committed = batch.commit(verified.tokens, verified.num_emitted, cache)
        batch.lap("verify")

        context.last = StepStats(draft, verified.tokens, verified.num_accepted, committed.num_committed, output)
        drafter.commit(context.last)
        chunks = batch.record(
            verified.tokens, committed, verified.status, output.logits, drafted=lens, accepted=verified.num_accepted
        )
        if (rows := batch.leavers()) is not None:
            batch.select(rows)
            cache.select(rows)
            drafter.select(rows)
        batch.lap("other")
        yield chunks
        batch.resume()


def check_draft(drafter: str, draft: Draft, budget: list[int], vocab_size: int) -> tuple[Tensor, list[int]]:
    """What a drafter proposed, with its ids fit for the model.

    An id outside the vocabulary is no error: verification rejects it, so any other may take its place in the forward.

    Returns:
        tokens int64 [B, K]; lengths per request.
    Raises:
        ValueError: anything that breaks the contract of Draft or of the budget, by the drafter's name.
    """
    if not isinstance(draft, Draft):
        raise ValueError(f"{drafter}.propose: expected a Draft, got {draft!r}")
    tokens, batch = draft.tokens, len(budget)
    size = tokens.shape[-1] if isinstance(tokens, Tensor) and tokens.dim() == 2 else "K"
    _check_field(drafter, "tokens", tokens, [batch, size], (torch.int64,))
    _check_field(drafter, "lens", draft.lens, [batch], (torch.int32,))
    if draft.probs is not None:
        _check_field(drafter, "probs", draft.probs, [batch, size, vocab_size], _FLOATING)
    lens = draft.lens.tolist()
    outside = False
    for row, length, most in zip(tokens.tolist(), lens, budget):
        if not 0 <= length <= min(size, most):
            raise ValueError(f"{drafter}.propose: lens: expected 0..{size} within the budget {budget}, got {lens}")
        if length and (min(row[:length]) < 0 or max(row[:length]) >= vocab_size):
            outside = True
    if outside:
        tokens = tokens.where((tokens >= 0) & (tokens < vocab_size), 0)
    return tokens, lens


_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_field(drafter: str, name: str, value: Tensor, shape: list[Any], dtypes: tuple[torch.dtype, ...]) -> None:
    if isinstance(value, Tensor) and value.dtype in dtypes and list(value.shape) == shape:
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    sizes = ", ".join(map(str, shape))
    raise ValueError(f"{drafter}.propose: {name}: expected {kinds} [{sizes}], got {got}")


def verify(context: Context, draft: Draft, target_logits: Tensor) -> ops.Verified:
    """Accept the drafts by the batch's rule; target_logits [B, K + 1, V]."""
    tokens, lens = _dense(draft.tokens), _dense(draft.lens)
    target_logits = context.penalize(target_logits, tokens)
    if not context.greedy or context.rule == Rule.TOP_BETA:
        probs = draft.probs if draft.probs is None else _dense(draft.probs)
        if probs is not None and probs.dtype != target_logits.dtype:
            # widened, not narrowed: rounding the draft's law after it was drawn from would bias the ratio
            dtype = torch.promote_types(probs.dtype, target_logits.dtype)
            probs, target_logits = probs.to(dtype), target_logits.to(dtype)
        return ops.verify_chain(
            tokens,
            probs,
            lens,
            target_logits=target_logits,
            rule=context.rule,
            **_rule_arguments(context),
            active=context.active,
        )
    argmax = ops.row_stats(target_logits, active=context.active).argmax
    return ops.verify_chain_greedy(tokens, argmax, lens, active=context.active)


def _rule_arguments(context: Context) -> dict[str, Any]:
    """Filters, random numbers and parameters, as the batch's rule takes them."""
    arguments: dict[str, Any] = {**context.filter_arguments(), **context.rule_parameters}
    if context.rule == Rule.TOP_BETA:  # at temperature 0: nothing is filtered or drawn, only bans know positions
        arguments.pop("temperature", None)
        return {**arguments, "offset": context.offset} if "min_lengths" in arguments else arguments
    if context.rule == Rule.TYPICAL:
        arguments["bonus"] = "sample"
    return {**arguments, "seed": context.seeds, "offset": context.offset}


def _dense(tensor: Tensor) -> Tensor:
    """The ops want the last dimension contiguous; a drafter may well propose an expanded token."""
    # not .contiguous(), which leaves an empty tensor as it is
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
