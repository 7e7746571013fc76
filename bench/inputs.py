"""Inputs of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdecode.runtime import usable_cpus

from . import machine
from .harness import Inputs

MOST_BYTES = 1 << 30  # of all copies, where calls read little of each
LARGE = 100_000  # the vocabularies that goals are about; in smaller rows the call itself takes most of the time


@dataclass(frozen=True)
class Shape:
    """Of logits."""

    batch: int
    vocab_size: int
    dtype: torch.dtype

    @property
    def large(self) -> bool:
        return self.vocab_size >= LARGE

    def __str__(self) -> str:
        return f"B={self.batch} V={self.vocab_size}"

    def logits(self, *rows: int, scale: float = 3.0) -> Tensor:
        """Normal numbers, [batch, *rows, vocab_size]."""
        return (scale * torch.randn(self.batch, *rows, self.vocab_size)).to(self.dtype)


def logits_shapes(quick: bool) -> Iterator[Shape]:
    """The vocabularies of the shipped model, Llama 3 and Qwen 2.5; batches 1, 8 and 64, or on a GPU 1 to 256."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    if torch.get_default_device().type == "cuda" and not quick:
        yield from (Shape(batch, 128256, bfloat16) for batch in (1, 8, 64, 256))
        yield from (Shape(8, 151936, bfloat16), Shape(8, 128256, float32), Shape(64, 128256, float32))
        return
    if quick:
        yield from (Shape(1, 4096, float32), Shape(8, 4096, bfloat16))
        return
    yield from (Shape(1, 4096, float32), Shape(8, 4096, float32))
    for vocab_size in (128256, 151936):
        for dtype in (float32, bfloat16):
            yield from (Shape(batch, vocab_size, dtype) for batch in (1, 8, 64))


def copies(*tensors: Tensor, used_bytes: int | None = None) -> Inputs:
    """Enough copies of these to fall out of the caches when they are used in turn, at least two, at most 1 GiB.

    Args:
        used_bytes: what a call reads of one copy; None means all of it.
    """
    size = sum(tensor.nbytes for tensor in tensors)
    count = -(-machine.cold_bytes_on(tensors[0].device, usable_cpus()) // (used_bytes or size))
    count = max(2, min(count, MOST_BYTES // size))
    return list(zip(*(tensor.expand(count, *tensor.shape).contiguous().unbind() for tensor in tensors), strict=True))


@dataclass(frozen=True)
class Filters:
    """Of the target law, the same for every request; 0 and 1 are off."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0

    def __str__(self) -> str:
        parts = [f"T={self.temperature:g}"]
        parts += [f"k={self.top_k}"] if self.top_k else []
        parts += [f"p={self.top_p:g}"] if self.top_p < 1 else []
        return " ".join(parts)

    def tensors(self, batch: int) -> dict[str, Tensor]:
        """As the ops take them, one value per request."""
        given = {"temperature": torch.full((batch,), self.temperature)}
        if self.top_k:
            given["top_k"] = torch.full((batch,), self.top_k, dtype=torch.int32)
        if self.top_p < 1:
            given["top_p"] = torch.full((batch,), self.top_p)
        return given


TEMPERATURE, TOP_P, TOP_K_TOP_P = Filters(), Filters(top_p=0.9), Filters(top_k=50, top_p=0.9)
