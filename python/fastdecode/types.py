"""The values that pass between generate, the loops, the drafters and the policies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeGuard, overload

import numpy as np
import torch
from torch import Tensor

from .models.base import Output

__all__ = ["Chunk", "Draft", "Finish", "Result", "Results", "SamplingParams", "Statistics", "StepStats"]

Finish = Literal["stop", "length", "error"]
PARTS = ("prefill", "draft", "target", "verify", "other")


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens a drafter proposes after the committed ones, one chain per request.

    Attributes:
        tokens: int64 [B, K], ids of the target's vocabulary; entries past `lens` are not read. K may be 0.
        lens: int32 [B], 0..K drafts in use.
        probs: floating [B, K, V], the law each token was drawn from, after the request's filters; None for tokens that
            were not drawn (a lookup), and wherever the rule is not ratio or block, which alone use the law.
    """

    tokens: Tensor
    lens: Tensor
    probs: Tensor | None = None

    @staticmethod
    def none(batch: int) -> Draft:
        """No draft for any of `batch` requests."""
        return Draft(torch.empty(batch, 0, dtype=torch.int64), torch.zeros(batch, dtype=torch.int32))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one request asks for. `None` switches a filter off.

    Attributes:
        temperature: 0 is greedy (ties to the lowest id).
        top_k, top_p, min_p, typical_p: filters, each on the renormalised result of the one before, in this order.
        bias: added to the logits: floating [V], or {id: value}; -inf forbids an id.
        ban_ids: ids that are never produced.
        repetition_penalty: divides a positive logit of an id that prompt or output holds, multiplies another one; 1 is
            off (Keskar et al. 2019). Penalties come before bias and filters, in the order of these three.
        frequency_penalty: subtracted from an id's logit once for each time the output holds it; 0 is off (OpenAI).
        presence_penalty: subtracted from an id's logit if the output holds it at all; 0 is off (OpenAI).
        seed: 64-bit key of the request's random numbers.
        max_new_tokens: most tokens to generate; the model's context may end a request earlier.
        min_new_tokens: end-of-text, stop ids and stop strings cannot end the request before this many tokens.
        stop: the text ends before the first of these strings; `tokens` ends with the token that completes it.
        stop_ids: ids that end the request, beside the model's end-of-text ids; the id found is the last of `tokens`.
        ignore_eos: the model's end-of-text ids are ordinary tokens.
        logprobs: None, or how many of the likeliest ids to report per token beside the token itself; 0: none.
    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    bias: Tensor | Mapping[int, float] | None = None
    ban_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("temperature", _within(self.temperature, 0, _LARGEST_FLOAT32), "a finite number >= 0 (as float32)"),
            ("top_k", self.top_k is None or _count(self.top_k, 2**31 - 1), f"None or an int 0..{2**31 - 1} (0 = off)"),
            ("top_p", self.top_p is None or (_within(self.top_p, 0, 1) and self.top_p > 0), _SHARE),
            ("min_p", self.min_p is None or (_within(self.min_p, 0, 1) and self.min_p < 1), "None, or in [0, 1)"),
            ("typical_p", self.typical_p is None or (_within(self.typical_p, 0, 1) and self.typical_p > 0), _SHARE),
            ("repetition_penalty", _finite(self.repetition_penalty, _SMALLEST_FLOAT32), "a finite float32 > 0"),
            ("frequency_penalty", _finite(self.frequency_penalty), "a finite float32"),
            ("presence_penalty", _finite(self.presence_penalty), "a finite float32"),
            ("seed", is_int(self.seed) and -(2**63) <= self.seed < 2**64, "an int of 64 bits"),
            ("max_new_tokens", _count(self.max_new_tokens), "an int >= 0"),
            ("stop", all(isinstance(string, str) and string for string in self.stop), "strings that are not empty"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            ("logprobs", self.logprobs is None or _count(self.logprobs), "None or an int >= 0"),
        ):
            _check(name, getattr(self, name), ok, expected)
        limit = self.max_new_tokens
        _check(
            "min_new_tokens", self.min_new_tokens, _count(self.min_new_tokens, limit), f"0..{limit} (max_new_tokens)"
        )


_SHARE = "None, or in (0, 1]"
_LARGEST_FLOAT32, _SMALLEST_FLOAT32 = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal


