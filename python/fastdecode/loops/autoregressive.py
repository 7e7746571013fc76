"""Plain decoding: one token per target pass. What every other loop is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..drafters.base import Context
from ..models.base import Model
from ..types import Chunk
from .batch import Batch

__all__ = ["autoregressive"]


@torch.inference_mode()
def autoregressive(model: Model, batch: Batch) -> Iterator[list[Chunk]]:
    """Decode every request of `batch` to its end; yields the chunks of each round."""
    yield batch.start()
    if not batch.running:
        return
    batch.resume()
    cache = batch.prefill(model)
    batch.lap("prefill")
    while batch.running:
        # the root is the last committed token; its row is the law of the next one
        logits = model.forward(batch.roots(), cache=cache).logits
        assert logits is not None
        batch.lap("target")
        tokens, status = choose(batch.context, logits[:, 0])
        emitted = tokens.unsqueeze(1)
        committed = batch.commit(emitted, (tokens >= 0).to(torch.int32), cache)
        batch.lap("verify")
        chunks = batch.record(emitted, committed, status, logits)
        if (rows := batch.leavers()) is not None:
            batch.select(rows)
            cache.select(rows)
        batch.lap("other")
        yield chunks
        batch.resume()


def choose(context: Context, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of every request from its row [B, V]: tokens int64 [B], -1 where inactive or in error; status."""
    logits = context.penalize(logits)
    if context.greedy:
        stats = ops.row_stats(logits, active=context.active)
        return stats.argmax, stats.status
    sampled = ops.sample(
        logits, **context.filter_arguments(), seed=context.seeds, offset=context.offset, active=context.active
    )
    return sampled.tokens, sampled.status
