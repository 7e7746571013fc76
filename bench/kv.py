"""Caches for the benchmarks, and what one writes in torch in place of the ops on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdecode.ops import KVPages

HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 32  # of an 8B model


@dataclass(frozen=True)
class Cache:
    """Pages for `batch` requests of up to `length` tokens each, in a random order."""

    pages: KVPages
    page_table: Tensor

    @classmethod
    def make(cls, scheme: str, batch: int, length: int, dtype: torch.dtype, *, tail_size: int = 0) -> Cache:
        width = -(-length // PAGE_SIZE)
        pages = KVPages.allocate(
            batch * width,
            PAGE_SIZE,
            HEADS,
            HEAD_DIM,
            scheme=scheme,
            dtype=dtype,
            layout="NHD",
            batch=batch if tail_size else 0,
            tail_size=tail_size,
            device=torch.get_default_device(),
        )
        return cls(pages, torch.randperm(batch * width).int().view(batch, width))

    def slots(self, length: int) -> Tensor:
        """Of tokens 0 .. length - 1 of every request, [batch * length]."""
        at = torch.arange(length)
        return (self.page_table[:, at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE).flatten()

    def token_bytes(self) -> float:
        """Of one token, keys and values, scales included."""
        return self.pages.bits_per_value * 2 * HEADS * HEAD_DIM / 8


def code(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Bytes and (step, offset) of the last dimension, two codes of 4 bits or four of 2 to a byte."""
    wide = x.float()
    low, high = wide.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((wide - low) / step.clamp_min(1e-8)).round_().to(torch.uint8)
    parts = codes.chunk(8 // bits, -1)
    packed = parts[0]
    for i, part in enumerate(parts[1:], 1):
        packed = packed | part << bits * i
    return packed, torch.cat([step, low], -1).half()


def decode(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What `code` made, float32."""
    codes = torch.cat([packed >> bits * i & (1 << bits) - 1 for i in range(8 // bits)], -1)
    return codes * scale[..., :1].float() + scale[..., 1:].float()


def code_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of e4m3 and the scale of the last dimension."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 448
    return (wide / scale.clamp_min(1e-30)).to(torch.float8_e4m3fn).view(torch.uint8), scale
