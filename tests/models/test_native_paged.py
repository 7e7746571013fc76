"""The native runner over paged caches: uncoded pages change nothing, codes depend on the text alone."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdecode import Status
from fastdecode.models import KVCacheConfig, NativeConfig, NativeModel, PagedKVCache, Want, load_model
from fastdecode.models.paged_cache import PagedStep

V, D = 97, 32
SMALL = {"page_size": 8, "flush_block": 16}
CONFIGS = {
    "plain": KVCacheConfig(page_size=8),
    "fp8": KVCacheConfig("fp8_e5m2", page_size=8),
    "int8": KVCacheConfig("int8", group=8, page_size=8),
    "int4": KVCacheConfig("int4", page_size=8),
    "kivi4": KVCacheConfig("kivi4", group=8, **SMALL),
    "kivi2": KVCacheConfig("kivi2", group=8, **SMALL),
}


def tokens(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, (batch, n), generator=torch.Generator().manual_seed(seed))


@functools.cache
def model(dtype: torch.dtype = torch.float64, window: int | None = None, kv_heads: int = 2) -> NativeModel:
    """Two blocks, four heads of 16; weights large enough that attention matters."""
    config = NativeConfig.from_hf(
        {
            "architectures": ["MistralForCausalLM"],
            "vocab_size": V,
            "hidden_size": D,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 16,
            "max_position_embeddings": 640,
            "sliding_window": window,
        }
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 1.5 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5 if len(shape) == 2 else torch.ones(shape)
        for name, shape in config.tensor_shapes().items()
    }
    return NativeModel(config, weights, dtype=dtype, kv_cache="contiguous")


def read(ours: NativeModel, ids: torch.Tensor, cuts: list[int] | None = None) -> tuple[PagedKVCache, torch.Tensor]:
    """A cache with all of ids committed, and the logits of every slot."""
    cache, start, parts = ours.new_cache(ids.shape[0], 4), 0, []
    for size in cuts or [ids.shape[1]]:
        parts.append(ours.forward(ids[:, start : start + size], cache=cache).logits)
        cache.keep(None, [size] * ids.shape[0])
        start += size
    assert isinstance(cache, PagedKVCache)
    return cache, torch.cat(parts, 1)


def committed(cache: PagedKVCache, row: int) -> list[torch.Tensor]:
    """Pages of a row's coded tokens, as bytes, and the plain tokens of a ring."""
    pages, length, block = cache.pages, cache.host_lens[row], cache.config.flush_block
    stores = [t for t in (pages.k, pages.v, pages.k_scale, pages.v_scale) if t is not None]
    if not cache.config.has_ring:
        return [t[list(cache.tables[row])].flatten(0, 1)[:length].clone() for t in stores]
    coded = length // block * block
    ring = torch.arange(coded, length) % pages.k_tail.shape[1]
    table = list(cache.tables[row])[: coded // pages.page_size]
    return [t.clone() for t in (*(t[table] for t in stores), pages.k_tail[row, ring], pages.v_tail[row, ring])]


def equal_codes(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Byte for byte, but for plain float64 values: passes of different lengths round those differently."""
    for x, y in zip(a, b, strict=True):
        if x.dtype == torch.float64:
            assert torch.allclose(x, y, rtol=0, atol=1e-11)
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["llama-mqa-wide-heads", "mistral-window", "qwen3-biases"])
def test_plain_pages_are_a_contiguous_cache(checkpoint, name):
    contiguous = load_model(checkpoint(name)[0], dtype=torch.float64, kv_cache="contiguous")
    paged = load_model(checkpoint(name)[0], dtype=torch.float64, kv_cache="plain")
    ids, prompt = tokens(4, 60), torch.tensor([9, 1, 40, 6])
    caches = [each.new_cache(4, 8) for each in (contiguous, paged)]
    padded = ids[:, :40].masked_fill(torch.arange(40) >= prompt[:, None], -1)
    steps = [(padded, prompt), (tokens(4, 5, 2), None), (tokens(4, 3, 3), torch.tensor([0, 3, 1, 2]))]
    for slots, counts in steps:
        ours, theirs = (
            each.forward(slots, cache=cache, num_tokens=counts, want=Want.LOGITS | Want.HIDDEN)
            for each, cache in zip((paged, contiguous), caches[::-1])
        )
        valid = torch.arange(slots.shape[1]) < (torch.full((4,), slots.shape[1]) if counts is None else counts)[:, None]
        assert ours.logits.isfinite().all()
        assert torch.allclose(ours.logits[valid], theirs.logits[valid], rtol=0, atol=1e-11)
        for a, b in zip((*ours.hidden, ours.hidden.final), (*theirs.hidden, theirs.hidden.final), strict=True):
            assert torch.allclose(a[valid], b[valid], rtol=0, atol=1e-11)
        for cache in caches:
            cache.keep(None, [slots.shape[1]] * 4 if counts is None else counts)
    places = torch.tensor([3, 50, 50, 7])
    ours, theirs = (
        each.forward(ids[:, :4], cache=cache, positions=places, want=Want.LAST_LOGITS).logits
        for each, cache in zip((paged, contiguous), caches[::-1])
    )
    assert ours.shape == (4, 1, V) and torch.allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [None, 7, 300])
def test_long_prompts(window):
    """Prompts far longer than one pass or one ring."""
    base, ids = model(window=window), tokens(2, 500)
    cache = base.new_cache(2, 500)
    whole = base.forward(ids, cache=cache).logits
    _, paged = read(base.with_kv_cache("plain"), ids)
    assert torch.allclose(paged, whole, rtol=0, atol=1e-11)
    for name in ("int4", "kivi2"):
        ours = base.with_kv_cache(CONFIGS[name])
        cache, logits = read(ours, ids)
        for cuts in ([130, 370], [499, 1], [1, 499]):
            other, parts = read(ours, ids, cuts)
            assert torch.allclose(parts, logits, rtol=0, atol=1e-10)
            for row in range(2):
                equal_codes(committed(other, row), committed(cache, row))
        if window is None:
            assert not torch.allclose(logits[:, 100:], whole[:, 100:], atol=1e-3)  # codes were read


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_equal_one_shot(name):
    ours, ids = model().with_kv_cache(CONFIGS[name]), tokens(2, 50)
    cache, whole = read(ours, ids)
    for cuts in ([1] * 50, [7, 1, 13, 2, 17, 10], [16, 16, 18], [17, 15, 18]):
        other, parts = read(ours, ids, cuts)
        assert torch.allclose(parts, whole, rtol=0, atol=1e-11)
        for row in range(2):
            equal_codes(committed(other, row), committed(cache, row))


@pytest.mark.parametrize("name", CONFIGS)
def test_after_every_commit_the_cache_is_that_of_a_fresh_prefill(name):
    """Rounds of drafts of which some are kept, ragged, over block boundaries."""
    ours = model().with_kv_cache(CONFIGS[name])
    generator = torch.Generator().manual_seed(3)
    texts = [tokens(1, 80, seed=row)[0] for row in range(3)]
    cache = ours.new_cache(3, 8)
    prompt = [13, 1, 30]
    padded = torch.stack([text[:30] for text in texts])
    ours.forward(padded, cache=cache, num_tokens=prompt)
    cache.keep(None, prompt)
    for _ in range(8):
        lens = cache.host_lens
        right = torch.randint(0, 6, (3,), generator=generator).tolist()
        slots = torch.stack(
            [torch.cat((text[n : n + k], tokens(1, 6, seed=n)[0]))[:6] for text, n, k in zip(texts, lens, right)]
        )
        counts = [max(k, c) for k, c in zip(right, torch.randint(0, 7, (3,), generator=generator).tolist())]
        ours.forward(slots, cache=cache, num_tokens=counts)
        cache.keep(None, right)
        for row, (text, length) in enumerate(zip(texts, cache.host_lens)):
            fresh, _ = read(ours, text[None, :length])
            equal_codes(committed(cache, row), committed(fresh, 0))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_near_a_fresh_prefill(name):
    """A pass of another length rounds hidden states differently; the cache then differs by as much, and one code."""
    ours, ids = model(torch.bfloat16).with_kv_cache(CONFIGS[name]), tokens(2, 50)
    steps = {"int8": 255, "int4": 15, "kivi4": 15, "kivi2": 3}
    whole = read(ours, ids)[0].dequantise()
    scale = max(float(part.abs().max()) for part in whole)
    code = {"fp8": 2.0**-2}.get(name, 2 / steps[name] if name in steps else 0.0)
    for cuts in ([1] * 50, [7, 43]):
        for a, b in zip(read(ours, ids, cuts)[0].dequantise(), whole):
            assert float((a - b).abs().max()) <= scale * (code + 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_heads_are_repeated_heads(name):
    """A model with one kv head equals one whose kv heads are copies of it."""
    few, many = model(kv_heads=1), model(kv_heads=4)
    shapes = few.native_config.tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: 1.5 * torch.randn(shape, generator=generator) / shape[-1] ** 0.5 if len(shape) == 2 else torch.ones(shape)
        for n, shape in shapes.items()
    }
    repeated = {n: w.repeat(4, 1) if "k_proj" in n or "v_proj" in n else w for n, w in weights.items()}
    ids = tokens(2, 40)
    logits = [
        read(NativeModel(m.native_config, w, dtype=torch.float64, kv_cache=CONFIGS[name]), ids)[1]
        for m, w in ((few, weights), (many, repeated))
    ]
    assert torch.allclose(*logits, rtol=0, atol=1e-11)


def test_a_shared_page_that_a_row_no_longer_fills():
    """Prefix attention has no mask: a row cut back into a shared page must not read the rest of it."""
    ids, more = tokens(1, 24), tokens(3, 3, seed=2)
    logits = []
    for shared in (True, False):
        ours = model().with_kv_cache(KVCacheConfig(page_size=8, prefix_attention=shared))
        first, _ = read(ours, ids)
        cache = first.fork([0, 0, 0])
        ours.forward(more, cache=cache)
        cache.keep(None, [0, 0, 0])
        cache.truncate([24, 24, 20])
        assert cache.tables[2] == cache.tables[0]
        logits.append(ours.forward(more[:, :1], cache=cache).logits)
    assert torch.allclose(*logits, rtol=0, atol=1e-11)


# --- trees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", CONFIGS)
@given(st.data())
@settings(max_examples=8, deadline=None)
def test_a_node_sees_its_own_path(name, window, data):
    """Every node's logits are those of its path alone, and a kept path leaves the cache of its text."""
    ours = model(window=window).with_kv_cache(CONFIGS[name])
    lens = data.draw(st.lists(st.integers(0, 40), min_size=2, max_size=2))
    n = data.draw(st.integers(1, 40))
    ids, nodes = tokens(2, 40), tokens(2, n, seed=5)
    cache = ours.new_cache(2, 40)
    ours.forward(ids, cache=cache, num_tokens=lens)
    cache.keep(None, lens)
    room = cache.depth_room()
    counts = data.draw(st.lists(st.integers(1, n), min_size=2, max_size=2))
    parents, depths = torch.full((2, n), -1, dtype=torch.int32), [[0], [0]]
    for row in range(2):
        for node in range(1, counts[row]):
            choices = [i for i in range(node) if depths[row][i] < room[row]]
            parents[row, node] = parent = choices[data.draw(st.integers(0, len(choices) - 1))] if choices else 0
            depths[row].append(depths[row][parent] + 1)
    if any(max(d) > r for d, r in zip(depths, room)):
        with pytest.raises(ValueError, match=r"forward: tree: expected depths 0\.\.\d+ in row"):
            ours.forward(nodes, cache=cache, tree=parents, num_tokens=counts)
        return
    logits = ours.forward(nodes, cache=cache, tree=parents, num_tokens=counts).logits
    paths = []
    for row in range(2):
        node = data.draw(st.integers(0, counts[row] - 1))
        path = [node]
        while path[0]:
            path.insert(0, int(parents[row, path[0]]))
        paths.append(path)
        alone = ours.new_cache(1, 40)
        if lens[row]:
            ours.forward(ids[row : row + 1, : lens[row]], cache=alone)
            alone.keep(None, [lens[row]])
        expected = ours.forward(nodes[row : row + 1, path], cache=alone).logits
        assert torch.allclose(logits[row, path], expected[0], rtol=0, atol=1e-11)
    width = max(map(len, paths))
    cache.keep(torch.tensor([p + [0] * (width - len(p)) for p in paths]), [len(p) for p in paths])
    for row, path in enumerate(paths):
        fresh, _ = read(ours, torch.cat((ids[row, : lens[row]], nodes[row, path]))[None])
        equal_codes(committed(cache, row), committed(fresh, 0))


def test_bad_trees():
    ours = model().with_kv_cache("plain")
    cache = ours.new_cache(2, 8)
    bad = [
        (torch.tensor([[-1, 0], [-1, 1]], dtype=torch.int32), r"expected parents before .*, got .* in row 1"),
        (torch.tensor([[-1, 0], [0, 0]], dtype=torch.int32), r"expected parents before .*, got .* in row 1"),
        (torch.tensor([[-1, 0], [-1, 0]]), r"expected int32 \[2, 2\], got torch.int64 \[2, 2\]"),
        (torch.tensor([[-1, 0]], dtype=torch.int32), r"expected int32 \[2, 2\], got torch.int32 \[1, 2\]"),
    ]
    for parents, message in bad:
        with pytest.raises(ValueError, match=f"NativeModel.forward: tree: {message}"):
            ours.forward(tokens(2, 2), cache=cache, tree=parents)
    with pytest.raises(ValueError, match="tree: expected None for a contiguous cache"):
        model().forward(tokens(2, 2), cache=model().new_cache(2, 8), tree=bad[2][0].int())


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "kivi2"])
def test_exact_prefill(name):
    """What a prompt's own tokens see is plain; what is stored, and later read, is coded."""
    config = CONFIGS[name]
    exact = KVCacheConfig(config.scheme, group=config.group, prefill="exact", **SMALL)
    ids, counts = tokens(2, 200), [200, 77]
    plain = model().new_cache(2, 200)
    model().forward(ids, cache=plain, num_tokens=counts)
    plain.keep(None, counts)
    caches = []
    for each in (exact, config):
        ours = model().with_kv_cache(each)
        cache = ours.new_cache(2, 200)
        ours.forward(ids, cache=cache, num_tokens=counts, want=Want(0))
        cache.keep(None, counts)
        caches.append(cache)
    for row, count in enumerate(counts):
        reach = float(plain.k[:, row, :, :count].abs().max())
        step = 2 * reach / (15 if name == "int4" else 3)
        near = [
            (cache.dequantise(torch.float64)[0] - plain.k)[:, row, :, :count].abs().amax((1, 2, 3)) for cache in caches
        ]
        assert float(near[0].max()) <= step / 2 * 1.01  # both layers: codes of the plain model's keys
        assert float(near[1][0]) <= step / 2 * 1.01
    # strict prefill reads codes, so the second layer's keys are others
    assert not torch.equal(caches[0].dequantise()[0][1], caches[1].dequantise()[0][1])
    assert torch.equal(caches[0].dequantise()[0][0], caches[1].dequantise()[0][0])


