"""The paged cache: its pages are counted, its rows are those of a contiguous cache, its codes those of a fresh one."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdecode import ops
from fastdecode.models import ContiguousKVCache, KVCache, KVCacheConfig, PagedKVCache
from fastdecode.models.paged_cache import CACHES, CHUNK

LAYERS, HEADS, DIM, LIMIT = 2, 3, 16, 700
SMALL = {"page_size": 4, "flush_block": 8}
KIVI = {"group": 4, **SMALL}
SCHEMES = ["plain", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "kivi4", "kivi2"]


def config(scheme: str, **options) -> KVCacheConfig:
    return KVCacheConfig(scheme, **{**(KIVI if scheme.startswith("kivi") else SMALL), **options})


def make(scheme: str = "plain", batch: int = 2, capacity: int = 8, dtype=torch.float64, **options) -> PagedKVCache:
    return PagedKVCache(
        num_layers=LAYERS,
        batch=batch,
        num_kv_heads=HEADS,
        capacity=capacity,
        head_dim=DIM,
        max_context=LIMIT,
        config=config(scheme, **options),
        dtype=dtype,
    )


def contiguous(batch: int = 2) -> ContiguousKVCache:
    return ContiguousKVCache(
        num_layers=LAYERS,
        batch=batch,
        num_kv_heads=HEADS,
        capacity=8,
        head_dim=DIM,
        max_context=LIMIT,
        dtype=torch.float64,
    )


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Keys and values of tokens: [2, LAYERS, *shape, HEADS, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, LAYERS, *shape, HEADS, DIM, generator=generator, dtype=torch.float64)


def write(cache: PagedKVCache, kv: torch.Tensor, counts: list[int] | None = None) -> None:
    """What a model does with keys and values of n slots per row, [2, LAYERS, B, n, HEADS, DIM]."""
    n = kv.shape[3]
    cache.stage(n, counts)
    for first in range(0, n, cache.chunk or n or 1):
        last = min(first + (cache.chunk or n), n)
        step = cache.step(first, last)
        for layer, pages in enumerate(step.layers):
            k, v = (part[layer, :, first:last].flatten(0, 1) for part in kv)
            ops.kv_append_(k, v, step.slots, pages)
            if step.flush is not None:
                ops.kv_flush_(pages, step.page_table, *step.flush)


def contents(cache: PagedKVCache, row: int) -> list[torch.Tensor]:
    """Every committed byte of a row, whatever pages it lies in."""
    pages, table, length = cache.pages, list(cache.tables[row]), cache.host_lens[row]
    if not cache.config.has_ring:
        stores = [t for t in (pages.k, pages.v, pages.k_scale, pages.v_scale) if t is not None]
        return [t[table].flatten(0, 1)[:length].clone() for t in stores]
    coded = length // cache.config.flush_block * cache.config.flush_block
    table = table[: coded // pages.page_size]
    ring = torch.arange(coded, length) % pages.k_tail.shape[1]
    stores = [pages.k[table], pages.v[table], pages.k_scale[table], pages.v_scale[table]]
    return [t.clone() for t in (*stores, pages.k_tail[row, ring], pages.v_tail[row, ring])]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def check_pool(*caches: PagedKVCache) -> None:
    """Every page is named as often as it is counted, rows have the pages they need, and no page is lost."""
    pool = caches[0]._pool
    named = [page for cache in caches for table in cache.tables for page in table]
    for page in range(pool.pages.num_pages):
        assert pool.count(page) == named.count(page)
    assert pool.used == len(set(named)) and sorted(pool._free) == sorted(set(range(pool.pages.num_pages)) - set(named))
    for cache in caches:
        size, block = cache.config.page_size, cache.config.flush_block
        for table, length, pending in zip(cache.tables, cache.host_lens, cache._pending):
            if cache.config.has_ring:
                assert length // block * block <= len(table) * size <= (length + pending) // block * block
            else:
                assert len(table) == -(-(length + pending) // size)


def test_is_a_kv_cache():
    assert isinstance(make(), KVCache)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_names():
    for name in CACHES:
        parsed = KVCacheConfig.parse(name)
        assert parsed.name == name and KVCacheConfig.parse(parsed) is parsed
    assert KVCacheConfig.parse("fp8").scheme == "fp8_e4m3" and KVCacheConfig.parse("bfloat16").dtype == torch.bfloat16
    assert KVCacheConfig.parse("plain").is_lossless(torch.float64)
    assert KVCacheConfig.parse("float32").is_lossless(torch.bfloat16)
    assert not KVCacheConfig.parse("bf16").is_lossless(torch.float32)
    assert not KVCacheConfig.parse("int8").is_lossless(torch.bfloat16)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"scheme": "int3"}, "scheme: expected one of plain, .*kivi2, got 'int3'"),
        ({"dtype": torch.int8}, "dtype: expected float64, float32, float16, bfloat16 or None, got torch.int8"),
        ({"scheme": "int8", "dtype": torch.float32}, "dtype: expected None for scheme 'int8'"),
        ({"page_size": 0}, "page_size: expected an int >= 1, got 0"),
        ({"page_size": True}, "page_size: expected an int >= 1, got True"),
        ({"flush_block": 1.5}, "flush_block: expected an int >= 1, got 1.5"),
        ({"group": -1}, "group: expected an int >= 1, got -1"),
        ({"group": 8}, "group: expected None for scheme 'plain', got 8"),
        ({"scheme": "kivi2", "flush_block": 96}, "flush_block: expected a multiple of the page size 64, got 96"),
        (
            {"scheme": "kivi4", "prefix_attention": True},
            "prefix_attention: expected False for scheme 'kivi4', got True",
        ),
        ({"prefill": "fast"}, "prefill: expected 'strict' or 'exact', got 'fast'"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=f"KVCacheConfig: {message}"):
        KVCacheConfig(**options)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"kv_cache: expected one of plain, .*, got 'int3'"):
        KVCacheConfig.parse("int3")
    with pytest.raises(ValueError, match=r"group: expected a divisor of head_dim 16, got 5"):
        make("int8", group=5)
    with pytest.raises(ValueError, match=r"page_size: expected a multiple of the token group 8"):
        make("kivi4", group=8)
    with pytest.raises(ValueError, match=r"new_cache: capacity: expected 0\.\.700 \(max_context\), got 701"):
        make(capacity=701)
    with pytest.raises(ValueError, match=r"forward: tokens: expected at most 700 after 0 cached ones"):
        make().stage(701)


# --- pages ------------------------------------------------------------------------------------------------------------


def test_fork_shares_pages_until_one_writes():
    cache = make(batch=1)
    kv = values(1, 10)
    write(cache, kv)
    cache.keep(None, [10])
    assert len(cache.tables[0]) == 3
    other = cache.fork([0, 0])
    assert other.tables == cache.tables * 2 and cache._pool.used == 3
    check_pool(cache, other)
    before = contents(cache, 0)
    more = values(2, 3, seed=1)
    write(other, more)
    other.keep(None, [3, 1])
    # whole pages stay shared; each row that wrote has a last page of its own, and row 0 one more
    assert [len(set(column)) for column in zip(*(t[:3] for t in (*other.tables, *cache.tables)))] == [1, 1, 3]
    check_pool(cache, other)
    assert same(contents(cache, 0), before)
    k, _ = other.dequantise(torch.float64)
    for row, count in enumerate((3, 1)):
        expected = torch.cat((kv[0, :, 0], more[0, :, row, :count]), 1).transpose(1, 2)
        assert torch.equal(k[:, row, :, : 10 + count], expected)
    del other
    gc.collect()
    check_pool(cache)
    cache.select([])
    assert cache._pool.used == 0


def test_pages_are_given_back():
    cache = make(batch=3)
    write(cache, values(3, 30), [30, 9, 0])
    cache.keep(None, [30, 8, 0])
    assert [len(table) for table in cache.tables] == [8, 2, 0]
    cache.truncate([5, 8, 0])
    assert [len(table) for table in cache.tables] == [2, 2, 0]
    check_pool(cache)
    size = cache._pool.pages.num_pages
    for seed in range(20):  # what a loop does: pages of rejected drafts are used again
        write(cache, values(3, 9, seed=seed))
        cache.keep(None, [0, 0, 0])
    assert cache._pool.pages.num_pages == size
    cache.select([1])
    check_pool(cache)
    assert cache._pool.used == 2 and cache.num_bytes == 2 * 2 * LAYERS * HEADS * 4 * DIM * 8


def test_the_pool_doubles_and_reserve_makes_room():
    cache, sizes = make(batch=1, capacity=0), set()
    kv = values(1, 100)
    for i in range(100):
        write(cache, kv[:, :, :, i : i + 1])
        cache.keep(None, [1])
        sizes.add(cache._pool.pages.num_pages)
    assert sizes == {1, 2, 4, 8, 16, 32}
    assert torch.equal(cache.dequantise(torch.float64)[1], kv[1].transpose(2, 3))
    cache.reserve(500)
    pages = cache._pool.pages
    write(cache, values(1, 500))
    assert cache._pool.pages is pages
    with pytest.raises(ValueError, match=r"KVCache.reserve: n: expected 0\.\.600 \(max_context\), got 601"):
        cache.reserve(601)


STEP = st.one_of(
    st.tuples(st.just("forward"), st.integers(0, 9), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("forward"), st.integers(30, 150), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("truncate"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("fork"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("select"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("reserve"), st.integers(0, 20)),
)


def both(call: Callable, paged: PagedKVCache, plain: ContiguousKVCache) -> bool:
    """The same call on both; what a ring has lost is refused, and changes nothing: False."""
    before = [contents(paged, row) for row in range(paged.batch)]
    try:
        call(paged)
    except ValueError as error:
        assert paged.config.has_ring and "still waits in the ring" in str(error)
        assert all(same(contents(paged, row), old) for row, old in enumerate(before))
        return False
    call(plain)
    return True


@pytest.mark.parametrize("scheme", ["plain", "int4", "kivi2"])
@example([("forward", 137, 1723)])  # a path that reaches further than the ring, and starts to move inside it
@given(st.lists(STEP, min_size=1, max_size=15))
@settings(max_examples=40, deadline=None)
def test_random_walks_are_those_of_a_contiguous_cache(scheme, walk):
    """Forwards with chains and paths, roll-backs, forks (with pending slots too) and selections, in any order."""
    pairs = [(make(scheme), contiguous())]
    for name, *numbers in walk:
        chosen = numbers[-1]
        paged, plain = pairs[chosen % len(pairs)]
        generator = torch.Generator().manual_seed(chosen)
        draw = lambda high, generator=generator: int(torch.randint(high + 1, (), generator=generator))  # noqa: E731
        if name == "forward" and max(paged.host_lens, default=0) + numbers[0] < LIMIT:
            n = numbers[0] + 1
            counts = [n - draw(min(n, 9)) for _ in range(paged.batch)]
            kv = values(paged.batch, n, seed=chosen)
            write(paged, kv, counts)
            plain.stage(n, counts)
            for row, (length, count) in enumerate(zip(plain.host_lens, counts)):
                for store, part in ((plain.k, kv[0]), (plain.v, kv[1])):
                    store[:, row, :, length : length + count] = part[:, row, :count].transpose(1, 2)
            if chosen % 3 == 0 and n < 100:  # more would leave a ring without what the fork has committed
                pairs = [(paged.fork(range(paged.batch)), plain.fork(range(plain.batch))), *pairs][:3]
            keep = [count - draw(min(count, 9)) for count in counts]
            path = None
            if chosen % 2:
                chains = [[0, *(i for i in range(1, c) if draw(7))] if c else [] for c in counts]
                keep = [min(len(chain), count) for chain, count in zip(chains, keep)]
                width = max(map(len, [*chains, [0]]))
                padded = [[*chain, *[-7] * (width - len(chain))] for chain in chains]
                path = torch.tensor(padded, dtype=torch.int64).view(-1, width)
            if not both(lambda cache, path=path, keep=keep: cache.keep(path, keep), paged, plain):
                paged.keep(None, counts)
                plain.keep(None, counts)
        elif name == "truncate":
            lens = [length - draw(min(length, 20)) for length in paged.host_lens]
            both(lambda cache, lens=lens: cache.truncate(lens), paged, plain)
        elif name in ("fork", "select") and paged.batch:
            rows = [draw(paged.batch - 1) for _ in range(draw(3))]
            if name == "fork":
                pairs = [(paged.fork(rows), plain.fork(rows)), *pairs][:3]
            else:
                paged.select(rows)
                plain.select(rows)
        elif name == "reserve" and max(paged.host_lens, default=0) + chosen < LIMIT:
            paged.reserve(chosen)
            plain.reserve(chosen)
        paged = plain = p = c = None  # or a cache that was dropped would live on
        for pool in {id(p._pool): p._pool for p, _ in pairs}.values():
            check_pool(*(p for p, _ in pairs if p._pool is pool))
        for p, c in pairs:
            assert p.host_lens == c.host_lens and torch.equal(p.lens, c.lens)
    for p, c in pairs:
        for row, length in enumerate(p.host_lens):
            fresh = make(scheme, batch=1)
            write(fresh, torch.stack((c.k, c.v))[:, :, row, :, :length].transpose(2, 3).unsqueeze(2))
            fresh.keep(None, [length])
            assert same(contents(p, row), contents(fresh, 0))


# --- codes ------------------------------------------------------------------------------------------------------------

CUTS = [[1] * 40, [40], [7, 1, 12, 3, 17], [8, 8, 24], [9, 31], [31, 9]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_do_not_depend_on_how_tokens_came(scheme):
    """One at a time, in chunks, all at once, or as drafts of which some were rejected."""
    kv = values(2, 40)
    expected = make(scheme)
    write(expected, kv)
    expected.keep(None, [40, 40])
    for cuts in CUTS:
        for wrong in (0, 5):
            cache, start = make(scheme, capacity=0), 0
            for size in cuts:
                tokens = torch.cat((kv[:, :, :, start : start + size], values(2, wrong, seed=start)), 3)
                write(cache, tokens)
                cache.keep(None, [size, size])
                start += size
            for row in range(2):
                assert same(contents(cache, row), contents(expected, row)), (cuts, wrong)
            check_pool(cache)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_kept_path_is_a_fresh_append(scheme):
    base, draft = values(2, 10), values(2, 6, seed=1)
    cache = make(scheme)
    write(cache, base, [10, 9])
    cache.keep(None, [10, 9])
    write(cache, draft)
    cache.keep(torch.tensor([[0, 2, 3, 5], [0, 1, 4, 99]]), [4, 3])
    for row, (length, path) in enumerate(((10, [0, 2, 3, 5]), (9, [0, 1, 4]))):
        fresh = make(scheme, batch=1)
        write(fresh, torch.cat((base[:, :, row, :length], draft[:, :, row, path]), 2).unsqueeze(2))
        fresh.keep(None, [length + len(path)])
        assert same(contents(cache, row), contents(fresh, 0))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("length", [0, 7, 8, 13])
def test_rejected_drafts_leave_every_committed_byte(scheme, length):
    cache = make(scheme)
    write(cache, values(2, length + 1))
    cache.keep(None, [length, length])
    before = [contents(cache, row) for row in range(2)]
    for n in (1, 3, 9, 20):
        write(cache, 100 * values(2, n, seed=n))
        assert all(same(contents(cache, row), before[row]) for row in range(2))
        cache.keep(None, [0, 0])
        assert all(same(contents(cache, row), before[row]) for row in range(2))
        check_pool(cache)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_truncate_then_write_again(scheme):
    kv, other = values(1, 60), values(1, 60, seed=1)
    for length, cut in itertools.product((5, 8, 31, 60), (0, 3, 8, 16, 29)):
        if cut <= length:
            cache = make(scheme, batch=1)
            write(cache, kv[:, :, :, :length])
            cache.keep(None, [length])
            cache.truncate([cut])
            write(cache, other[:, :, :, cut:])
            cache.keep(None, [60 - cut])
            fresh = make(scheme, batch=1)
            write(fresh, torch.cat((kv[:, :, :, :cut], other[:, :, :, cut:]), 3))
            fresh.keep(None, [60])
            assert same(contents(cache, 0), contents(fresh, 0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forks_and_selections_have_the_same_bytes(scheme):
    cache = make(scheme, batch=3)
    write(cache, values(3, 21), [21, 8, 3])
    cache.keep(None, [20, 8, 2])
    before = [contents(cache, row) for row in range(3)]
    forked = cache.fork([2, 0, 0, 1])
    write(forked, values(4, 9, seed=3))
    forked.keep(None, [9, 4, 5, 0])
    assert all(same(contents(cache, row), before[row]) for row in range(3))
    cache.select([1, 0])
    assert same(contents(cache, 0), before[1]) and same(contents(cache, 1), before[0])
    assert same(contents(forked, 3), before[1])
    check_pool(cache, forked)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_near_what_was_written(scheme, dtype):
    """The bound of every code: half a step of its group, or the relative step of its format."""
    cache = make(scheme, batch=1, dtype=dtype)
    kv = values(1, 33).to(dtype)
    write(cache, kv)
    cache.keep(None, [33])
    reach = float(kv.double().abs().max())
    relative = {"fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3, "plain": 0.0}
    affine = {"int8": 2 * reach / 255, "int4": 2 * reach / 15, "kivi4": 2 * reach / 15, "kivi2": 2 * reach / 3}
    for got, part in zip(cache.dequantise(torch.float64), kv.double().transpose(3, 4)):
        error = (got - part).abs()
        if scheme in relative:
            assert bool((error <= relative[scheme] * part.abs() + 2.0**-9 * reach / 448 * (scheme != "plain")).all())
        else:
            assert float(error.max()) <= 0.5 * affine[scheme] * (1 + 2.0**-9)
            coded = error[..., :32, :] if scheme.startswith("kivi") else error
            assert float(coded.max()) > 0
    if scheme.startswith("kivi"):
        assert torch.equal(cache.dequantise(torch.float64)[0][..., 32:, :], kv[0].double().transpose(2, 3)[..., 32:, :])


# --- rings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["kivi4", "kivi2"])
def test_what_a_ring_has_lost(scheme):
    ring = 8 + CHUNK
    cache = make(scheme, batch=1)
    write(cache, values(1, 300))
    # the ring holds tokens 164..299: tokens from 160 on would be needed plain
    with pytest.raises(
        ValueError, match=rf"KVCache.keep: num_keep: .* ring of {ring} tokens \(from 164 on\), got 161 in"
    ):
        cache.keep(None, [161])
    cache.keep(None, [290])  # the pending ones are still there
    fresh = make(scheme, batch=1)
    write(fresh, values(1, 300)[:, :, :, :290])
    fresh.keep(None, [290])
    assert same(contents(cache, 0), contents(fresh, 0))
    with pytest.raises(ValueError, match=r"KVCache.truncate: lens: .* \(from 164 on\), got 163 in row 0"):
        cache.truncate([163])
    write(cache, values(1, 140))
    cache.keep(None, [140])
    cache.truncate([424])
    with pytest.raises(ValueError, match=r"KVCache.truncate: lens: .* \(from 294 on\), got 293 in row 0"):
        cache.truncate([293])
    cache.truncate([160])  # a whole number of blocks: nothing of it is plain
    assert [len(table) for table in cache.tables] == [40]
    assert same([contents(fresh, 0)[i][:40] for i in range(4)], contents(cache, 0)[:4])


@pytest.mark.parametrize("end", ["keep", "truncate", "stage", "fork", "select"])
@pytest.mark.parametrize("scheme", ["kivi4", "kivi2"])
def test_a_long_forward_of_which_nothing_is_kept(scheme, end):
    """Its tokens drive committed ones out of the ring; they come back, and other rows are not held up."""
    kv, more = values(2, 20), values(2, 200, seed=1)
    for length in (5, 8, 13):
        cache = make(scheme)
        write(cache, kv[:, :, :, :length])
        cache.keep(None, [length, length])
        before = [contents(cache, row) for row in range(2)]
        write(cache, more, [200, 3])
        if length % 8:
            with pytest.raises(ValueError, match=r"dequantise: expected keep or truncate before .* got row 0"):
                cache.dequantise()
            with pytest.raises(ValueError, match=r"KVCache.keep: num_keep: .* still waits in the ring"):
                cache.keep(None, [2, 3])  # of the long row all that fills the ring, or nothing
        old = cache
        if end == "truncate":
            cache.truncate([length, length])
        elif end == "stage":
            cache.stage(1)
        elif end == "fork":
            cache = cache.fork([1, 0, 0])
        elif end == "select":
            cache.select([1, 0, 0])
        if end in ("fork", "select"):
            cache.keep(None, [3, 0, 200])
            expected = [(1, 3), (0, 0), (0, 200)]
        else:
            kept = [0, 3] if end == "keep" else [0, 0]
            cache.keep(None, kept)
            expected = list(enumerate(kept))
        for row, (source, count) in enumerate(expected):
            fresh = make(scheme, batch=1)
            text = torch.cat((kv[:, :, source, :length], more[:, :, source, :count]), 2)
            write(fresh, text.unsqueeze(2))
            fresh.keep(None, [length + count])
            assert same(contents(cache, row), contents(fresh, 0))
            assert all(
                torch.equal(a[:, row, :, : length + count], b[:, 0])
                for a, b in zip(cache.dequantise(), fresh.dequantise())
            )
        if end == "fork":
            old.keep(None, [0, 0])
            assert all(same(contents(old, row), before[row]) for row in range(2))
        check_pool(*{id(c): c for c in (old, cache)}.values())


def test_how_many_slots_a_pass_may_have():
    assert make("plain").chunk is None and make("kivi2").chunk == CHUNK
    elsewhere = PagedKVCache(
        num_layers=1,
        batch=1,
        num_kv_heads=1,
        capacity=0,
        head_dim=16,
        max_context=8,
        config=config("plain"),
        device="meta",
    )
    assert elsewhere.chunk == 512


def test_how_deep_a_tree_may_be():
    cache = make("kivi2", batch=3)
    write(cache, values(3, 20), [20, 15, 8])
    cache.keep(None, [20, 15, 8])
    assert cache.depth_room() == [3, 0, 7]
    cache.stage_tree(30, None, [3, 0, 7])
    with pytest.raises(ValueError, match=r"forward: tree: expected depths 0\.\.3 in row 0 \(flush_block\), got 4"):
        cache.stage_tree(30, None, [4, 0, 0])
    with pytest.raises(ValueError, match=r"forward: tree: expected at most 128 nodes, got 129"):
        cache.stage_tree(129, None, [0, 0, 0])
    assert make("int8").depth_room() == [LIMIT - 1, LIMIT - 1]


def test_bits_per_value():
    assert make("plain").bits_per_value == 64 and make("plain", dtype=torch.bfloat16).bits_per_value == 16
    for scheme, bits in (("int8", 8), ("int4", 4), ("kivi4", 4), ("kivi2", 2)):
        group = KIVI["group"] if scheme.startswith("kivi") else DIM
        assert make(scheme).bits_per_value == bits + 32 / group
    assert make("fp8_e4m3").bits_per_value == 8 + 32 / DIM
