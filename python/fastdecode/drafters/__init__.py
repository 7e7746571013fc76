"""Things that propose tokens."""

from .base import Context, Drafter, Filters, StopRule
from .ngram import PromptLookup
from .small_model import SmallModel

__all__ = ["Context", "Drafter", "Filters", "PromptLookup", "SmallModel", "StopRule"]
