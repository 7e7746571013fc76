"""What a drafter sees, and what it has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._host import Rule, Stream
from ..types import Draft, StepStats

__all__ = ["Context", "Drafter", "Filters", "Penalties", "StopRule"]

StopRule = Callable[[ops.RowStats], Tensor]
"""RowStats of the next draft row -> bool [B], True: draft no further.

A token that was drawn is never taken back: throwing drawn tokens away because of their value would bias the law."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Sampling filters of a batch as the ops take them; None where no request uses one.

    Attributes:
        temperature, top_p, min_p, typical_p: float32 [B]; top_k: int32 [B].
        bias: float32 [B, V].
        ban_ids: int64 [B, S], -1 pads; forbidden at absolute positions below min_lengths (int64 [B, S]), or everywhere.
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    typical_p: Tensor | None = None
    bias: Tensor | None = None
    ban_ids: Tensor | None = None
    min_lengths: Tensor | None = None

    def arguments(self, step: int = 0) -> dict[str, Tensor]:
        """Keyword arguments for an op whose `offset` lies `step` positions before the row it is given."""
        pairs = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        if step and self.min_lengths is not None:
            pairs["min_lengths"] = self.min_lengths - step
        return pairs

    def select(self, rows: Tensor) -> Filters:
        """The filters of these requests."""
        return Filters(**{name: value[rows] for name, value in self.arguments().items()})


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties of a batch as `ops.penalize` takes them; None where no request uses one.

    Attributes:
        prompt_lengths: int32 [B].
        repetition, presence, frequency: float32 [B].
    """

    prompt_lengths: Tensor
    repetition: Tensor | None = None
    presence: Tensor | None = None
    frequency: Tensor | None = None

    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments for `ops.penalize`."""
        return {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}

    def select(self, rows: Tensor) -> Penalties:
        """The penalties of these requests."""
        return Penalties(**{name: value[rows] for name, value in self.arguments().items()})


