"""The arguments of generate, what it reports, and the table of methods."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
import toys

from fastdecode.drafters import SmallModel
from fastdecode.generation import generate, splitmix64, stream
from fastdecode.methods import METHODS, find_method
from fastdecode.policies import ConfidenceStop, FixedLength
from fastdecode.testing.models import noisy
from fastdecode.types import Result, Results

TARGET = toys.table(eos_token_ids=(11,))
DRAFT = noisy(TARGET)
LETTERS = toys.letters("abcdefghijklm")
PADDED = {"prompt": torch.tensor([[1, 2, 3]])}
BEGINNING = toys.letters("abcdefghijklm", begin=[0])  # its encode adds a begin-of-text id


def test_one_prompt_gives_a_result_and_a_list_gives_results():
    one = generate(TARGET, [1, 2], max_new_tokens=5)
    assert isinstance(one, Result) and one.prompt_tokens == [1, 2] and one.text is None
    assert generate(TARGET, torch.tensor([1, 2]), max_new_tokens=5).tokens == one.tokens
    assert generate(TARGET, np.array([1, 2], dtype=np.int32), max_new_tokens=5).tokens == one.tokens
    for prompts in ([[1, 2]], torch.tensor([[1, 2]]), (torch.tensor([1, 2]),), [np.array([1, 2])]):
        many = generate(TARGET, prompts, max_new_tokens=5)
        assert isinstance(many, Results) and len(many) == 1 and many[0].tokens == one.tokens
        assert [result.tokens for result in many] == [one.tokens]
    text = generate(TARGET, "ab", tokenizer=toys.letters("abcdefghijklm"), max_new_tokens=5)
    assert text.prompt_tokens == [0, 1] and text.text == "".join("abcdefghijkl"[i] for i in text.tokens if i != 12)


def test_padded_prompts():
    prompts = [[1, 2, 3, 4], [5], [6, 7], [8, 9, 10]]
    expected = [result.tokens for result in generate(TARGET, prompts, max_new_tokens=9)]
    for starts in ([0, 0, 0, 0], [0, 3, 2, 1], [0, 2, 1, 0]):  # padding right of the tokens, left, both
        text, mask = torch.full((4, 4), 12), torch.zeros(4, 4, dtype=torch.int64)
        for row, (prompt, start) in enumerate(zip(prompts, starts)):
            text[row, start : start + len(prompt)] = torch.tensor(prompt)
            mask[row, start : start + len(prompt)] = 1
        for given in (mask, mask.bool(), mask.numpy(), mask.to(torch.uint8)):
            results = generate(TARGET, text, attention_mask=given, max_new_tokens=9)
            assert [result.prompt_tokens for result in results] == prompts
            assert [result.tokens for result in results] == expected
        chunks = list(stream(TARGET, text.numpy(), attention_mask=mask, max_new_tokens=9))
        assert {chunk.index: chunk.result.tokens for chunk in chunks if chunk.result} == dict(enumerate(expected))
        one = generate(TARGET, text[3], attention_mask=mask[3], max_new_tokens=9)
        assert (one.prompt_tokens, one.tokens) == (prompts[3], expected[3])
    assert [r.tokens for r in generate(TARGET, text, max_new_tokens=9)] != expected  # the padding is read without it


def test_splitmix64_is_the_published_generator():
    # the first outputs for seed 1234567, from the reference implementation
    assert [splitmix64(1234567, i) for i in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_seeds():
    options = {"temperature": 1.0, "max_new_tokens": 20, "ignore_eos": True}
    base = generate(TARGET, [[1], [1]], **options)
    assert base[0].tokens != base[1].tokens
    assert [result.seed for result in base] == [splitmix64(0, 0), splitmix64(0, 1)]
    again = generate(TARGET, [[1], [1]], seed=0, **options)
    named = generate(TARGET, [[1], [1]], seeds=[splitmix64(0, i) for i in range(2)], **options)
    other = generate(TARGET, [[1], [1]], seed=1, **options)
    assert [r.tokens for r in base] == [r.tokens for r in again] == [r.tokens for r in named]
    assert base[0].tokens != other[0].tokens
    # 64 bits are 64 bits, signed or not
    assert (
        generate(TARGET, [1], seeds=[-1], **options).tokens
        == generate(TARGET, [1], seeds=[2**64 - 1], **options).tokens
    )


@pytest.mark.parametrize("method", ["plain", "speculative", "prompt-lookup"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 3}], ids=["greedy", "sampled"])
def test_logprobs_are_those_of_the_text_read_again(method, options):
    if method == "speculative":
        options = {**options, "draft_model": DRAFT}
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8]]
    results = generate(
        TARGET, prompts, method=method, logprobs=3, max_new_tokens=[14, 3, 9, 0], stop_ids=[6], **options
    )
    for result in results:
        assert len(result.logprobs) == len(result.top_logprobs) == len(result.tokens)
        text = result.prompt_tokens + result.tokens
        rows = TARGET.forward(torch.tensor([text]), cache=TARGET.new_cache(1, 64)).logits[0].log_softmax(-1)
        for i, token in enumerate(result.tokens):
            row = rows[len(result.prompt_tokens) + i - 1]
            assert result.logprobs[i] == pytest.approx(row[token].item(), abs=1e-12)
            values, ids = row.topk(3)
            assert [pair[0] for pair in result.top_logprobs[i]] == ids.tolist()
            assert [pair[1] for pair in result.top_logprobs[i]] == pytest.approx(values.tolist(), abs=1e-12)
    only = generate(TARGET, [1, 2, 3], logprobs=0, max_new_tokens=4, ignore_eos=True)
    assert len(only.logprobs) == 4 and only.top_logprobs is None


def test_statistics_add_up():
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 7, 8]]
    results = generate(TARGET, prompts, method="speculative", draft_model=DRAFT, max_new_tokens=[30, 3, 9, 20])
    total = results.statistics
    each = [result.statistics for result in results]
    assert total.tokens == sum(statistics.tokens for statistics in each)
    assert total.request_passes == sum(statistics.request_passes for statistics in each)
    assert total.target_passes == max(statistics.target_passes for statistics in each)
    assert total.drafted == sum(statistics.drafted for statistics in each)
    assert total.accepted == sum(statistics.accepted for statistics in each)
    for statistics in each:
        assert sum(statistics.accepted_histogram) == sum(statistics.drafted_histogram) == statistics.target_passes
        assert set(statistics.seconds) == {"prefill", "draft", "target", "verify", "other"}
        assert 0 < statistics.total_seconds <= total.total_seconds
        assert statistics.tokens_per_second > 0
        assert len(statistics.acceptance_by_position) == len(statistics.drafted_histogram) - 1


def test_the_clock_does_not_count_the_consumer():
    for options in ({}, {"method": "prompt-lookup"}):
        chunks = []
        for chunk in stream(TARGET, [1, 2], max_new_tokens=3, ignore_eos=True, **options):
            time.sleep(0.1)
            chunks.append(chunk)
        assert chunks[-1].result.statistics.total_seconds < 0.1 * len(chunks)


def test_methods():
    loops = ["plain", "speculative", "speculative-confidence", "prompt-lookup"]
    assert list(METHODS) == [*loops, "hydragen", "kivi4", "kivi2", "int8-cache", "int4-cache", "fp8-cache"]
    speculative = find_method("speculative")
    assert speculative.guarantee() == speculative.guarantee("coupled", sampled=True) == "exact"
    assert speculative.guarantee("ratio", sampled=True) == "in law"
    assert speculative.guarantee("ratio") == "exact"
    assert speculative.guarantee("block", sampled=True) == "in law"
    assert speculative.guarantee("typical", sampled=True) == "approximate" != speculative.guarantee("typical")
    assert speculative.guarantee("top_beta") == speculative.guarantee("top_beta", sampled=True) == "approximate"
    with pytest.raises(
        ValueError, match=r"method: expected one of plain, .*, got 'specultive'; did you mean 'speculative'"
    ):
        generate(TARGET, [1], method="specultive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt: expected text or ids, at least one"),
        ({"prompt": [[1], []]}, "prompt: expected at least one token"),
        ({"prompt": [1, 13]}, r"prompt: expected ids 0\.\.12, got 13"),
        ({"prompt": [1, -1]}, r"prompt: expected ids 0\.\.12, got -1"),
        ({"prompt": [0.5]}, "prompt: expected"),
        ({"prompt": [[0.5]]}, "prompt: expected text or ids"),
        ({"prompt": torch.tensor([0.5])}, "prompt: expected ids as integers"),
        ({"prompt": [1] * 4097}, r"prompt: expected at most 4096 tokens \(max_context\), got 4097"),
        ({"prompt": "text"}, "tokenizer: expected a Tokenizer"),
        ({"stop": "x"}, "tokenizer: expected a Tokenizer"),
        ({"stop": [""], "tokenizer": LETTERS}, r"stop: expected strings that are not empty, got \(''"),
        ({"stop": 5}, "stop: expected a string or strings, got 5"),
        ({"stop": [5]}, r"stop: expected a string or strings, got \[5\]"),
        ({"prompt": torch.tensor(5)}, r"prompt: expected text or ids, or a list of either, got tensor\(5\)"),
        ({"prompt": b"ab"}, "prompt: expected text or ids, or a list of either, got b'ab'"),
        ({"prompt": "", "tokenizer": BEGINNING}, "prompt: expected at least one token, got ''"),
        ({"prompt": ["a", ""], "tokenizer": BEGINNING}, "prompt: expected at least one token, got ''"),
        (
            {"attention_mask": torch.ones(1)},
            r"attention_mask: expected None for a prompt that is not a tensor or array",
        ),
        ({**PADDED, "attention_mask": [[1, 1, 1]]}, r"integers or bools \[1, 3\], as the prompt, got \[\[1, 1, 1\]\]"),
        ({**PADDED, "attention_mask": torch.ones(1, 3)}, r"as the prompt, got 'torch.float32 \[1, 3\]'"),
        ({**PADDED, "attention_mask": np.ones((3, 1), int)}, r"as the prompt, got 'int64 \[3, 1\]'"),
        (
            {**PADDED, "attention_mask": torch.tensor([[1, 0, 1]])},
            r"attention_mask: expected one run .*, got \[1, 0, 1\]",
        ),
        (
            {**PADDED, "attention_mask": torch.tensor([[0, 2, 1]])},
            r"attention_mask: expected one run .*, got \[0, 2, 1\]",
        ),
        ({**PADDED, "attention_mask": torch.tensor([[0, 0, 0]])}, "prompt: expected at least one token"),
        ({"model": 5}, "model: expected a Model, a folder or a model of transformers, got 5"),
        ({"method": []}, r"method: expected one of plain, .*, got \[\]"),
        ({"tokenizer": 5}, "tokenizer: expected a Tokenizer or None, got 5"),
        ({"temperature": -1.0}, r"temperature: expected a finite number >= 0 \(as float32\), got -1.0"),
        ({"temperature": 1e39}, r"temperature: expected a finite number >= 0 \(as float32\), got 1e\+39"),
        ({"temperature": None}, "temperature: expected a finite number .*, got None"),
        ({"temperature": "1"}, "temperature: expected a finite number .*, got '1'"),
        ({"temperature": torch.tensor(0.5)}, r"temperature: expected a finite number .*, got tensor\(0.5"),
        ({"temperature": [0.0, 1.0]}, "temperature: expected one value or 1"),
        ({"top_k": -1}, r"top_k: expected None or an int 0\.\.2147483647 \(0 = off\), got -1"),
        ({"top_k": 99999999999}, r"top_k: expected None or an int 0\.\.2147483647 \(0 = off\), got 99999999999"),
        ({"top_k": 1.9}, "top_k: expected None or an int .*, got 1.9"),
        ({"top_p": 0.0}, r"top_p: expected None, or in \(0, 1\], got 0.0"),
        ({"typical_p": 0.0}, r"typical_p: expected None, or in \(0, 1\], got 0.0"),
        ({"min_p": 1.0}, r"min_p: expected None, or in \[0, 1\), got 1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a finite float32 > 0, got 0.0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty: expected a finite float32 > 0, got 1e-40"),
        ({"repetition_penalty": None}, "repetition_penalty: expected a finite float32 > 0, got None"),
        ({"repetition_penalty": [1.0, 1.1]}, "repetition_penalty: expected one value or 1, one per prompt"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: expected a finite float32, got nan"),
        ({"presence_penalty": -1e39}, r"presence_penalty: expected a finite float32, got -1e\+39"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an int >= 0, got -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an int >= 0, got 2.5"),
        ({"max_new_tokens": [1, 2]}, r"max_new_tokens: expected one value or 1, one per prompt, got \[1, 2\]"),
        ({"ignore_eos": 1}, "ignore_eos: expected True or False, got 1"),
        ({"seed": 1.5}, "seed: expected an int or None, got 1.5"),
        ({"seeds": 5}, "seeds: expected a list of ints, got 5"),
        ({"seeds": [1.5]}, "seeds: expected a list of ints, got 1.5"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, r"min_new_tokens: expected 0\.\.4"),
        ({"seed": 1, "seeds": [1]}, "seeds: expected one of seed and seeds, got 'both'"),
        ({"seeds": [1, 2]}, "seeds: expected 1 seeds"),
        ({"seeds": [2**64]}, "seed: expected an int of 64 bits, got 18446744073709551616"),
        ({"stop_ids": 5}, "stop_ids: expected a list of ints, got 5"),
        ({"stop_ids": [5.7]}, "stop_ids: expected a list of ints, got 5.7"),
        ({"stop_ids": [13]}, r"stop_ids: expected ids 0\.\.12, got 13"),
        ({"ban_ids": [-1]}, r"ban_ids: expected ids 0\.\.12, got -1"),
        ({"bias": {99: 1.0}}, r"bias: expected ids 0\.\.12, got 99"),
        ({"bias": {1: "x"}}, "bias: expected {id: value} with numbers, got 'x'"),
        ({"bias": [0.0]}, r"bias: expected floating \[13\] or {id: value}, got \[0.0\]"),
        ({"bias": torch.zeros(5)}, r"bias: expected floating \[13\]"),
        ({"logprobs": 14}, "logprobs: expected at most 13"),
        ({"logprobs": -1}, "logprobs: expected None or an int >= 0, got -1"),
        ({"logprobs": 1.5}, "logprobs: expected None or an int >= 0, got 1.5"),
        ({"dtype": torch.float64}, "dtype: expected None for a model that is already loaded"),
        ({"rule": "ratio"}, "rule: expected None for method 'plain', got 'ratio'"),
        ({"draft_model": DRAFT}, "draft_model: expected None, method 'plain' uses none"),
        ({"draft_length": 3}, r"draft_length: expected .*method 'plain' \(no parameters of its own\), got 3"),
        ({"policy": FixedLength(3)}, "policy: expected None, method 'plain' drafts nothing"),
        ({"temprature": 1.0}, "temprature: expected an argument of generate"),
        ({"method": "speculative"}, "draft_model: expected a model, which method"),
        ({"method": "speculative", "draft_model": toys.table(7)}, "draft_model: expected a vocabulary of 13 ids"),
        (
            {"method": "prompt-lookup", "rule": "best"},
            "rule: expected None or one of coupled, .*, got 'best'",
        ),
        (
            {"method": "prompt-lookup", "rule": "top_beta", "temperature": 0.5},
            "temperature: expected 0 with rule 'top_beta', which takes the likeliest, got 0.5",
        ),
        ({"method": "prompt-lookup", "rule": "typical", "eps": 1.5}, r"eps: expected 0\.\.1, got 1.5"),
        ({"method": "prompt-lookup", "rule": "typical", "delta": "x"}, "delta: expected a number, got 'x'"),
        ({"method": "prompt-lookup", "rule": "top_beta", "beta": 0}, r"beta: expected 1\.\.2147483647, got 0"),
        ({"method": "prompt-lookup", "rule": "top_beta", "beta": 1.5}, "beta: expected an int, got 1.5"),
        ({"method": "prompt-lookup", "rule": "top_beta", "tau": float("nan")}, "tau: expected .*, got nan"),
        ({"method": "prompt-lookup", "eps": 0.5}, "eps: expected an argument of generate, or of method"),
        ({"method": "prompt-lookup", "rule": "ratio", "tau": 0.5}, "tau: expected an argument of generate"),
        (
            {"method": "speculative", "draft_model": 5},
            "draft_model: expected a Model, a folder or a model of transformers, got 5",
        ),
        (
            {"method": "speculative", "draft_model": DRAFT, "dtype": torch.float64},
            "dtype: expected None for a model that is already loaded",
        ),
        ({"method": "prompt-lookup", "max_ngram": 0}, "PromptLookup: max_ngram: expected an int >= 1, got 0"),
        ({"method": "prompt-lookup", "max_ngram": 2**70}, r"max_ngram: expected 1\.\.64"),
        ({"method": "prompt-lookup", "max_ngram": 2.5}, "generate: max_ngram: expected an int, got 2.5"),
        ({"method": "prompt-lookup", "draft_length": -1}, "FixedLength: length: expected an int >= 0, got -1"),
        ({"method": "prompt-lookup", "draft_length": 2.5}, "generate: draft_length: expected an int, got 2.5"),
        ({"method": "prompt-lookup", "policy": 5}, "policy: expected a Policy or None, got 5"),
        (
            {
                "method": "speculative-confidence",
                "draft_model": DRAFT,
                "policy": FixedLength(2),
                "confidence": 0.9,
            },
            "policy: expected one of policy and confidence, got 'both'",
        ),
        ({"method": "prompt-lookup", "draft_length": 2, "policy": FixedLength(3)}, "policy: expected one of"),
    ],
)
def test_messages(options, message):
    options = {"model": TARGET, "prompt": [1], **options}
    for call in (generate, stream):  # stream checks before its first chunk is asked for
        with pytest.raises(ValueError, match=message):
            call(**options)


def test_numbers_of_numpy_and_torch_are_numbers():
    prompts = [[1, 2], [3]]
    expected = generate(TARGET, prompts, max_new_tokens=[5, 7], top_k=[3, 4], temperature=0.5, seeds=[3, 4])
    numbers = {"max_new_tokens": torch.tensor([5, 7]), "top_k": np.array([3, 4]), "temperature": np.float32(0.5)}
    given = generate(TARGET, prompts, seeds=np.array([3, 4]), stop_ids=torch.tensor([11]), **numbers)
    assert [result.tokens for result in given] == [result.tokens for result in expected]


def test_an_unreachable_minimum():
    result = generate(TARGET, [1], max_new_tokens=10**30, min_new_tokens=10**20, stop_ids=[3])
    assert (len(result.prompt_tokens + result.tokens), result.finish_reason) == (4096, "length")


def test_a_policy_leaves_the_drafters_parameters():
    result = generate(TARGET, [1, 2] * 4, method="prompt-lookup", max_ngram=2, policy=FixedLength(2), ignore_eos=True)
    assert len(result.statistics.drafted_histogram) <= 3


def test_dtype_is_for_what_is_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("fastdecode.generation.load_model", lambda path, dtype: read.append((path, dtype)) or DRAFT)
    options = {"method": "speculative", "draft_model": tmp_path, "dtype": torch.float64, "max_new_tokens": 4}
    assert generate(TARGET, [1, 2], **options).tokens == generate(TARGET, [1, 2], max_new_tokens=4).tokens
    assert read == [(tmp_path, torch.float64)]


def test_policies_and_drafters_check_their_arguments():
    with pytest.raises(ValueError, match=r"threshold: expected 0\.\.1, got 2"):
        ConfidenceStop(4, 2)
    with pytest.raises(ValueError, match=r"expected begin\(\) before it"):
        SmallModel(DRAFT).propose(None, [1], None)  # type: ignore[arg-type]
