"""The book-keeping of a cache: what keep, truncate, fork, select and reserve do and refuse."""

from __future__ import annotations

import pytest
import torch

from fastdecode.models import ContiguousKVCache, KVCache, TokenCache


def make(batch: int = 2, capacity: int = 4, max_context: int = 20) -> ContiguousKVCache:
    return ContiguousKVCache(
        num_layers=2, batch=batch, num_kv_heads=3, capacity=capacity, head_dim=5, max_context=max_context
    )


def fill(cache: ContiguousKVCache, n: int, counts=None) -> torch.Tensor:
    """Stage n slots and write distinct numbers into them, as a model would; returns keys [B, n]."""
    cache.stage(n, counts)
    values = torch.randint(1, 10**6, (cache.batch, n)).float()
    for row, length in enumerate(cache.host_lens):
        cache.k[:, row, :, length : length + n] = values[row][None, None, :, None]
        cache.v[:, row, :, length : length + n] = -values[row][None, None, :, None]
    return values


def row(cache: ContiguousKVCache, b: int) -> list[float]:
    """Committed keys of a row, after checking that all layers, heads and values agree."""
    keys = cache.k[:, b, :, : cache.host_lens[b]]
    assert torch.equal(keys, keys[:1, :1, :, :1].expand_as(keys))
    assert torch.equal(cache.v[:, b, :, : cache.host_lens[b]], -keys)
    return keys[0, 0, :, 0].tolist()


def test_is_a_kv_cache():
    assert isinstance(make(), KVCache)
    assert isinstance(TokenCache(1, 1, 1), KVCache)


def test_keep_compacts_and_grows():
    torch.manual_seed(0)
    cache = make()
    first = fill(cache, 3)
    assert cache.lens.tolist() == [0, 0]
    cache.keep(None, torch.tensor([3, 1]))
    second = fill(cache, 6)
    assert cache.capacity >= 9
    cache.keep(torch.tensor([[0, 2, 3, 5], [0, 4, -7, 99]], dtype=torch.int32), torch.tensor([4, 2], dtype=torch.int32))
    assert cache.lens.tolist() == [7, 3]
    assert row(cache, 0) == first[0].tolist() + second[0, [0, 2, 3, 5]].tolist()
    assert row(cache, 1) == first[1, :1].tolist() + second[1, [0, 4]].tolist()
    fill(cache, 2)
    cache.keep(torch.zeros(2, 0, dtype=torch.int64), [0, 0])  # finished rows
    assert cache.lens.tolist() == [7, 3]


@pytest.mark.parametrize(
    "path,counts,message",
    [
        (None, [7, 0], r"num_keep: expected 0\.\.5, got 7"),
        (None, [0, 3], r"num_keep: expected 0\.\.2, got 3"),
        (None, [-1, 0], r"num_keep: expected 0\.\.5, got -1"),
        (None, [1], r"num_keep: expected \[2\], got \[1\]"),
        (None, torch.ones(2), "num_keep: expected an integer dtype, got torch.float32"),
        ([[0, 1]], [1, 1], r"path: expected \[2, K'\] with K' >= 1, got \[1, 2\]"),
        ([[0], [0]], [2, 1], r"path: expected \[2, K'\] with K' >= 2, got \[2, 1\]"),
        ([[0, 0], [0, 1]], [2, 2], r"path: expected increasing slots from 0, got \[0, 0\] in row 0"),
        ([[1, 2], [0, 1]], [2, 2], r"path: expected increasing slots from 0, got \[1, 2\] in row 0"),
        ([[0, 1], [0, 2]], [2, 2], r"path: expected slots 0\.\.1, got 2 in row 1"),
        ([[0.0, 1], [0, 2]], [2, 2], "path: expected an integer dtype, got torch.float32"),
    ],
)
def test_keep_refuses_and_changes_nothing(path, counts, message):
    cache = make()
    fill(cache, 5, [5, 2])
    before = cache.k.clone()
    with pytest.raises(ValueError, match=f"KVCache.keep: {message}"):
        cache.keep(None if path is None else torch.tensor(path), counts)
    assert cache.lens.tolist() == [0, 0] and torch.equal(cache.k, before)
    cache.keep(None, [5, 2])  # the pending rows are still there
    with pytest.raises(ValueError, match=r"num_keep: expected 0\.\.0, got 1"):
        cache.keep(None, [1, 0])