class Context:
    """The requests of a running batch as drafters see them. Read only for drafters.

    Attributes:
        tokens: int64 [B, capacity], prompt and generated tokens; entries past `lengths` are undefined.
        array: the same memory as a NumPy array.
        lengths: int32 [B], committed tokens, prompt included.
        host_lengths: the same as Python ints.
        finished: bool [B].
        active: bool [B], None while no request has finished.
        greedy: every request takes the argmax of its (penalized) row; seeds and filters are then not used.
        rule, rule_parameters: how drafts are accepted; and its keyword arguments of `ops.verify_chain`.
        filters: sampling filters.
        penalties: applied to rows before the filters; None where no request has any.
        seeds: int64 [B].
        last: the round before this one, the target's output included, so that `propose` alone can use it (`commit` is
            given the same); None in the first round, and after requests have left the batch.
    """

    __slots__ = (
        "_arguments",
        "active",
        "array",
        "filters",
        "finished",
        "greedy",
        "host_lengths",
        "last",
        "lengths",
        "penalties",
        "rule",
        "rule_parameters",
        "seeds",
        "tokens",
    )

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        capacity: int,
        *,
        filters: Filters,
        penalties: Penalties | None = None,
        seeds: Tensor,
        rule: Rule,
        rule_parameters: Mapping[str, float] | None = None,
        greedy: bool,
    ) -> None:
        self.array = np.zeros((len(prompts), capacity), dtype=np.int64)
        for row, prompt in zip(self.array, prompts, strict=True):
            row[: len(prompt)] = prompt
        self.tokens = torch.from_numpy(self.array)
        self.host_lengths = [len(prompt) for prompt in prompts]
        self.lengths = torch.tensor(self.host_lengths, dtype=torch.int32)
        self.finished = torch.zeros(len(prompts), dtype=torch.bool)
        self.active: Tensor | None = None
        self.greedy = greedy
        self.rule = rule
        self.rule_parameters = dict(rule_parameters or {})
        self.filters = filters
        self.penalties = penalties
        self.seeds = seeds
        self.last: StepStats | None = None
        self._arguments = filters.arguments()

    @property
    def batch(self) -> int:
        """Number of requests, finished ones included."""
        return len(self.host_lengths)

    @property
    def offset(self) -> Tensor:
        """int64 [B]: absolute position of the token that comes next; what the ops call offset."""
        return self.lengths.to(torch.int64)

    def penalize(self, logits: Tensor, drafted: Tensor | None = None) -> Tensor:
        """Rows under the requests' penalties, in which the drafts before a row count as output.

        Args:
            logits: floating [B, V], or [B, K + 1, V], the target's rows over root and drafts. Not changed.
            drafted: int64 [B, K], last dimension contiguous. All of them come before a row [B, V], the first i before
                row i of [B, K + 1, V]. None: no drafts.
        Returns:
            logits themselves where no request has a penalty; else float32 (float64 for float64 logits), same shape.
        """
        if self.penalties is None:
            return logits
        tokens, lengths = self.tokens, self.lengths
        if drafted is not None and logits.dim() == 2:
            # ids outside the vocabulary count for nothing, so the room behind each text may stay where it is
            inside = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
            tokens, drafted = torch.cat((tokens.where(inside, -1), drafted), 1), None
            lengths = torch.full_like(lengths, tokens.shape[1])
        return ops.penalize(
            logits, tokens, lengths, draft_tokens=drafted, **self.penalties.arguments(), active=self.active
        ).logits

    def draw(self, logits: Tensor, step: int, drafted: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Draw draft number `step` (0, 1, ...) from a drafter's own row, as the rule wants it.

        greedy: the argmax. coupled: with the noise the target will use at that position, so equal rows give equal
        tokens. Other rules: with noise of its own (stream 1), keyed by the round, because a position may be drafted
        again once its first draw has had its say in the text.

        Args:
            logits: floating [B, V].
            drafted: int64 [B, step], the tokens of this draft so far, which count for the requests' penalties. Without
                them the draft is accepted less often, no more.
        Returns:
            tokens int64 [B]; -1 for a row without a law (NaN, everything forbidden), except greedy.
            probs [B, V], the law they were drawn from, for Draft.probs; None unless the rule is ratio or block.
        """
        logits = self.penalize(logits, drafted)
        if self.greedy:
            return logits.argmax(-1), None
        if self.rule == Rule.COUPLED:
            offset = self.offset + step
            drawn = ops.sample(logits, **self._arguments, seed=self.seeds, offset=offset, active=self.active)
            return drawn.tokens, None
        arguments, offset = self.filters.arguments(step), self.offset
        drawn = ops.sample(
            logits, **arguments, seed=self.seeds, offset=offset, stream=Stream.DRAFT, node=step, active=self.active
        )
        if self.rule not in (Rule.RATIO, Rule.BLOCK):
            return drawn.tokens, None
        position = {"offset": offset} if "min_lengths" in arguments else {}
        return drawn.tokens, ops.target_probs(logits, **arguments, **position, active=self.active).probs

    def filter_arguments(self) -> dict[str, Tensor]:
        """The filters as keyword arguments of an op whose `offset` is this context's."""
        return self._arguments

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these requests, in this order. Called by the loop."""
        index = torch.tensor(rows, dtype=torch.int64)
        self.array = np.ascontiguousarray(self.array[list(rows)])
        self.tokens = torch.from_numpy(self.array)
        self.host_lengths = [self.host_lengths[row] for row in rows]
        self.lengths = self.lengths[index]
        self.finished = self.finished[index]
        self.active = None
        self.filters = self.filters.select(index)
        if self.penalties is not None:
            self.penalties = self.penalties.select(index)
        self.seeds = self.seeds[index]
        self.last = None
        self._arguments = self.filters.arguments()


class Drafter(ABC):
    """Something that proposes tokens. A new one needs `propose` alone; the other methods are for those that keep state.

    A drafter never calls the target, and no output depends on it: it only decides how much one target pass can confirm.
    """

    @abstractmethod
    def propose(self, context: Context, budget: list[int], stop: StopRule | None) -> Draft:
        """Tokens that may follow the committed ones. An id outside the target's vocabulary is rejected.

        Args:
            context: the requests.
            budget: most tokens to draft per request, >= 0; 0 for finished requests.
            stop: asked between draws by drafters that draw one token after another; None to use the budget up.
        """

    def begin(self, context: Context) -> None:  # noqa: B027 - optional
        """A new batch starts; forget the old one. Called once, before the first `propose`; counted as prefill."""

    def commit(self, result: StepStats) -> None:  # noqa: B027 - optional
        """What became of the last draft."""

    def select(self, rows: Sequence[int]) -> None:  # noqa: B027 - optional
        """Requests left the batch: keep only these rows of per-request state, in this order."""