@pytest.mark.parametrize("name", ["int4", "kivi2"])
def test_exact_prefill_goes_by_the_row(name):
    """A row's first pass is that of plain pages, whatever is asked for and whatever the other rows hold."""
    config = CONFIGS[name]
    exact = KVCacheConfig(config.scheme, group=config.group, prefill="exact", **SMALL)
    ids, more = tokens(3, 60), tokens(3, 200, seed=2)
    logits = []
    for each in (exact, config, CONFIGS["plain"]):
        ours = model().with_kv_cache(each)
        cache = ours.new_cache(3, 60)
        first = ours.forward(ids, cache=cache, num_tokens=[60, 0, 41]).logits
        cache.keep(None, [60, 0, 0])
        logits.append((first[0], first[2, :41], ours.forward(more, cache=cache, num_tokens=[30, 200, 7]).logits))
    ours, strict, plain = logits
    close = functools.partial(torch.allclose, rtol=0, atol=1e-11)
    assert close(ours[0], plain[0]) and close(ours[1], plain[1]) and not close(ours[0], strict[0])
    assert not close(ours[2][0, :30], plain[2][0, :30])  # the row that has text reads its codes
    assert close(ours[2][1], plain[2][1]) and close(ours[2][2, :7], plain[2][2, :7])
    assert not close(strict[2][1], plain[2][1])
    alone = model().with_kv_cache(exact)
    cache = alone.new_cache(1, 60)
    alone.forward(ids[:1], cache=cache)
    cache.keep(None, [60])
    assert close(ours[2][0, :30], alone.forward(more[:1, :30], cache=cache).logits[0])


