"""Decoding loops, one per file, each readable beside its paper."""

from .autoregressive import autoregressive
from .batch import Batch
from .speculative import speculative

__all__ = ["Batch", "autoregressive", "speculative"]
