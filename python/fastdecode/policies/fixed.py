"""The same draft length in every round."""

from __future__ import annotations

from ..types import Statistics, is_int
from .base import Policy

__all__ = ["FixedLength"]


class FixedLength(Policy):
    """`length` drafts per round (gamma of Leviathan et al. 2023); ValueError unless it is an int >= 0."""

    def __init__(self, length: int) -> None:
        if not is_int(length) or length < 0:
            raise ValueError(f"{type(self).__name__}: length: expected an int >= 0, got {length!r}")
        self.length = length

    def next_length(self, statistics: Statistics) -> int:
        return self.length
