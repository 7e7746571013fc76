"""Greedy and coupled speculation give plain decoding's tokens, whatever is drafted, in whatever batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import toys

from fastdecode import Rule, Stream, ops
from fastdecode.drafters import Drafter, PromptLookup, SmallModel
from fastdecode.generation import generate
from fastdecode.loops import Batch
from fastdecode.policies import ConfidenceStop
from fastdecode.testing.drafters import Known, Random
from fastdecode.testing.models import Broken, noisy
from fastdecode.types import SamplingParams

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 5, 6], [0, 0], [9, 1, 9, 1, 9], [12], [3, 2, 1], [7, 7, 7, 7, 7, 7, 7, 7]]
NEW = [12, 25, 3, 1, 18, 25, 7, 30]
SAMPLED = {"temperature": 0.7, "top_p": 0.95}


@functools.cache
def models(kind: str) -> tuple:
    if kind == "table":
        target = toys.table(eos_token_ids=(11,))
        return target, noisy(target)
    return toys.native(), toys.native(noise=0.15)


def drafter(name: str, kind: str, texts: list[list[int]]) -> Drafter:
    makers: dict[str, Callable[[], Drafter]] = {
        "small-model": lambda: SmallModel(models(kind)[1]),
        "prompt-lookup": PromptLookup,
        "perfect": lambda: Known(texts, toys.VOCAB),
        "random": lambda: Random(toys.VOCAB),
        "adversarial": lambda: Known(texts, toys.VOCAB, shift=1),
    }
    return makers[name]()


@functools.cache
def plain(kind: str, batch: int, sampled: float) -> list[list[int]]:
    """Every request on its own, so that batching is compared too."""
    options = {**SAMPLED, "temperature": sampled} if sampled else {}
    target = models(kind)[0]
    return [
        generate(target, prompt, max_new_tokens=new, seeds=[seed], **options).tokens
        for seed, (prompt, new) in enumerate(zip(PROMPTS[:batch], NEW[:batch]))
    ]


@pytest.mark.parametrize("name", ["small-model", "prompt-lookup", "perfect", "random", "adversarial"])
@pytest.mark.parametrize("length", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("sampled", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["table", "native"])
def test_same_tokens_as_plain(kind, sampled, batch, length, name):
    expected = plain(kind, batch, sampled)
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, expected)]
    options = {**SAMPLED, "temperature": sampled} if sampled else {}
    results = generate(
        models(kind)[0],
        PROMPTS[:batch],
        method=drafter(name, kind, texts),
        draft_length=length,
        max_new_tokens=NEW[:batch],
        seeds=list(range(batch)),
        **options,
    )
    assert [result.tokens for result in results] == expected
    for result in results:
        statistics = result.statistics
        assert statistics.tokens == len(result.tokens)
        if name == "adversarial":
            assert statistics.accepted == 0 and statistics.target_passes == len(result.tokens)
        if name == "perfect":  # every pass gives length + 1 tokens; only the last may fall short
            assert statistics.target_passes == -(-len(result.tokens) // (length + 1))


@pytest.mark.parametrize("sampled", [0.0, 1.0])
def test_plain_decoding_does_not_depend_on_the_batch(sampled):
    target, _ = models("native")
    order = [6, 3, 0, 7, 2, 5, 1, 4]
    options = {"temperature": sampled} if sampled else {}
    expected = [
        generate(target, PROMPTS[i], max_new_tokens=NEW[i], seeds=[i], **options).tokens for i in range(len(PROMPTS))
    ]
    for rows in (order, order[:3], order + order):
        results = generate(
            target, [PROMPTS[i] for i in rows], max_new_tokens=[NEW[i] for i in rows], seeds=rows, **options
        )
        assert [result.tokens for result in results] == [expected[i] for i in rows]


def test_mixed_temperatures_and_filters_in_one_batch():
    target, draft = models("table")
    filters = {
        "temperature": [0.0, 1.0, 0.0, 0.7, 1.3, 0.0, 1.0, 1.0],
        "top_k": [0, 3, 2, None, 5, 0, 0, 1],
        "min_p": [0.1] + [None] * 7,
        "typical_p": [None, None, 0.5, 0.6, 0.9, None, 0.3, 1.0],
    }
    expected = [
        generate(target, PROMPTS[i], seeds=[i], **{name: values[i] for name, values in filters.items()}).tokens
        for i in range(8)
    ]
    for method in (SmallModel(draft), PromptLookup()):
        results = generate(target, PROMPTS, method=method, seeds=list(range(8)), **filters)
        assert [result.tokens for result in results] == expected
    without = generate(target, PROMPTS, seeds=list(range(8)), **{**filters, "typical_p": None})
    assert {3, 6} <= {i for i in range(8) if without[i].tokens != expected[i]} <= {3, 4, 6}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_stopping_by_confidence_changes_no_token(options, threshold):
    target, draft = models("table")
    expected = generate(target, PROMPTS, max_new_tokens=NEW, **options)
    results = generate(
        target,
        PROMPTS,
        method="speculative-confidence",
        draft_model=draft,
        draft_length=5,
        confidence=threshold,
        max_new_tokens=NEW,
        **options,
    )
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    drafted = results.statistics.drafted_histogram
    if threshold == 0.0:
        assert sum(drafted[5:]) > 0
    if threshold == 1.0:  # a row of a random table is never certain: one draft and no more
        assert sum(drafted[2:]) == 0


def test_the_draft_model_itself_as_target_is_always_accepted():
    target, _ = models("native")
    for options in ({}, SAMPLED, {**SAMPLED, "rule": "ratio"}):
        result = generate(
            target, [1, 2, 3], method="speculative", draft_model=target, draft_length=4, max_new_tokens=40, **options
        )
        assert result.statistics.acceptance_by_position == [1.0] * 4
        assert result.statistics.target_passes == -(-len(result.tokens) // 5)


@pytest.mark.parametrize("rule", [Rule.COUPLED, Rule.RATIO])
def test_draft_noise_is_keyed_as_the_contract_says(rule):
    params = [SamplingParams(temperature=0.9, top_k=5, seed=seed) for seed in (3, 4)]
    context = Batch(models("table")[0].config, [[1, 2, 3], [4]], params, rule=rule).context
    logits = torch.randn(2, toys.VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    filters = {"temperature": 0.9, "top_k": 5}
    seed, position = torch.tensor([3, 4]), torch.tensor([3, 1])
    for step in (0, 1, 5):
        tokens, probs = context.draw(logits, step)
        if rule == Rule.COUPLED:  # the target's own noise
            expected = ops.sample(logits, **filters, seed=seed, offset=position + step)
            assert probs is None
        else:
            expected = ops.sample(logits, **filters, seed=seed, offset=position, stream=Stream.DRAFT, node=step)
            assert torch.equal(probs, ops.target_probs(logits, **filters).probs)
        assert torch.equal(tokens, expected.tokens)


def test_bans_by_position_end_inside_a_draft():
    params = [SamplingParams(temperature=1.0, min_new_tokens=2, stop_ids=(5,))]
    context = Batch(toys.table().config, [[1, 2, 3]], params, rule=Rule.RATIO).context
    probs = [context.draw(torch.zeros(1, toys.VOCAB), step)[1] for step in range(4)]
    assert [row[0, 5].item() > 0 for row in probs] == [False, False, True, True]


def test_a_request_that_outgrows_the_draft_models_context_goes_on_without_drafts():
    target, draft = models("table")[0], noisy(models("table")[0], max_context=10)
    prompts = [[1, 2, 3], list(range(11))]
    expected = generate(target, prompts, max_new_tokens=20, ignore_eos=True)
    results = generate(target, prompts, method="speculative", draft_model=draft, max_new_tokens=20, ignore_eos=True)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert results[0].statistics.drafted > 0 and results[1].statistics.drafted == 0


def test_a_broken_draft_model_harms_nobody():
    target, draft = models("table")
    expected = generate(target, PROMPTS, max_new_tokens=10, **SAMPLED)
    broken = Broken(draft, marked=4, first=3)
    results = generate(target, PROMPTS, method=SmallModel(broken), max_new_tokens=10, **SAMPLED)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    results = generate(target, PROMPTS, method=SmallModel(broken), max_new_tokens=10, rule="ratio", **SAMPLED)
    assert all(result.finish_reason != "error" for result in results)


def test_own_drafter_needs_one_method():
    class Repeat(Drafter):
        """The last token again, once."""

        def propose(self, context, budget, stop):
            from fastdecode.testing.drafters import ragged

            return ragged(
                [row[n - 1 : n].tolist()[:most] for row, n, most in zip(context.array, context.host_lengths, budget)]
            )

    target, _ = models("table")
    expected = generate(target, PROMPTS, max_new_tokens=9)
    results = generate(target, PROMPTS, method=Repeat(), policy=ConfidenceStop(3, 0.5), max_new_tokens=9)
    assert [result.tokens for result in results] == [result.tokens for result in expected]


def test_float32_and_bfloat16_models_run_every_rule():
    for dtype in (torch.float32, torch.bfloat16):
        target = toys.native(dtype=dtype)
        for rule in ("coupled", "ratio"):
            result = generate(
                target, [1, 2], method="speculative", draft_model=models("native")[1], rule=rule, temperature=1.0
            )
            assert result.finish_reason == "length"
