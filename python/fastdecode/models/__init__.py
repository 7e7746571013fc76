"""Models and their caches: one protocol, a native Llama-family runner, and tables for tests."""

from .base import HiddenStates, KVCache, Model, ModelConfig, Output, Want
from .cache import ContiguousKVCache, TokenCache
from .checkpoint import NativeConfig
from .native import NativeModel, load_model
from .tabular import TabularLM
from .tokenizer import IncrementalDecoder, Tokenizer

__all__ = [
    "ContiguousKVCache",
    "HiddenStates",
    "IncrementalDecoder",
    "KVCache",
    "Model",
    "ModelConfig",
    "NativeConfig",
    "NativeModel",
    "Output",
    "TabularLM",
    "TokenCache",
    "Tokenizer",
    "Want",
    "load_model",
]
