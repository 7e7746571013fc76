"""Fast decoding of language models: kernels as `torch.ops.fastdecode.*`, and decoding systems as compositions of them."""

from . import _lib

_lib.load()

from . import ops  # noqa: E402
from ._host import FinishReason, Rule, Status, Stream  # noqa: E402
from .drafters import Drafter  # noqa: E402
from .generation import generate, splitmix64, stream  # noqa: E402
from .methods import METHODS, Method  # noqa: E402
from .models import load_model  # noqa: E402
from .runtime import cpu_levels, pin_threads, set_cpu_level  # noqa: E402
from .types import Chunk, Draft, Result, Results, SamplingParams, Statistics  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Chunk",
    "Draft",
    "Drafter",
    "FinishReason",
    "Method",
    "Result",
    "Results",
    "Rule",
    "SamplingParams",
    "Statistics",
    "Status",
    "Stream",
    "cpu_levels",
    "generate",
    "load_model",
    "ops",
    "pin_threads",
    "set_cpu_level",
    "splitmix64",
    "stream",
]