def test_truncate():
    cache = make()
    fill(cache, 5)
    cache.keep(None, [5, 4])
    cache.truncate([2, 4])
    assert cache.lens.tolist() == [2, 4]
    fill(cache, 1)
    cache.truncate(torch.tensor([2, 0]))
    with pytest.raises(ValueError, match=r"num_keep: expected 0\.\.0, got 1"):
        cache.keep(None, [1, 1])  # pending slots went with it
    with pytest.raises(ValueError, match=r"KVCache.truncate: lens: expected 0\.\.2, got 3"):
        cache.truncate([3, 0])
    with pytest.raises(ValueError, match=r"KVCache.truncate: lens: expected 0\.\.2, got -1"):
        cache.truncate([-1, 0])


def test_fork_and_select_carry_pending_slots():
    cache = make(3)
    values = fill(cache, 3)
    forked = cache.fork([2, 0, 2, 1])
    forked.keep(torch.tensor([[0, 2]] * 4), [2, 1, 0, 2])
    assert forked.lens.tolist() == [2, 1, 0, 2] and cache.lens.tolist() == [0, 0, 0]
    assert row(forked, 0) == values[2, [0, 2]].tolist() and row(forked, 3) == values[1, [0, 2]].tolist()
    cache.keep(None, [3, 3, 3])
    assert row(cache, 2) == values[2].tolist()
    cache.select(torch.tensor([2, 1]))
    assert cache.batch == 2 and row(cache, 0) == values[2].tolist() and row(cache, 1) == values[1].tolist()
    cache.select([])
    assert cache.batch == 0 and cache.lens.shape == (0,)
    with pytest.raises(ValueError, match=r"KVCache.select: rows: expected 0\.\.-1, got 0"):
        cache.select([0])
    with pytest.raises(ValueError, match=r"KVCache.fork: rows: expected 0\.\.3, got 4"):
        forked.fork([4])


def test_reserve_grows_by_doubling_and_keeps_everything():
    cache = make(1, capacity=1)
    values, sizes = [], []
    for _ in range(20):
        cache.reserve(1)
        values += fill(cache, 1)[0].tolist()
        cache.reserve(1)  # between forward and keep: pending slots survive
        cache.keep(None, [1])
        sizes.append(cache.capacity)
    assert row(cache, 0) == values and len(set(sizes)) <= 6 and sizes[-1] == 20
    with pytest.raises(ValueError, match=r"KVCache.reserve: n: expected 0\.\.0 \(max_context\), got 1"):
        cache.reserve(1)
    with pytest.raises(ValueError, match=r"KVCache.reserve: n: expected >= 0, got -1"):
        cache.reserve(-1)


def test_pending_slots_survive_growth():
    cache = make(1, capacity=4)
    values = fill(cache, 3)
    cache.reserve(15)
    cache.keep(torch.tensor([[0, 2]]), [2])
    assert row(cache, 0) == values[0, [0, 2]].tolist()


def test_lens_is_a_snapshot():
    cache = make()
    lens = cache.lens
    lens += 5
    assert cache.lens.tolist() == [0, 0] and lens.dtype == torch.int32


def test_bad_sizes():
    with pytest.raises(ValueError, match="new_cache: batch: expected >= 0, got -1"):
        make(-1)
    with pytest.raises(ValueError, match=r"new_cache: capacity: expected 0\.\.20 \(max_context\), got 21"):
        make(capacity=21)
    with pytest.raises(ValueError, match=r"forward: tokens: expected at most 20 after 0 cached ones"):
        make().stage(21)
    make().stage(21, [20, 3])  # only padding is past the end
