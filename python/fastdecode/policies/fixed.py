"""The same draft length in every round."""

from __future__ import annotations

from ..types import Statistics
from .base import Policy

__all__ = ["FixedLength"]


class FixedLength(Policy):
    """`length` drafts per round (gamma of Leviathan et al. 2023); ValueError below 0."""

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"FixedLength: length: expected >= 0, got {length}")
        self.length = length

    def next_length(self, statistics: Statistics) -> int:
        return self.length
