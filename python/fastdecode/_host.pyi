"""Types of the compiled module: enums of csrc/core/enums.h, and data structures of drafters."""

import enum

import numpy as np
import numpy.typing as npt

class Status(enum.IntFlag):
    NAN = 1
    NO_MASS = 2
    UNMAPPED_DRAFT = 4
    ZERO_DRAFT_PROB = 8
    RESIDUAL_FALLBACK = 16
    BAD_LENGTH = 32
    BAD_PAGE = 64
    SATURATED = 128
    ERRORS = 99

class Rule(enum.IntEnum):
    RATIO = 0
    COUPLED = 1
    BLOCK = 2
    TYPICAL = 3
    TOP_BETA = 4

class KVScheme(enum.IntEnum):
    PLAIN = 0
    FP8_E4M3 = 1
    FP8_E5M2 = 2
    INT8 = 3
    INT4 = 4
    KIVI4 = 5
    KIVI2 = 6

class TreeError(enum.IntEnum):
    VALID = 0
    BAD_COUNT = 1
    BAD_ROOT = 2
    BAD_PARENT = 3

class Bonus(enum.IntEnum):
    GREEDY = 0
    SAMPLE = 1

class Order(enum.IntEnum):
    K_THEN_P = 0
    JOINT = 1

class FinishReason(enum.IntEnum):
    NONE = 0
    STOP = 1
    LENGTH = 2

class Stream(enum.IntEnum):
    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    BONUS = 4
    UNMASK_ORDER = 5
    UNMASK_TOKEN = 6
    USER = 7

class NgramIndex:
    """Where each n-gram of a growing text occurred last. ValueError unless 1 <= min_ngram <= max_ngram <= 64."""

    def __init__(self, max_ngram: int = 3, min_ngram: int = 1) -> None: ...
    def extend(self, tokens: npt.NDArray[np.int64]) -> None:
        """Append tokens, int64 [n], contiguous."""

    def propose(self, k: int) -> npt.NDArray[np.int64]:
        """What followed the last earlier occurrence of the longest repeated suffix: int64 [k], or [0] if none."""

    def __len__(self) -> int: ...