@pytest.mark.parametrize("name", ["kivi4", "kivi2"])
def test_a_block_that_is_never_full_codes_nothing(name):
    """The ring alone is plain pages, bit for bit."""
    kivi = KVCacheConfig(CONFIGS[name].scheme, group=8, page_size=8, flush_block=64)
    ids, logits = tokens(2, 60), []
    for config in (kivi, CONFIGS["plain"]):
        ours = model().with_kv_cache(config)
        cache, parts = read(ours, ids, [1, 30, 7, 1, 20])
        parents = torch.tensor([[-1, 0, 0, 1]] * 2, dtype=torch.int32)
        logits.append(torch.cat((parts, ours.forward(ids[:, :4], cache=cache, tree=parents).logits), 1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["contiguous", "plain", "int4", "kivi2"])
def test_a_refused_forward_changes_nothing(name):
    ours = model().with_kv_cache(CONFIGS.get(name, name))
    cache, ids = ours.new_cache(1, 8), tokens(1, 5)
    ours.forward(ids[:, :3], cache=cache)
    cache.keep(None, [3])
    ours.forward(ids[:, 3:], cache=cache)
    for positions in (torch.full((1, 4), -1), torch.full((1, 4), 640), torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"NativeModel\.forward: positions: expected"):
            ours.forward(tokens(1, 4, 9), cache=cache, positions=positions)
    with pytest.raises(ValueError, match=r"KVCache.keep: num_keep: expected 0\.\.2, got 4"):
        cache.keep(None, [4])
    cache.keep(None, [2])
    fresh = ours.new_cache(1, 8)
    ours.forward(ids, cache=fresh)
    fresh.keep(None, [5])
    logits = [ours.forward(tokens(1, 1, 3), cache=each).logits for each in (cache, fresh)]
    assert torch.allclose(*logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "kivi4"])
