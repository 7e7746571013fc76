"""Fast decoding of language models: kernels as `torch.ops.fastdecode.*`, and decoding systems as compositions of them."""

from . import _lib

_lib.load()

from . import ops  # noqa: E402
from ._host import FinishReason, Rule, Status, Stream  # noqa: E402
from .runtime import cpu_levels, pin_threads, set_cpu_level  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FinishReason",
    "Rule",
    "Status",
    "Stream",
    "cpu_levels",
    "ops",
    "pin_threads",
    "set_cpu_level",
]
