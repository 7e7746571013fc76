"""Reading the prompts of a batch: what several of them begin with is read once, and its pages are shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import KVCache, Model, Want
from .paged_cache import PagedKVCache

__all__ = ["prefill"]


def prefill(model: Model, tokens: Tensor, counts: Sequence[int], capacity: int) -> KVCache:
    """A new cache with `counts[b]` tokens of row b of int64 [B, n] committed; capacity: tokens per row with room."""
    cache = model.new_cache(len(counts), capacity)
    longest = max(counts, default=0)
    if longest == 0:
        return cache
    if isinstance(cache, PagedKVCache) and len(counts) > 1 and cache.config.prefill == "strict":
        return _shared(model, cache, [row[:count].tolist() for row, count in zip(tokens, counts)])
    num_tokens = None if min(counts) == longest else counts
    model.forward(tokens[:, :longest], cache=cache, num_tokens=num_tokens, want=Want(0))
    cache.keep(None, counts)
    return cache


def _shared(model: Model, cache: PagedKVCache, texts: Sequence[Sequence[int]]) -> PagedKVCache:
    """The cache, or a fork of it, with texts[b] committed in row b.

    A tree over blocks of page_size tokens, level by level: rows that agree on their next blocks are one row of the
    cache until they part, so a block is computed once however many texts begin with it. Equal texts are one row to
    their end. With nothing in common this is one forward.
    """
    block = cache.config.page_size
    cache.select([0])  # the room for all rows stays in the pool
    groups, done = [list(range(len(texts)))], [0]
    while True:
        parts: list[list[int]] = []  # groups after the split, each with the cache's row that it comes from
        parents: list[int] = []
        for parent, (group, length) in enumerate(zip(groups, done)):
            branches: dict[tuple[int, ...], list[int]] = {}
            for row in group:
                branches.setdefault(tuple(texts[row][length : length + block]), []).append(row)
            parts += branches.values()
            parents += [parent] * len(branches)
        if parents != list(range(len(groups))):
            cache = cache.fork(parents)
        groups, done = parts, [done[parent] for parent in parents]
        counts = [_common([texts[row] for row in group], length, block) for group, length in zip(groups, done)]
        if max(counts) == 0:
            break
        tokens = torch.zeros(len(groups), max(counts), dtype=torch.int64)
        for slots, group, length, count in zip(tokens, groups, done, counts):
            slots[:count] = torch.tensor(texts[group[0]][length : length + count])
        model.forward(tokens, cache=cache, num_tokens=counts, want=Want(0))
        cache.keep(None, counts)
        done = [length + count for length, count in zip(done, counts)]
    order = [index for index, group in enumerate(groups) for _ in group]
    rows = [row for group in groups for row in group]
    place = dict(zip(rows, order))
    wanted = [place[row] for row in range(len(texts))]
    return cache if wanted == list(range(len(groups))) else cache.fork(wanted)


def _common(texts: Sequence[Sequence[int]], begin: int, block: int) -> int:
    """Tokens from `begin` on that all texts have: all of them if the texts are equal, else whole blocks."""
    first = texts[0]
    if all(text == first for text in texts[1:]):
        return len(first) - begin
    end = begin
    while all(text[end : end + block] == first[end : end + block] for text in texts) and end + block <= len(first):
        end += block
    return end - begin
