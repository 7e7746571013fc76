"""Slow and obviously right: what the ops must return, in NumPy long double, written from their contracts.

Every decision comes with its margin, the distance from the point where it would turn: where that is within the rounding
of the compute dtype, a kernel may rightly decide otherwise, and only there.
"""

from . import attention, logits, rng, sample, tree, verify

__all__ = ["attention", "logits", "rng", "sample", "tree", "verify"]
