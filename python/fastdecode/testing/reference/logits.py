"""Grammar masks and penalties on rows of logits, one id at a time (Keskar et al. 2019; the OpenAI API reference)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .sample import compute_dtype, rows_of

__all__ = ["BAD_LENGTH", "apply_token_bitmask", "penalize", "penalize_row"]

BAD_LENGTH = 32


def apply_token_bitmask(
    logits: Tensor, bitmask: Tensor, *, indices: Tensor | None = None, active: Tensor | None = None
) -> Tensor:
    """A copy of logits with -inf where the id's bit is 0, or where there is no bit for it."""
    out = logits.clone()
    pairs: list[tuple[tuple, tuple]]  # (row, its mask)
    if indices is None:
        pairs = [(at, at) for _, _, at in rows_of(logits)]
    else:
        pairs = [((int(row),), (j,)) for j, row in enumerate(indices) if 0 <= row < logits.shape[0]]
    for row, mask in pairs:
        if active is not None and not active[row[0]]:
            continue
        for v in range(logits.shape[-1]):
            word = int(bitmask[mask][v // 32]) if v // 32 < bitmask.shape[-1] else 0
            if not word >> v % 32 & 1:
                out[row][v] = -torch.inf
    return out


def penalize_row(
    row: np.ndarray,
    prompt: list[int],
    output: list[int],
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> np.ndarray:
    """One row, in its own dtype: one rounding per operation, in the order of the definition."""
    out, number = row.copy(), row.dtype.type
    if repetition <= 0:
        repetition = 1.0
    for v in {v for v in (*prompt, *output) if 0 <= v < row.size}:
        if np.isneginf(row[v]):
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # infinite and huge penalties are taken as given
            x = row[v] / number(repetition) if row[v] > 0 else row[v] * number(repetition)
            if v in output:
                x = x - number(frequency) * number(output.count(v)) - number(presence)
        out[v] = x
    return out


def penalize(
    logits: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    *,
    prompt_lengths: Tensor | None = None,
    draft_tokens: Tensor | None = None,
    active: Tensor | None = None,
    **penalties: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Penalised rows and status [B]; rows in error are NaN, inactive ones 0."""
    out: np.ndarray = np.zeros(tuple(logits.shape), compute_dtype(logits))
    status = torch.zeros(logits.shape[0], dtype=torch.int32)
    for b, i, at in rows_of(logits):
        if active is not None and not active[b]:
            continue
        length, prompt = int(lengths[b]), 0 if prompt_lengths is None else int(prompt_lengths[b])
        if not 0 <= prompt <= length <= tokens.shape[1]:
            status[b], out[at] = BAD_LENGTH, np.nan
            continue
        text = tokens[b, :length].tolist()
        drafts = [] if draft_tokens is None else draft_tokens[b, :i].tolist()
        given = {name: value[b].item() for name, value in penalties.items() if value is not None}
        row = logits[at].to(torch.from_numpy(out).dtype).numpy()
        out[at] = penalize_row(row, text[:prompt], text[prompt:] + drafts, **given)
    return torch.from_numpy(out), status
