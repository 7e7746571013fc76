"""How much to draft: a length between rounds, and when to stop inside one."""

from .base import Policy
from .confidence import ConfidenceStop
from .fixed import FixedLength

__all__ = ["ConfidenceStop", "FixedLength", "Policy"]
