"""verify_chain, K = 4, beside plain torch and beside our own ops that read the same rows.

These rows time the Python call, whose 20 arguments take microseconds by themselves: "the call alone" is the same call
on a vocabulary of 16, timed in the same run. The kernel without Python is timed by the benchmark in C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..goals import at_most_times, beyond_ns, beyond_us
from ..harness import Case
from ..inputs import TOP_K_TOP_P, Shape, copies, logits_shapes

K = 4
REJECTED = 2  # the draft that the cases "rejects" reject: its probability under the target is 0
CALL, UNIFORMS, STATS = "the call alone", "fastdecode, uniforms", "fastdecode row_stats"

# --- ours; all take the same inputs -----------------------------------------------------------------------------------


def probs_uniforms(tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, *_: Tensor) -> object:
    return ops.verify_chain(tokens, draft, target_probs=target, uniforms=uniforms)


def probs_seeded(tokens: Tensor, draft: Tensor, target: Tensor, _: Tensor, seed: Tensor, offset: Tensor) -> object:
    return ops.verify_chain(tokens, draft, target_probs=target, seed=seed, offset=offset)


def logits_uniforms(
    tokens: Tensor, draft: Tensor, logits: Tensor, uniforms: Tensor, *_: Tensor, **filters: Tensor
) -> object:
    return ops.verify_chain(tokens, draft, target_logits=logits, uniforms=uniforms, **filters)


def logits_coupled(tokens: Tensor, _draft: Tensor, logits: Tensor, _: Tensor, seed: Tensor, offset: Tensor) -> object:
    return ops.verify_chain(tokens, target_logits=logits, rule="coupled", seed=seed, offset=offset)


def row_stats_of_all(tokens: Tensor, draft: Tensor, logits: Tensor, *_: Tensor) -> object:
    return ops.row_stats(logits)


def sample_all(tokens: Tensor, _draft: Tensor, logits: Tensor, _: Tensor, seed: Tensor, offset: Tensor) -> object:
    return [ops.sample(logits[:, i], seed=seed, offset=offset) for i in range(K + 1)]


def call_alone(*_: Tensor, tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor) -> object:
    return ops.verify_chain(tokens, draft, target_probs=target, uniforms=uniforms)


# --- in torch ---------------------------------------------------------------------------------------------------------


def torch_ratio(tokens: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, *_: Tensor) -> Tensor:
    """All rows at once, without a host read: accept, pick the residual or bonus row, draw by inverse CDF."""
    p = target[:, :-1].gather(-1, tokens[..., None])[..., 0]
    q = draft.gather(-1, tokens[..., None])[..., 0]
    accepted = (uniforms[:, :-1] * q < p).int().cumprod(1).sum(1)
    rows = torch.arange(len(tokens))
    final = target[rows, accepted]
    residual = (final - draft[rows, accepted.clamp(max=K - 1)]).clamp_(min=0)
    cumulative = torch.where((accepted == K)[:, None], final, residual).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, -1:].float() * cumulative[:, -1:])
    keep = torch.arange(K + 1) < accepted[:, None]
    padded = torch.nn.functional.pad(tokens, (0, 1)).masked_fill(~keep, -1)
    return padded.scatter(1, accepted[:, None], drawn)


def torch_softmax_ratio(tokens: Tensor, draft: Tensor, logits: Tensor, *uniforms: Tensor) -> Tensor:
    return torch_ratio(tokens, draft, torch.softmax(logits.float(), -1), *uniforms)


def torch_topk_ratio(
    tokens: Tensor, draft: Tensor, logits: Tensor, *uniforms: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    values, ids = logits.topk(top_k, -1)
    probs = torch.softmax(values.float() / temperature, -1)
    probs.masked_fill_(probs.cumsum(-1) - probs >= top_p, 0)
    probs /= probs.sum(-1, keepdim=True)
    return torch_ratio(tokens, draft, torch.zeros(logits.shape).scatter_(-1, ids, probs), *uniforms)


def torch_race(tokens: Tensor, draft: Tensor, logits: Tensor, *_: Tensor) -> Tensor:
    """What sampling every row and comparing costs; the noise is not keyed by position and id."""
    probs = torch.softmax(logits.float(), -1)
    drawn = probs.div_(torch.empty_like(probs).exponential_()).argmax(-1)
    accepted = (tokens == drawn[:, :-1]).int().cumprod(1).sum(1)
    return drawn.masked_fill_(torch.arange(K + 1) > accepted[:, None], -1)


# --- rows -------------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        logits = shape.logits(K + 1)
        draft = torch.softmax(logits[:, :K].float() + 0.5 * torch.randn(shape.batch, K, shape.vocab_size), -1)
        uniforms = torch.rand(shape.batch, K + 1, dtype=torch.float64)
        uniforms[:, :K] *= 1e-6  # accepts what both laws can give
        seed, offset = torch.arange(shape.batch), torch.zeros(shape.batch, dtype=torch.int64)
        after = (uniforms, seed, offset)
        if shape.dtype == torch.float32:  # probabilities are float32
            yield from _probs(shape, logits, draft, after)
        yield from _logits(shape, logits, draft, after)


def _probs(shape: Shape, logits: Tensor, draft: Tensor, after: tuple[Tensor, ...]) -> Iterator[Case]:
    target = torch.softmax(logits, -1)
    tokens = (target[:, :K] - draft).argmax(-1)  # likelier under the target: always accepted
    target.scatter_(-1, tokens[:, REJECTED, None, None].expand(-1, K + 1, 1), 0.0)
    target /= target.sum(-1, keepdim=True)
    for slot in range(K):
        if slot != REJECTED:
            tokens[:, slot] = (target[:, slot] - draft[:, slot]).argmax(-1)
    read_bytes = 2 * shape.batch * shape.vocab_size * 4  # the rows of the residual
    small = torch.softmax(torch.randn(2, 1, K + 1, 16), -1)
    alone = partial(
        call_alone,
        tokens=tokens[:1] % 16,
        draft=small[0, :, :K].contiguous(),
        target=small[1],
        uniforms=after[0][:1],
    )
    inputs = [(tokens, *pair, *after) for pair in copies(draft, target, used_bytes=read_bytes)]
    name = f"{shape} probs, rejects"
    single = shape.batch == 1 and shape.large
    yield Case(
        shape=f"{name}, uniforms",
        dtype=shape.dtype,
        elements=2 * shape.batch * shape.vocab_size,
        bytes_moved=read_bytes,
        inputs=inputs,
        ours=probs_uniforms,
        peers={"torch": torch_ratio, CALL: alone},
        goals=[beyond_us(60, CALL)] if single else [],
    )
    yield Case(
        shape=f"{name}, seed",
        dtype=shape.dtype,
        elements=2 * shape.batch * shape.vocab_size,
        bytes_moved=read_bytes,
        inputs=inputs,
        ours=probs_seeded,
        peers={"torch": torch_ratio, UNIFORMS: probs_uniforms},
        goals=[beyond_ns(0.6, shape.vocab_size, UNIFORMS)] if single else [],
    )


def _logits(shape: Shape, logits: Tensor, draft: Tensor, after: tuple[Tensor, ...]) -> Iterator[Case]:
    tokens = (torch.softmax(logits[:, :K].float(), -1) - draft).argmax(-1)
    pairs = copies(draft, logits, used_bytes=logits.nbytes)
    yield Case(
        shape=f"{shape} logits, accepts, uniforms",
        dtype=shape.dtype,
        elements=logits.numel(),
        bytes_moved=logits.nbytes,
        inputs=[(tokens, *pair, *after) for pair in pairs],
        ours=logits_uniforms,
        peers={"torch": torch_softmax_ratio, STATS: row_stats_of_all},
        goals=[at_most_times(1.3, STATS)] if shape.batch == 1 and shape.large else [],
    )
    _, seed, offset = after
    drawn = torch.stack([ops.sample(logits[:, i], seed=seed, offset=offset + i).tokens for i in range(K)], 1)
    yield Case(
        shape=f"{shape} logits, accepts, coupled",
        dtype=shape.dtype,
        elements=logits.numel(),
        bytes_moved=logits.nbytes,
        inputs=[(drawn, *pair, *after) for pair in pairs],
        ours=logits_coupled,
        peers={"torch": torch_race, "fastdecode sample": sample_all},
    )
    filters = TOP_K_TOP_P
    given = filters.tensors(shape.batch)
    target = torch.stack([ops.target_probs(logits[:, i], **given).probs for i in range(K)], 1)
    scaled = draft.clamp(min=1e-30).log()
    draft = torch.stack([ops.target_probs(scaled[:, i], **given).probs for i in range(K)], 1)
    tokens = torch.minimum(target, draft).argmax(-1)
    yield Case(
        shape=f"{shape} logits {filters}, accepts, uniforms",
        dtype=shape.dtype,
        elements=logits.numel(),
        bytes_moved=logits.nbytes,
        inputs=[(tokens, *pair, *after) for pair in copies(draft, logits, used_bytes=logits.nbytes)],
        ours=partial(logits_uniforms, **given),
        peers={
            "torch": partial(
                torch_topk_ratio, temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p
            )
        },
    )


if __name__ == "__main__":
    report.main(__file__)
