"""Every kind of cache under every loop: speculation gives what plain decoding with the same cache gives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import toys

from fastdecode.drafters import Drafter, PromptLookup, SmallModel
from fastdecode.generation import generate
from fastdecode.models import KVCacheConfig, NativeModel, PagedKVCache, Want
from fastdecode.testing.drafters import Known, Random

# blocks of 8 tokens, so that texts of 64 cross many boundaries
SMALL = {"page_size": 4, "flush_block": 8}
CONFIGS = {
    "plain": KVCacheConfig(page_size=4),
    "fp8": KVCacheConfig("fp8_e4m3", page_size=4, group=8),
    "int8": KVCacheConfig("int8", page_size=4),
    "int4": KVCacheConfig("int4", page_size=4),
    "kivi4": KVCacheConfig("kivi4", group=4, **SMALL),
    "kivi2": KVCacheConfig("kivi2", group=4, **SMALL),
    "shared": KVCacheConfig(page_size=4, prefix_attention=True),
    "shared-int4": KVCacheConfig("int4", page_size=4, prefix_attention=True),
}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 5, 6], [0, 0], [9, 1, 9, 1, 9] * 4, [12], [9, 1, 9, 1, 9] * 4 + [3], [7] * 8]
NEW = [12, 25, 3, 1, 18, 25, 21, 30]
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


@functools.cache
def target(name: str, dtype: torch.dtype = torch.float64) -> NativeModel:
    model = toys.native(head_dim=16, dtype=dtype)
    return model if name == "contiguous" else model.with_kv_cache(CONFIGS[name])


@functools.cache
def draft() -> NativeModel:
    return toys.native(noise=0.15, head_dim=16)


@functools.cache
def plain(name: str, sampled: bool, eos: int | None = None) -> list[list[int]]:
    """Every request on its own, so that batching and shared prefixes are compared too."""
    options = SAMPLED if sampled else {}
    return [
        generate(
            target(name), prompt, max_new_tokens=new, seeds=[i], stop_ids=None if eos is None else [eos], **options
        ).tokens
        for i, (prompt, new) in enumerate(zip(PROMPTS, NEW))
    ]


def drafter(name: str, texts: list[list[int]]) -> Drafter:
    makers: dict[str, Callable[[], Drafter]] = {
        "small-model": lambda: SmallModel(draft()),
        "prompt-lookup": PromptLookup,
        "perfect": lambda: Known(texts, toys.VOCAB),
        "random": lambda: Random(toys.VOCAB),
        "adversarial": lambda: Known(texts, toys.VOCAB, shift=1),
    }
    return makers[name]()


@pytest.mark.parametrize("name", ["small-model", "prompt-lookup", "perfect", "random", "adversarial"])
@pytest.mark.parametrize("length", [1, 5, 11])
@pytest.mark.parametrize("cache", CONFIGS)
def test_speculation_is_plain_decoding_with_the_same_cache(cache, length, name):
    for sampled in (False, True):
        expected = plain(cache, sampled)
        texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, expected)]
        for count in (1, 8):
            results = generate(
                target(cache),
                PROMPTS[-count:],
                method=drafter(name, texts[-count:]),
                draft_length=length,
                max_new_tokens=NEW[-count:],
                seeds=list(range(8))[-count:],
                **(SAMPLED if sampled else {}),
            )
            assert [result.tokens for result in results] == expected[-count:]
            if name == "perfect":
                for result in results:
                    assert result.statistics.target_passes == -(-len(result.tokens) // (length + 1))


@pytest.mark.parametrize("cache", CONFIGS)
def test_requests_that_end_early(cache):
    """An id that ends some requests inside a draft; the batch shrinks around the others."""
    expected = plain(cache, True)
    eos = expected[7][9]
    short = plain(cache, True, eos)
    assert 2 <= sum(len(a) < len(b) for a, b in zip(short, expected)) < 8
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, expected)]
    for method in ("plain", Known(texts, toys.VOCAB), PromptLookup()):
        results = generate(
            target(cache), PROMPTS, method=method, max_new_tokens=NEW, seeds=range(8), stop_ids=[eos], **SAMPLED
        )
        assert [result.tokens for result in results] == short


@pytest.mark.parametrize("sampled", [False, True])
def test_uncoded_caches_change_nothing(sampled):
    expected = plain("contiguous", sampled)
    assert plain("plain", sampled) == expected and plain("shared", sampled) == expected


def test_coded_caches_do():
    """A negative control: what is rounded shows, so equal tokens above are not equal for want of rounding."""
    assert all(plain(name, True) != plain("contiguous", True) for name in ("int4", "kivi2"))


def test_a_draft_model_with_a_coded_cache_changes_no_token():
    expected = plain("plain", False)
    for name in ("int4", "kivi2"):
        method = SmallModel(draft().with_kv_cache(CONFIGS[name]))
        results = generate(target("plain"), PROMPTS, method=method, max_new_tokens=NEW, draft_length=5)
        assert [result.tokens for result in results] == expected


# --- prompts that begin alike -----------------------------------------------------------------------------------------


class Counting:
    """Counts the tokens that a model is fed before its first logits."""

    def __init__(self, model: NativeModel) -> None:
        self.model, self.config, self.new_cache = model, model.config, model.new_cache
        self.prefilled = 0
        self.caches: list[PagedKVCache] = []

    def forward(self, tokens, *, cache, positions=None, num_tokens=None, want=Want.LOGITS):
        if want == Want(0):
            self.prefilled += int(sum(num_tokens)) if num_tokens is not None else tokens.numel()
        self.caches.append(cache)
        return self.model.forward(tokens, cache=cache, positions=positions, num_tokens=num_tokens, want=want)


@pytest.mark.parametrize("cache", CONFIGS)
def test_what_prompts_have_in_common_is_read_once(cache):
    system, branch = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8]
    prompts = [
        *(system + branch + [i, 7] for i in range(3)),
        [*system, 9, 9],
        system,
        [11],
        *[system + branch + [2, 7]] * 3,
        [1, 2, 3],
    ]
    model = Counting(target(cache))
    options = {"max_new_tokens": 12, "seeds": range(10), **SAMPLED}
    results = generate(model, prompts, **options)
    # whole blocks of 4 once; system[:-1] has one block; equal prompts are one row
    assert model.prefilled == 4 + 4 + 3 + 1 + 4 + (1 + 1 + 1) + 2
    alone = [generate(target(cache), p, **{**options, "seeds": [i]}).tokens for i, p in enumerate(prompts)]
    assert [result.tokens for result in results] == alone
    assert any(c is not model.caches[0] for c in model.caches)


def test_samples_of_one_prompt_share_its_pages():
    model = Counting(target("shared"))
    prompt = [i % 13 for i in range(41)]
    results = generate(model, [prompt] * 6, max_new_tokens=8, **SAMPLED)
    assert model.prefilled == 40
    last = model.caches[-1]
    assert len({table[:10] for table in last.tables}) == 1
    assert len({page for table in last.tables for page in table}) <= 10 + 2 * last.batch
    alone = [generate(target("plain"), prompt, max_new_tokens=8, seeds=[r.seed], **SAMPLED).tokens for r in results]
    assert [result.tokens for result in results] == alone


def test_a_draft_model_reads_common_prompts_once_too():
    drafting = Counting(draft().with_kv_cache(CONFIGS["plain"]))
    prompt = [i % 13 for i in range(41)]
    results = generate(target("plain"), [prompt] * 3, method="speculative", draft_model=drafting, max_new_tokens=8)
    assert drafting.prefilled == 40 and results.statistics.accepted > 0


# --- options ----------------------------------------------------------------------------------------------------------


def test_kv_cache_of_generate():
    model = target("contiguous")
    expected = plain("kivi2", False)[7]
    options = {"max_new_tokens": NEW[7]}
    assert generate(model, PROMPTS[7], kv_cache=CONFIGS["kivi2"], **options).tokens == expected
    assert model.kv_cache is None  # the caller's model is not changed
    assert generate(target("kivi2"), PROMPTS[7], **options).tokens == expected
    assert generate(target("kivi2"), PROMPTS[7], kv_cache="contiguous", **options).tokens == plain("plain", False)[7]
    with pytest.raises(ValueError, match=r"kv_cache: expected one of plain, .*, got 'int3'"):
        generate(model, [1], kv_cache="int3")
    with pytest.raises(ValueError, match="kv_cache: expected None, method 'kivi2' brings its own, got 'int8'"):
        generate(model, [1], method="kivi2", kv_cache="int8")
    with pytest.raises(ValueError, match="kv_cache: expected None for a TabularLM"):
        generate(toys.table(), [1], kv_cache="int8")
    with pytest.raises(ValueError, match=r"kv_cache: expected 'contiguous', paged ones need .* got head_dim 8"):
        generate(toys.native(), [1], kv_cache="int8")


@pytest.mark.parametrize("method", ["hydragen", "kivi4", "kivi2", "int8-cache", "int4-cache", "fp8-cache"])
def test_methods_with_a_cache_of_their_own(method):
    options = {"flush_block": 64} if method.startswith("kivi") else {}
    results = generate(target("contiguous"), PROMPTS, method=method, max_new_tokens=20, **options)
    assert all(len(result.tokens) == 20 for result in results)
    statistics = results.statistics
    if method == "hydragen":
        expected = generate(target("contiguous"), PROMPTS, max_new_tokens=20)
        assert [result.tokens for result in results] == [result.tokens for result in expected]
        assert statistics.cache_bits_per_value == 64
    else:
        assert 3 <= statistics.cache_bits_per_value <= 10
    assert statistics.cache_bytes == max(result.statistics.cache_bytes for result in results) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", CONFIGS)
def test_narrow_models_run(cache, dtype):
    results = generate(target(cache, dtype), PROMPTS, method=PromptLookup(), max_new_tokens=NEW)
    assert [len(result.tokens) for result in results] == NEW
