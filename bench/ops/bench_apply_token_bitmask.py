"""apply_token_bitmask_ against masked_fill_ with the bits unpacked in torch, and XGrammar's where it is installed.

Three kinds of mask: almost everything allowed (inside a string), almost nothing (a keyword), and half at random.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from bench import harness
from torch import Tensor

from fastdecode import ops


def plain(logits: Tensor, bitmask: Tensor) -> Tensor:
    allowed = (bitmask[..., None] >> torch.arange(32, dtype=torch.int32) & 1).bool().flatten(-2)
    return logits.masked_fill_(~allowed[..., : logits.shape[-1]], -torch.inf)


def mask(kind: str, batch: int, vocab_size: int) -> Tensor:
    share = {"most allowed": 0.999, "few allowed": 0.001, "half allowed": 0.5}[kind]
    allowed = torch.rand(batch, vocab_size // 32, 32) < share
    return (allowed.long() << torch.arange(32)).sum(-1).to(torch.int32)


def cases() -> Iterator[harness.Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("most allowed", "few allowed", "half allowed"):
            for batch in (1, 8):
                vocab_size = 128256
                logits = harness.copies(torch.randn(batch, vocab_size).to(dtype))
                n, bits = len(logits), mask(kind, batch, vocab_size)
                words = bits != -1  # of the others, logits are written
                peers: dict[str, harness.Call] = {
                    "torch unpack+masked_fill_": lambda i, x=logits, n=n, m=bits: plain(x[i % n], m)
                }
                if dtype == torch.float32 and importlib.util.find_spec("xgrammar"):
                    from xgrammar import apply_token_bitmask_inplace

                    peers["xgrammar"] = lambda i, x=logits, n=n, m=bits, f=apply_token_bitmask_inplace: f(x[i % n], m)
                yield harness.Case(
                    f"B={batch} V={vocab_size} {str(dtype)[6:]} {kind}",
                    bits.numel() * 4 + int(words.sum()) * 32 * dtype.itemsize,
                    lambda i, x=logits, n=n, m=bits: ops.apply_token_bitmask_(x[i % n], m),
                    peers,
                )


if __name__ == "__main__":
    harness.main("apply_token_bitmask_", cases)
