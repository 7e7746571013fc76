"""Stop drafting where the drafter is unsure."""

from __future__ import annotations

import torch
from torch import Tensor

from ..drafters.base import StopRule
from ..ops import RowStats
from ..types import is_number
from .fixed import FixedLength

__all__ = ["ConfidenceStop"]


class ConfidenceStop(FixedLength):
    """Draw no further token once the next row's largest probability is below `threshold`; at most `length` drafts.

    The probability is the drafter's own, before the request's filters. At least one token is drafted per round, and a
    drawn token is always verified, so the law of the output is unchanged.
    """

    def __init__(self, length: int, threshold: float) -> None:
        super().__init__(length)
        if not is_number(threshold) or not 0 <= threshold <= 1:
            raise ValueError(f"ConfidenceStop: threshold: expected 0..1, got {threshold!r}")
        self.threshold = threshold

    @property
    def stop(self) -> StopRule:
        return self._unsure

    def _unsure(self, stats: RowStats) -> Tensor:
        return torch.exp(stats.max - stats.logsumexp) < self.threshold
