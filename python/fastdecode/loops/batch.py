"""The requests of one batch while a loop runs: what was asked, what was committed, and who is done.

A loop owns the algorithm; `Batch` owns the bookkeeping that every loop needs after `commit`: texts, stop strings,
log-probabilities, errors, statistics, and dropping requests that have ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from .. import ops
from .._host import FinishReason, Rule, Status
from ..drafters.base import Context, Filters, Penalties
from ..models.base import KVCache, Model, ModelConfig
from ..models.cache import ContiguousKVCache
from ..models.paged_cache import PagedKVCache
from ..models.prefill import prefill
from ..models.tokenizer import Tokenizer
from ..types import Chunk, Finish, Result, SamplingParams, Statistics
from .text import TextStream

__all__ = ["Batch", "Request"]

_ERRORS = int(Status.ERRORS)
_ALWAYS = 2**62  # a min_lengths entry no position reaches: forbidden everywhere


@dataclass(slots=True)
class Request:
    """One request and what it has produced.

    Attributes:
        index: position among the prompts.
        prompt: its ids, at least one.
        params: what was asked for.
        max_length: prompt and generated tokens together end here: the request's own cap or the model's context.
        text: follows the tokens if stop strings are to be found or chunks carry text, else None.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    max_length: int
    text: TextStream | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: Finish | None = None
    stop: int | str | None = None
    statistics: Statistics = field(default_factory=Statistics)


