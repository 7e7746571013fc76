"""apply_token_bitmask_ beside unpacking the bits in torch, and beside XGrammar where it is installed.

Kinds of mask: almost everything allowed (inside a string), almost nothing (a keyword), and half at random.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastdecode import ops

from .. import report
from ..harness import Call, Case
from ..inputs import copies, logits_shapes

KINDS = {"most": 0.999, "few": 0.001, "half": 0.5}


def unpack_masked_fill(logits: Tensor, bitmask: Tensor, bits: Tensor) -> Tensor:
    forbidden = (bitmask[..., None] >> bits & 1).flatten(-2)[..., : logits.shape[-1]] == 0
    return logits.masked_fill_(forbidden, -torch.inf)


def xgrammar(logits: Tensor, bitmask: Tensor) -> None:
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, bitmask)


def packed(allowed: Tensor) -> Tensor:
    """int32 words of 32 ids, the first in the lowest bit; the vocabularies here are multiples of 32."""
    return (allowed.unflatten(-1, (-1, 32)).long() << torch.arange(32)).sum(-1).to(torch.int32)


def cases(quick: bool) -> Iterator[Case]:
    for shape in logits_shapes(quick):
        logits = shape.logits()
        for kind, share in KINDS.items():
            bitmask = packed(torch.rand(logits.shape) < share)
            # logits are touched where a word forbids anything
            moved = bitmask.nbytes + 32 * shape.dtype.itemsize * int((bitmask != -1).sum())
            peers: dict[str, Call] = {
                "torch unpack+masked_fill_": partial(unpack_masked_fill, bits=torch.arange(32, dtype=torch.int32))
            }
            if shape.dtype == torch.float32 and importlib.util.find_spec("xgrammar"):
                peers["xgrammar"] = xgrammar
            yield Case(
                shape=f"{shape} {kind} allowed",
                dtype=shape.dtype,
                elements=logits.numel(),
                bytes_moved=moved,
                inputs=copies(logits, bitmask, used_bytes=moved),
                ours=ops.apply_token_bitmask_,
                peers=peers,
            )


if __name__ == "__main__":
    report.main(__file__)