def test_status_tells_what_coding_met(name):
    """A weight that makes infinite keys of one token."""
    ours, ids = model().with_kv_cache(CONFIGS[name]), tokens(2, 40).clamp(min=1)
    cache = ours.new_cache(2, 40)
    ours.forward(ids, cache=cache, num_tokens=[40, 3])
    cache.keep(None, [40, 3])
    assert cache.status == Status(0)
    config = ours.native_config
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(shape, generator=generator) for n, shape in config.tensor_shapes().items()}
    weights["model.embed_tokens.weight"][0] = torch.inf
    bad = NativeModel(config, weights, dtype=torch.float64, kv_cache=CONFIGS[name])
    early = cache.fork([0])
    ids[1, 2] = 0
    bad.forward(ids, cache=cache, num_tokens=[3, 2])
    assert cache.status == Status(0)  # padding is not written
    bad.forward(ids, cache=cache)
    assert Status.NAN in cache.status and early.status == Status(0)
    cache.keep(None, [0, 0])
    ours.forward(ids, cache=cache)
    assert Status.NAN in cache.status and Status.NAN in cache.fork([0]).status


@pytest.mark.parametrize("name", ["plain", "int4", "shared"])
def test_passes_of_few_slots(name, monkeypatch):
    """What a device does to bound attention's scratch memory."""
    config = KVCacheConfig(page_size=8, prefix_attention=True) if name == "shared" else CONFIGS[name]
    ours, ids = model().with_kv_cache(config), tokens(3, 50)
    whole, _ = read(ours, ids[:1])
    outs, sizes, step = [], [], PagedKVCache.step

    def spy(self: PagedKVCache, first: int, last: int, **more: bool) -> PagedStep:
        sizes.append(last - first)
        return step(self, first, last, **more)

    monkeypatch.setattr(PagedKVCache, "step", spy)
    for chunk in (None, 7):
        monkeypatch.setattr(PagedKVCache, "chunk", chunk)
        cache = whole.fork([0, 0, 0])
        outs.append(ours.forward(ids, cache=cache, num_tokens=[50, 9, 0], want=Want.LOGITS | Want.HIDDEN))
    assert sizes == [50, *[7] * 7, 1]
    for a, b in zip((outs[0].logits, *outs[0].hidden), (outs[1].logits, *outs[1].hidden), strict=True):
        for row, count in enumerate((50, 9)):
            assert torch.allclose(a[row, :count], b[row, :count], rtol=0, atol=1e-11)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_inference_mode_leaks_nothing(name, inside):
    ours = model(torch.float32).with_kv_cache(CONFIGS[name])
    with torch.inference_mode(inside):
        cache = ours.new_cache(2, 2)
        ours.forward(tokens(2, 15), cache=cache)
        forked = cache.fork([1, 0])
        forked.select([1])
    for each, batch in ((cache, 2), (forked, 1)):
        each.keep(torch.tensor([[0, 2]] * batch), [2] * batch)
        each.reserve(50)
        logits = ours.forward(tokens(batch, 33), cache=each).logits
        each.keep(None, [33] * batch)
        logits[:, :, 0] = -torch.inf


def test_bad_caches():
    with pytest.raises(ValueError, match=r"kv_cache: expected one of plain, .*, contiguous, got 'paged'"):
        model().with_kv_cache("paged")
    with pytest.raises(ValueError, match=r"group: expected a divisor of head_dim 16, got 3"):
        model().with_kv_cache(KVCacheConfig("int8", group=3))
    ours = model().with_kv_cache("kivi2")
    with pytest.raises(ValueError, match=r"forward: tokens: expected at most 640 after 0 cached ones"):
        ours.forward(tokens(1, 641), cache=ours.new_cache(1, 8))
    with pytest.raises(ValueError, match="cache: expected a cache from new_cache, got int"):
        ours.forward(tokens(1, 1), cache=3)
    # each model reads whatever cache it is given
    assert ours.forward(tokens(1, 1), cache=model().new_cache(1, 8)).logits.shape == (1, 1, V)