def is_int(value: object) -> TypeGuard[int]:
    """An int of Python or NumPy; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """An int or float of Python or NumPy; a bool is none."""
    return is_int(value) or isinstance(value, (float, np.floating))


def _count(value: object, high: float = math.inf) -> bool:
    return is_int(value) and 0 <= value <= high


def _within(value: object, low: float, high: float) -> bool:
    return is_number(value) and low <= value <= high


def _finite(value: object, low: float = -_LARGEST_FLOAT32) -> bool:
    return _within(value, low, _LARGEST_FLOAT32)


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"generate: {name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, slots=True)
class StepStats:
    """What became of a draft; given to `Drafter.commit` after each round.

    Attributes:
        draft: what the drafter proposed.
        tokens: int64 [B, K + 1], the tokens the round produced, -1 past the emitted ones.
        num_accepted: int32 [B], drafts the rule accepted.
        num_committed: int32 [B], tokens that joined the text (the end of a request may trim what was accepted).
        output: the target's output over root and drafts: row i belongs to slot i.
    """

    draft: Draft
    tokens: Tensor
    num_accepted: Tensor
    num_committed: Tensor
    output: Output


@dataclass(slots=True)
class Statistics:
    """What decoding cost, for one request or for a batch. Filled while the loop runs, hence not frozen.

    Attributes:
        tokens: tokens generated.
        target_passes: forwards of the target after the prompt.
        request_passes: requests in those forwards, summed; the same number for one request.
        drafted_histogram: entry k counts the passes of a request that verified exactly k drafts.
        accepted_histogram: entry k counts the passes of a request that kept exactly k drafts.
        seconds: wall time by part: prefill, draft, target, verify (acceptance, commit, cache), other. A request's clock
            runs from the start of its batch until the request ends.
        cache_bytes: memory of the batch's cached keys and values when a request ended, the largest such (paged: of the
            pages in use); 0 where the model's cache does not tell.
        cache_bits_per_value: bits that one of them takes in memory, scales included; 0 likewise.
    """

    tokens: int = 0
    target_passes: int = 0
    request_passes: int = 0
    drafted_histogram: list[int] = field(default_factory=lambda: [0])
    accepted_histogram: list[int] = field(default_factory=lambda: [0])
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    cache_bytes: int = 0
    cache_bits_per_value: float = 0.0

    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return sum(k * count for k, count in enumerate(self.drafted_histogram))

    @property
    def accepted(self) -> int:
        """Drafts that were kept."""
        return sum(k * count for k, count in enumerate(self.accepted_histogram))

    @property
    def acceptance_by_position(self) -> list[float]:
        """For draft 1, 2, ...: the share kept of those verified there; one behind a rejected draft is not kept."""
        shares = []
        for k in range(1, len(self.drafted_histogram)):
            shares.append(sum(self.accepted_histogram[k:]) / max(1, sum(self.drafted_histogram[k:])))
        return shares

    @property
    def tokens_per_pass(self) -> float:
        """Tokens a request gained per target pass; a larger batch does not raise it."""
        return self.tokens / max(1, self.request_passes)

    @property
    def total_seconds(self) -> float:
        """Wall time, prompt included."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall time, prompt included; 0 before the first."""
        return self.tokens / self.total_seconds if self.total_seconds > 0 else 0.0

    def count_pass(self, drafted: int, accepted: int, committed: int) -> None:
        """One request's share of one target pass."""
        while len(self.drafted_histogram) <= drafted:
            self.drafted_histogram.append(0)
            self.accepted_histogram.append(0)
        self.request_passes += 1
        self.drafted_histogram[drafted] += 1
        self.accepted_histogram[accepted] += 1
        self.tokens += committed


@dataclass(frozen=True, slots=True)
class Result:
    """One finished request.

    Attributes:
        prompt_tokens: ids of the prompt.
        tokens: generated ids; an end-of-text or stop id that ended the request is the last of them.
        text: their text without special tokens, cut before a stop string; None where there is no tokenizer.
        finish_reason: "stop", "length", or "error": the target's row held NaN, or every id was forbidden.
        stop: the id or the string that ended the request, else None.
        logprobs: natural log-probability of each token in the model's own law (temperature 1, no filters), or None.
        top_logprobs: the likeliest (id, log-probability) pairs at each token, best first, or None.
        seed: key of the request's random numbers.
        statistics: what it cost.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str | None
    finish_reason: Finish
    stop: int | str | None
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    seed: int
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Results(Sequence[Result]):
    """The finished requests of a batch in the order of the prompts, and what they cost together."""

    items: tuple[Result, ...]
    statistics: Statistics

    @overload
    def __getitem__(self, index: int) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Result, ...]: ...
    def __getitem__(self, index: int | slice) -> Result | tuple[Result, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.items)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one round added to one request.

    Attributes:
        index: which prompt.
        tokens: ids committed in this round; all chunks of a request together are `Result.tokens`.
        text: text that is now certain (no half characters, nothing a stop string may still cut); all chunks together
            are `Result.text`. None where there is no tokenizer.
        result: the finished request in its last chunk, else None.
    """

    index: int
    tokens: list[int]
    text: str | None
    result: Result | None
