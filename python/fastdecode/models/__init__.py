"""Models and their caches: one protocol; a native Llama-family runner, models of transformers, tables for tests."""

from .base import HiddenStates, KVCache, Model, ModelConfig, Output, Want
from .cache import ContiguousKVCache, TokenCache
from .checkpoint import NativeConfig
from .huggingface import HuggingFaceCache, HuggingFaceModel
from .native import NativeModel, load_model
from .paged_cache import KVCacheConfig, PagedKVCache
from .tabular import TabularLM
from .tokenizer import IncrementalDecoder, Tokenizer

__all__ = [
    "ContiguousKVCache",
    "HiddenStates",
    "HuggingFaceCache",
    "HuggingFaceModel",
    "IncrementalDecoder",
    "KVCache",
    "KVCacheConfig",
    "Model",
    "ModelConfig",
    "NativeConfig",
    "NativeModel",
    "Output",
    "PagedKVCache",
    "TabularLM",
    "TokenCache",
    "Tokenizer",
    "Want",
    "load_model",
]
