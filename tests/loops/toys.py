"""Small models and a tokenizer for the loop tests. Everything is float64, where equality is promised."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdecode.models import KVCacheConfig, NativeConfig, NativeModel, TabularLM, Tokenizer
from fastdecode.testing.models import Chain

VOCAB = 13


def table(vocab_size: int = VOCAB, order: int = 2, seed: int = 1, **options: object) -> TabularLM:
    return TabularLM.random(vocab_size, order, seed, **options)  # type: ignore[arg-type]


def native(
    seed: int = 0,
    noise: float = 0.0,
    max_context: int = 64,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 8,
    kv_cache: str | KVCacheConfig = "contiguous",
) -> NativeModel:
    """A random Llama of two layers; with noise, a disturbed copy of the one without."""
    config = NativeConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
            "max_position_embeddings": max_context,
        }
    )
    generator, disturb = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            weight = 1 + 0.1 * draw
        else:
            weight = draw if "embed" in name or "head" in name else 1.5 * draw / shape[-1] ** 0.5
        weights[name] = weight + noise * torch.randn(shape, generator=disturb, dtype=torch.float64)
    return NativeModel(config, weights, dtype=dtype, kv_cache=kv_cache)


def chain(**options: object) -> Chain:
    """After token t comes t + 1 (mod V)."""
    return Chain(VOCAB, **options)


class _Letters:
    """Each id is a piece of text; the last id is special. A text is encoded letter by letter behind `begin`."""

    def __init__(self, pieces: Sequence[str], begin: Sequence[int]) -> None:
        self.pieces, self.begin = list(pieces), list(begin)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        last = len(self.pieces) - 1
        return "".join(self.pieces[i] for i in ids if not (skip_special_tokens and i == last))

    def encode(self, text: str) -> object:
        ids = self.begin + [self.pieces.index(letter) for letter in text]
        return type("Encoding", (), {"ids": ids})


def letters(pieces: Sequence[str], begin: Sequence[int] = ()) -> Tokenizer:
    return Tokenizer(_Letters(pieces, begin))
