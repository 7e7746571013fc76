"""Random inputs of verify_chain, and the comparison of what comes out with the reference."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastdecode.testing.reference import verify as reference
from support import compute_dtype, generator

# Decisions closer than this may turn with the rounding of the compute dtype (softmax, p - q, log).
MARGIN = {torch.float64: 1e-5, torch.float32: 1e-4}
FILTERS = ("temperature", "top_k", "top_p", "min_p")
NEW_FILTERS = (*FILTERS, "bitmask", "typical_p")


def compare(got, want: reference.Verified, tolerance: float, what: str = "") -> int:
    """Exact, but for requests with a decision within `tolerance` of a tie; returns how many those were."""
    assert [o.dtype for o in got] == [torch.int64, torch.int32, torch.int32, torch.int32]
    clear = want.margin > tolerance
    for name in ("tokens", "num_accepted", "num_emitted", "status"):
        np.testing.assert_array_equal(getattr(got, name).numpy()[clear], getattr(want, name)[clear], f"{what} {name}")
    return int((~clear).sum())


def random_inputs(
    batch: int, longest: int, vocab_size: int, dtype: torch.dtype, seed: int, *, noise: float = 0.7
) -> dict[str, Tensor]:
    """Drafts from a drafter that is a noisy copy of the target, so that acceptance is neither rare nor certain."""
    g = generator(seed, batch, longest, vocab_size)
    logits = (2 * torch.randn(batch, longest + 1, vocab_size, generator=g, dtype=torch.float64)).to(dtype)
    bumps = torch.randn(batch, longest, vocab_size, generator=g, dtype=torch.float64)
    draft_probs = torch.softmax(logits[:, :longest].double() + noise * bumps, -1)
    flat = draft_probs.reshape(-1, vocab_size)
    tokens = (torch.multinomial(flat, 1, generator=g) if flat.numel() else torch.zeros(0, 1)).reshape(batch, longest)
    work = compute_dtype(dtype)
    full = torch.iinfo(torch.int64)
    made = {
        "draft_tokens": tokens.to(torch.int64),
        "draft_probs": draft_probs.to(dtype),
        "target_logits": logits,
        "target_probs": torch.softmax(logits.to(work), -1).to(dtype),
        "draft_lens": torch.randint(longest + 1, (batch,), generator=g, dtype=torch.int32).clamp(min=longest // 2),
        "uniforms": torch.rand(batch, longest + 1, generator=g, dtype=torch.float64),
        "seed": torch.randint(full.min, full.max, (batch,), generator=g),
        "offset": torch.randint(2**40, (batch,), generator=g),
        "temperature": torch.rand(batch, generator=g) + 0.4,
        "top_k": torch.randint(vocab_size + 2, (batch,), generator=g, dtype=torch.int32),
        "top_p": 0.5 + torch.rand(batch, generator=g),
        "min_p": 0.1 * torch.rand(batch, generator=g) - 0.03,
    }
    allowed = torch.rand(batch, longest + 1, vocab_size, generator=g) < 0.8
    allowed.scatter_(2, logits.argmax(2, keepdim=True), True)
    return made | {
        "bitmask": pack(allowed),
        "typical_p": 0.3 + torch.rand(batch, generator=g),
        "eps": 0.02 + 0.3 * torch.rand(batch, generator=g),
        "delta": 0.1 + torch.rand(batch, generator=g),
        "beta": torch.randint(1, vocab_size + 2, (batch,), generator=g, dtype=torch.int32),
        "tau": 3 * torch.rand(batch, generator=g),
    }


def pack(bits: Tensor) -> Tensor:
    """bool [..., V] -> int32 [..., ceil(V / 32)]; bit 31 is the sign, bits past V are 0."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32))
    total = (padded.unflatten(-1, (-1, 32)).long() << torch.arange(32)).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def uniforms(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
