"""Fast decoding of language models: kernels as `torch.ops.fastdecode.*`, decoding systems as compositions of them."""

from . import _lib

_lib.load()

from . import ops  # noqa: E402

_lib.refuse_cuda(ops.__all__)

from ._host import Bonus, FinishReason, KVScheme, Order, Rule, Status, Stream, TreeError  # noqa: E402
from .drafters import Context, Drafter, PromptLookup, SmallModel  # noqa: E402
from .generation import generate, splitmix64, stream  # noqa: E402
from .methods import METHODS, RULES, AcceptanceRule, Method, find_method  # noqa: E402
from .models import KVCacheConfig, load_model  # noqa: E402
from .policies import ConfidenceStop, FixedLength, Policy  # noqa: E402
from .runtime import cpu_levels, pin_threads, set_cpu_level  # noqa: E402
from .types import Chunk, Draft, Result, Results, SamplingParams, Statistics  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "RULES",
    "AcceptanceRule",
    "Bonus",
    "Chunk",
    "ConfidenceStop",
    "Context",
    "Draft",
    "Drafter",
    "FinishReason",
    "FixedLength",
    "KVCacheConfig",
    "KVScheme",
    "Method",
    "Order",
    "Policy",
    "PromptLookup",
    "Result",
    "Results",
    "Rule",
    "SamplingParams",
    "SmallModel",
    "Statistics",
    "Status",
    "Stream",
    "TreeError",
    "cpu_levels",
    "find_method",
    "generate",
    "load_model",
    "ops",
    "pin_threads",
    "set_cpu_level",
    "splitmix64",
    "stream",
]
