"""Small models and a tokenizer for the loop tests. Everything is float64, where equality is promised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdecode.models import NativeConfig, NativeModel, Output, TabularLM, Tokenizer, Want

VOCAB = 13


def table(vocab_size: int = VOCAB, order: int = 2, seed: int = 1, **options: object) -> TabularLM:
    return TabularLM.random(vocab_size, order, seed, **options)  # type: ignore[arg-type]


def noisy(model: TabularLM, noise: float = 0.7, seed: int = 5, **options: object) -> TabularLM:
    """A draft model: the same table with noise on its logits, so that it is right now and then."""
    generator = torch.Generator().manual_seed(seed)
    bumps = torch.randn(model.table.shape, generator=generator, dtype=torch.float64)
    return TabularLM((model.table.log() + noise * bumps).softmax(-1), **options)  # type: ignore[arg-type]


def native(seed: int = 0, noise: float = 0.0, max_context: int = 64, dtype: torch.dtype = torch.float64) -> NativeModel:
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
    return NativeModel(config, weights, dtype=dtype)


class Chain(TabularLM):
    """After token t comes t + 1 (mod V), almost surely: outputs can be written down."""

    def __init__(self, vocab_size: int = VOCAB, **options: object) -> None:
        law = torch.full((vocab_size, vocab_size), 1e-3, dtype=torch.float64)
        law[torch.arange(vocab_size), (torch.arange(vocab_size) + 1) % vocab_size] = 1
        super().__init__(law / law.sum(-1, keepdim=True), **options)  # type: ignore[arg-type]


class Broken:
    """A model whose rows are NaN from position `first` on, for texts that begin with token `marked`."""

    def __init__(self, model: TabularLM, marked: int, first: int) -> None:
        self.model, self.marked, self.first = model, marked, first
        self.config, self.new_cache = model.config, model.new_cache

    def forward(self, tokens: Tensor, *, cache, positions=None, num_tokens=None, want: Want = Want.LOGITS) -> Output:
        output = self.model.forward(tokens, cache=cache, num_tokens=num_tokens, want=want)
        if output.logits is not None:
            for row, length in enumerate(cache.host_lens):
                if int(cache.tokens[row, 0]) == self.marked:
                    output.logits[row, max(0, self.first - length) :] = float("nan")
        return output


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