class Batch:
    """The running requests, row by row, and the clock.

    Args:
        config: the target's.
        prompts, params: ids and sampling parameters of every request.
        rule, rule_parameters: how drafts are accepted.
        tokenizer: for stop strings and text; may be None if neither is needed.
        with_text: chunks carry text while the requests run.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        *,
        rule: Rule = Rule.COUPLED,
        rule_parameters: Mapping[str, float] | None = None,
        tokenizer: Tokenizer | None = None,
        with_text: bool = False,
    ) -> None:
        self.statistics = Statistics()
        self._lap = perf_counter()
        self._tokenizer = tokenizer
        self._cache: KVCache | None = None
        self.requests: list[Request] = []  # by row; shrinks when requests leave
        for index, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
            max_length = min(len(prompt) + asked.max_new_tokens, config.max_context)
            request = Request(index, prompt, asked, max_length)
            if tokenizer is not None and (with_text or asked.stop):
                request.text = TextStream(tokenizer, asked.stop, asked.min_new_tokens)
            self.requests.append(request)
        stops = [_stop_ids(config, asked) for asked in params]
        self._stop_ids = _padded(stops) if any(stops) else None
        self._max_lengths = torch.tensor([request.max_length for request in self.requests], dtype=torch.int32)
        self._top = max((asked.logprobs for asked in params if asked.logprobs is not None), default=None)
        greedy = all(asked.temperature == 0 and asked.bias is None and not asked.ban_ids for asked in params)
        greedy = greedy and not any(asked.min_new_tokens and ids for asked, ids in zip(params, stops))
        self.context = Context(
            prompts,
            max(request.max_length for request in self.requests),
            filters=_filters(config, prompts, params, stops),
            penalties=_penalties(prompts, params),
            seeds=torch.tensor([_signed(asked.seed) for asked in params], dtype=torch.int64),
            rule=rule,
            rule_parameters=rule_parameters,
            greedy=greedy,
        )

    # -- before and during a round -------------------------------------------------------------------------------------

    def start(self) -> list[Chunk]:
        """End the requests that have no room for a token; their chunks."""
        chunks = []
        for row, request in enumerate(self.requests):
            if len(request.prompt) >= request.max_length:
                self.context.finished[row] = True
                self._end(request, "length")
                chunks.append(self._chunk(request, 0))
        if chunks:
            self.context.active = ~self.context.finished
        return chunks

    @property
    def running(self) -> bool:
        """Whether any request has not ended."""
        return any(request.finish is None for request in self.requests)

    def prefill(self, model: Model) -> KVCache:
        """A cache that holds every prompt but its last token, which is slot 0 of the first round."""
        context = self.context
        counts = [length - 1 for length in context.host_lengths]
        self._cache = prefill(model, context.tokens, counts, context.tokens.shape[1])
        return self._cache

    def roots(self) -> Tensor:
        """int64 [B, 1]: slot 0, the last committed token of each request."""
        return torch.tensor([[(request.tokens or request.prompt)[-1]] for request in self.requests])

    def budget(self, length: int) -> list[int]:
        """Drafts per request: `length`, less where the round would pass the request's end; 0 if it has ended."""
        return [
            0 if request.finish else max(0, min(length, request.max_length - have - 1))
            for request, have in zip(self.requests, self.context.host_lengths)
        ]

    def resume(self) -> None:
        """Start the clock, after a yield: what the consumer did with the chunks is not decoding."""
        self._lap = perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last lap to a part of Statistics.seconds."""
        now = perf_counter()
        self.statistics.seconds[part] += now - self._lap
        self._lap = now

    # -- after a round -------------------------------------------------------------------------------------------------

    def commit(self, tokens: Tensor, num_emitted: Tensor, cache: KVCache) -> ops.Committed:
        """Trim what a round produced at stop ids and caps, and make its keys and values permanent."""
        context = self.context
        committed = ops.commit(
            tokens,
            num_emitted,
            context.lengths,
            context.finished,
            max_lengths=self._max_lengths,
            stop_ids=self._stop_ids,
        )
        cache.keep(None, committed.num_committed)
        return committed

    def record(
        self,
        tokens: Tensor,
        committed: ops.Committed,
        status: Tensor,
        logits: Tensor,
        drafted: Sequence[int] | None = None,
        accepted: Tensor | None = None,
    ) -> list[Chunk]:
        """Book a committed round; the chunks of the requests that took part.

        Args:
            tokens: int64 [B, n], what the round emitted.
            committed: from `commit`.
            status: int32 [B], of the op that chose the tokens.
            logits: the target's [B, n, V], for log-probabilities.
            drafted, accepted: drafts verified and accepted per request; None where the loop drafts nothing.
        """
        context = self.context
        self.statistics.target_passes += 1
        logprobs = None
        if self._top is not None:
            logprobs = ops.token_logprobs(logits, tokens, top=self._top, active=context.active)
        rows, counts = tokens.tolist(), committed.num_committed.tolist()
        reasons, codes = committed.reason.tolist(), status.tolist()
        kept = accepted.tolist() if accepted is not None else [0] * len(counts)
        chunks = []
        ended = False
        for row, request in enumerate(self.requests):
            if request.finish is not None:
                continue
            count = counts[row]
            new = rows[row][:count]
            start = context.host_lengths[row]
            context.array[row, start : start + count] = new
            context.host_lengths[row] += count
            if codes[row] & _ERRORS:
                finish: Finish | None = "error"
            else:
                finish = _FINISH[reasons[row]]
            stop: int | str | None = new[-1] if finish == "stop" else None
            if request.text is not None:
                text_tokens, string = request.text.push(new)
                if string is not None:
                    new, finish, stop = new[:text_tokens], "stop", string
            request.tokens += new
            if logprobs is not None and request.params.logprobs is not None:
                self._record_logprobs(request, logprobs, row, len(new))
            verified = drafted[row] if drafted is not None else 0
            for statistics in (request.statistics, self.statistics):
                statistics.count_pass(verified, min(kept[row], len(new)), len(new))
            request.statistics.target_passes += 1
            if finish is not None:
                ended = True
                request.stop = stop
                context.finished[row] = True
                self.lap("other")
                self._end(request, finish)
            chunks.append(self._chunk(request, len(new)))
        if ended:
            context.active = ~context.finished
        return chunks

    def leavers(self) -> list[int] | None:
        """The rows to go on with, once at least half have ended; None while it is not worth copying caches."""
        rows = [row for row, request in enumerate(self.requests) if request.finish is None]
        return rows if rows and 2 * len(rows) <= len(self.requests) else None

    def select(self, rows: list[int]) -> None:
        """Keep only these rows. The loop does the same to its caches."""
        index = torch.tensor(rows, dtype=torch.int64)
        self.requests = [self.requests[row] for row in rows]
        self._max_lengths = self._max_lengths[index]
        if self._stop_ids is not None:
            self._stop_ids = self._stop_ids[index]
        self.context.select(rows)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _record_logprobs(self, request: Request, logprobs: ops.TokenLogprobs, row: int, count: int) -> None:
        request.logprobs += logprobs.logprobs[row, :count].tolist()
        top = request.params.logprobs
        if top:
            ids = logprobs.top_ids[row, :count, :top].tolist()
            values = logprobs.top_logprobs[row, :count, :top].tolist()
            request.top_logprobs += [list(zip(*pair)) for pair in zip(ids, values)]

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        request.statistics.seconds = dict(self.statistics.seconds)
        if isinstance(self._cache, (ContiguousKVCache, PagedKVCache)):
            for statistics in (request.statistics, self.statistics):
                statistics.cache_bytes = max(self.statistics.cache_bytes, self._cache.num_bytes)
                statistics.cache_bits_per_value = self._cache.bits_per_value
        if request.text is not None:
            request.text.finish(stopped=isinstance(request.stop, str))

    def _chunk(self, request: Request, count: int) -> Chunk:
        tokens = request.tokens[len(request.tokens) - count :]
        text = request.text.take() if request.text is not None else None
        return Chunk(request.index, tokens, text, self._result(request) if request.finish else None)

    def _result(self, request: Request) -> Result:
        assert request.finish is not None
        if request.text is not None:
            text: str | None = request.text.text
        else:
            text = self._tokenizer.decode(request.tokens) if self._tokenizer is not None else None
        asked = request.params.logprobs
        return Result(
            prompt_tokens=request.prompt,
            tokens=request.tokens,
            text=text,
            finish_reason=request.finish,
            stop=request.stop,
            logprobs=request.logprobs if asked is not None else None,
            top_logprobs=request.top_logprobs if asked else None,
            seed=request.params.seed,
            statistics=request.statistics,
        )


_FINISH: dict[int, Finish | None] = {
    int(FinishReason.NONE): None,
    int(FinishReason.STOP): "stop",
    int(FinishReason.LENGTH): "length",
}


def _stop_ids(config: ModelConfig, params: SamplingParams) -> tuple[int, ...]:
    return tuple(dict.fromkeys((() if params.ignore_eos else config.eos_token_ids) + params.stop_ids))


def _signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _padded(rows: Sequence[Sequence[int]], fill: int = -1) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)


def _filters(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    stops: Sequence[Sequence[int]],
) -> Filters:
    """Filter tensors; a filter that no request uses is None and costs nothing."""
    temperature = torch.tensor([asked.temperature for asked in params], dtype=torch.float32)
    sampled = bool((temperature > 0).any())
    top_k = [asked.top_k or 0 for asked in params]
    top_p = [1.0 if asked.top_p is None else asked.top_p for asked in params]
    min_p = [asked.min_p or 0.0 for asked in params]
    typical_p = [1.0 if asked.typical_p is None else asked.typical_p for asked in params]
    bias = None
    if any(asked.bias is not None for asked in params):
        bias = torch.zeros(len(params), config.vocab_size, dtype=torch.float32)
        for row, asked in zip(bias, params, strict=True):
            if isinstance(asked.bias, Tensor):
                row += asked.bias
            elif asked.bias is not None:
                row[list(asked.bias)] = torch.tensor(list(asked.bias.values()), dtype=torch.float32)
    # ids that would end a request are banned below its shortest length, other bans hold at every position
    banned, below = [], []
    for prompt, asked, ends in zip(prompts, params, stops, strict=True):
        early = ends if asked.min_new_tokens else ()
        banned.append([*asked.ban_ids, *early])
        below.append([_ALWAYS] * len(asked.ban_ids) + [min(len(prompt) + asked.min_new_tokens, _ALWAYS)] * len(early))
    return Filters(
        temperature=temperature,
        top_k=torch.tensor(top_k, dtype=torch.int32) if sampled and any(top_k) else None,
        top_p=torch.tensor(top_p, dtype=torch.float32) if sampled and min(top_p) < 1 else None,
        min_p=torch.tensor(min_p, dtype=torch.float32) if sampled and max(min_p) > 0 else None,
        typical_p=torch.tensor(typical_p, dtype=torch.float32) if sampled and min(typical_p) < 1 else None,
        bias=bias,
        ban_ids=_padded(banned) if any(banned) else None,
        min_lengths=_padded(below, 0) if any(asked.min_new_tokens for asked in params) and any(banned) else None,
    )


def _penalties(prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Penalties | None:
    """Penalty tensors; None if no request uses any, and None for one that no request uses."""
    columns: dict[str, Tensor] = {}
    for name, off in (("repetition", 1.0), ("presence", 0.0), ("frequency", 0.0)):
        values = [getattr(asked, f"{name}_penalty") for asked in params]
        if any(value != off for value in values):
            columns[name] = torch.tensor(values, dtype=torch.float32)
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    return Penalties(lengths, **columns) if columns else None
