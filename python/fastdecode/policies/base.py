"""What a policy decides."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..drafters.base import StopRule
from ..types import Statistics

__all__ = ["Policy"]


class Policy(ABC):
    """Decides how many tokens to draft. No policy can change the law of the output."""

    @abstractmethod
    def next_length(self, statistics: Statistics) -> int:
        """Most tokens to draft in the next round, >= 0, for every request. `statistics` are the batch's so far."""

    @property
    def stop(self) -> StopRule | None:
        """Asked inside a draft whether to draw another token; None: draw as many as `next_length` says."""
        return None
