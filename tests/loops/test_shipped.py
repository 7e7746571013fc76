"""The shipped models: every lossless method writes what plain decoding writes, which is what transformers writes.

float64 throughout, where a longer pass cannot round a tie differently. The default run takes a few prompts of every
axis; `-m slow` runs the full grids: 40 prompts greedy, 48 sampled, every drafter, draft lengths 1, 4 and 8.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import fastdecode
from fastdecode.drafters import Drafter, PromptLookup, SmallModel
from fastdecode.generation import CHECKPOINTS
from fastdecode.models import KVCacheConfig, NativeModel, Tokenizer
from fastdecode.testing.drafters import Known, Random
from fastdecode.train import prompts

NEW = 32
DRAFTERS = ["small-model", "prompt-lookup", "perfect", "adversarial", "random"]
LENGTHS = [1, 4, 8]


@cache
def target(dtype: torch.dtype = torch.float64) -> NativeModel:
    return fastdecode.load_model(CHECKPOINTS / "tiny-code", dtype=dtype)


@cache
def draft() -> NativeModel:
    return fastdecode.load_model(CHECKPOINTS / "tiny-code-draft", dtype=torch.float64)


@cache
def prompt_ids(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(CHECKPOINTS / "tiny-code")
    return [tokenizer.encode(p.prompt) for p in prompts.read()[:count]]


def decode(
    ids: list[list[int]], batch: int, make: object = "plain", temperature: float = 0.0, first: int = 0, **options
):
    """Tokens of every prompt, decoded `batch` at a time; prompt i has the seed i."""
    texts, statistics = [], []
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        method = make(start, part) if callable(make) else make
        results = fastdecode.generate(
            target(),
            part,
            method=method,
            max_new_tokens=NEW,
            temperature=temperature,
            seeds=[start + i for i in range(len(part))],
            **options,
        )
        texts += [result.tokens for result in results]
        statistics.append(results.statistics)
    return texts, statistics


@cache
def plain(count: int, temperature: float = 0.0) -> list[list[int]]:
    return decode(prompt_ids(count), 8, temperature=temperature)[0]


def drafter_for(name: str, count: int, temperature: float):
    """A function that makes the drafter of a batch, given where the batch starts."""
    vocab_size = target().config.vocab_size

    def make(start: int, part: list[list[int]]) -> Drafter:
        if name == "small-model":
            return SmallModel(draft())
        if name == "prompt-lookup":
            return PromptLookup()
        if name == "random":
            return Random(vocab_size, seed=start)
        output = plain(count, temperature)[start : start + len(part)]
        texts = [p + o for p, o in zip(part, output, strict=True)]
        return Known(texts, vocab_size, shift=0 if name == "perfect" else 1)

    return make


def check(count: int, batch: int, name: str, length: int, temperature: float, **options) -> None:
    make = drafter_for(name, count, temperature)
    texts, statistics = decode(prompt_ids(count), batch, make, temperature, draft_length=length, **options)
    assert texts == plain(count, temperature)
    passes = sum(s.request_passes for s in statistics)
    tokens = sum(len(text) for text in texts)
    if name == "perfect":
        assert passes <= count * -(-NEW // (length + 1))
    elif name == "adversarial":
        assert passes == tokens
    else:
        assert passes <= tokens


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_speculation_is_greedy_decoding(name, length):
    check(6, 6, name, length, 0.0)
    check(1, 1, name, length, 0.0)


@pytest.mark.parametrize("name", ["contiguous", "plain", "fp8", "int8", "int4", "kivi4", "kivi2"])
def test_speculation_over_any_cache_is_plain_decoding_over_it(name):
    """Texts that cross several blocks of a kivi cache; uncoded pages give the contiguous cache's tokens."""
    config = KVCacheConfig(name, page_size=32, flush_block=32) if name.startswith("kivi") else name
    ids, options = prompt_ids(4), {"max_new_tokens": 48, "kv_cache": config}
    expected = [result.tokens for result in fastdecode.generate(target(), ids, **options)]
    texts = [p + o for p, o in zip(ids, expected, strict=True)]
    for method in (SmallModel(draft()), PromptLookup(), Known(texts, target().config.vocab_size)):
        results = fastdecode.generate(target(), ids, method=method, draft_length=7, **options)
        assert [result.tokens for result in results] == expected
    if name in ("contiguous", "plain"):
        assert [tokens[:NEW] for tokens in expected] == plain(4)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_speculation_is_greedy_decoding_on_all_prompts(name, length, batch):
    check(40, batch, name, length, 0.0)


@pytest.mark.parametrize("name,length,temperature", [
    ("small-model", 4, 1.0), ("small-model", 1, 0.7), ("prompt-lookup", 8, 0.7), ("perfect", 8, 1.0),
    ("random", 4, 0.7), ("adversarial", 1, 1.0),
])  # fmt: skip
def test_coupled_sampling_is_plain_sampling(name, length, temperature):
    check(6, 6, name, length, temperature, rule="coupled")


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_coupled_sampling_is_plain_sampling_on_all_prompts(name, length, temperature):
    check(48, 8, name, length, temperature, rule="coupled")


@pytest.mark.parametrize("count", [8, pytest.param(48, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_request_does_not_see_its_batch(count, temperature):
    """Shuffled, and all in one larger batch: the same tokens for the same prompt and seed."""
    ids, expected = prompt_ids(count), plain(count, temperature)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    for method in ("plain", SmallModel(draft())):
        results = fastdecode.generate(
            target(), [ids[i] for i in order], method=method, max_new_tokens=NEW, temperature=temperature, seeds=order
        )
        assert [r.tokens for r in results] == [expected[i] for i in order]


@pytest.mark.slow
def test_coupled_drafts_are_accepted_nearly_as_often_as_ratio_drafts():
    """At temperature 1 with the small model, at least 75 % of the ratio rule's acceptance."""
    shares = {}
    for rule in ("coupled", "ratio"):
        make = drafter_for("small-model", 48, 1.0)
        _, statistics = decode(prompt_ids(48), 8, make, 1.0, rule=rule, draft_length=4)
        # first drafts only: later ones are conditioned on the acceptance of those before
        verified = sum(sum(s.drafted_histogram[1:]) for s in statistics)
        shares[rule] = sum(sum(s.accepted_histogram[1:]) for s in statistics) / verified
    print(shares)
    assert shares["coupled"] >= 0.75 * shares["ratio"]


# --- against transformers ---------------------------------------------------------------------------------------------


def greedy_of_transformers(ids: list[int], dtype: torch.dtype) -> list[int]:
    model = transformers_model(dtype)
    tokens = torch.tensor([ids])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


@cache
def transformers_model(dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "tiny-code", dtype=dtype).eval()


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_plain_greedy_is_that_of_transformers(count):
    for ids, ours in zip(prompt_ids(count), plain(count), strict=True):
        assert ours == greedy_of_transformers(ids, torch.float64)


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_float32_leaves_transformers_only_at_near_ties(count):
    """Different sums may break a tie differently: only where the two best logits are closer than 1e-4, and rarely."""
    model, leaving = target(torch.float32), 0
    for ids in prompt_ids(count):
        ours = fastdecode.generate(model, ids, max_new_tokens=NEW).tokens
        theirs = greedy_of_transformers(ids, torch.float32)
        if ours == theirs:
            continue
        leaving += 1
        first = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        text = torch.tensor([ids + ours[:first]])
        logits = model.forward(text, cache=model.new_cache(1, text.shape[1])).logits
        best = logits[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-4
    assert leaving <= (2 if count == 40 else 1)
