"""Acceptance rules through generate: what block gains, and what the rules without a law do promise."""

from __future__ import annotations

import math

import pytest
import torch
import toys

from fastdecode.drafters import PromptLookup, SmallModel
from fastdecode.generation import generate
from fastdecode.methods import RULES
from fastdecode.testing.drafters import Known, Random
from fastdecode.testing.models import noisy

TARGET = toys.table(order=1, seed=2)
DRAFT = noisy(TARGET)
PROMPTS = [[i % toys.VOCAB, (5 * i + 1) % toys.VOCAB] for i in range(32)]
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


def run(rule: str, method: object = None, **options: object):
    return generate(
        TARGET, PROMPTS, method=method or SmallModel(DRAFT), rule=rule, draft_length=5, max_new_tokens=40, **options
    )


def rows(text: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Logits before every token of `text` but the first, over the temperature."""
    logits = TARGET.forward(torch.tensor([text]), cache=TARGET.new_cache(1, 64)).logits[0, :-1]
    return logits / temperature


def test_block_keeps_more_than_ratio():
    ratio, block = (run(rule, **SAMPLED).statistics.tokens_per_pass for rule in ("ratio", "block"))
    assert 1.5 < ratio < block


@pytest.mark.parametrize("rule", ["ratio", "block", "typical", "top_beta"])
def test_tokens_do_not_depend_on_the_batch(rule):
    options = {} if rule == "top_beta" else SAMPLED
    together = run(rule, seeds=list(range(32)), **options)
    for i in (0, 13, 31):
        alone = generate(
            TARGET,
            PROMPTS[i],
            method=SmallModel(DRAFT),
            rule=rule,
            draft_length=5,
            max_new_tokens=40,
            seeds=[i],
            **options,
        )
        assert alone.tokens == together[i].tokens


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.greedy_guarantee == "exact"])
def test_greedy_decoding_is_exact(rule):
    expected = [result.tokens for result in generate(TARGET, PROMPTS, max_new_tokens=40)]
    for method in (SmallModel(DRAFT), PromptLookup(), Random(toys.VOCAB)):
        assert [result.tokens for result in run(rule, method)] == expected
        # a bias makes the requests greedy by their filters instead
        assert [result.tokens for result in run(rule, method, bias={0: 0.0})] == expected


@pytest.mark.parametrize("parameters", [{}, {"eps": 0.3, "delta": 0.6}], ids=["defaults", "strict"])
def test_typical_emits_what_clears_its_threshold(parameters):
    """And nothing else: tokens of a draft and the last ones alike, but for the likeliest, which is always typical."""
    eps, delta = parameters.get("eps", 0.09), parameters.get("delta", 0.3)

    def unlikely(results) -> int:
        count = 0
        for result in results:
            text = result.prompt_tokens + result.tokens
            law = rows(text, 0.8).softmax(-1)[len(result.prompt_tokens) - 1 :]
            entropy = -(law * law.log()).sum(-1)
            threshold = torch.minimum(torch.tensor(eps), delta * torch.exp(-entropy))
            chosen = law.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
            count += int(((chosen <= threshold) & (chosen < law.max(-1).values)).sum())
        return count

    for method in (SmallModel(DRAFT), PromptLookup(), Random(toys.VOCAB)):
        results = run("typical", method, temperature=0.8, **parameters)
        assert unlikely(results) == 0
        assert results[0].tokens != run("typical", method, temperature=0.8, seed=1, **parameters)[0].tokens
    assert unlikely(generate(TARGET, PROMPTS, max_new_tokens=40, temperature=0.8)) > 10


def test_typical_keeps_more_than_ratio():
    assert run("typical", temperature=0.8).statistics.accepted > run("ratio", temperature=0.8).statistics.accepted


def test_top_beta_stays_near_the_best():
    def far(results, beta: int, tau: float) -> int:
        count = 0
        for result in results:
            logits = rows(result.prompt_tokens + result.tokens)[len(result.prompt_tokens) - 1 :]
            chosen = logits.gather(1, torch.tensor(result.tokens)[:, None])
            gap, rank = logits.max(-1).values - chosen[:, 0], (logits > chosen).sum(-1)
            count += int(((gap > tau) | (rank >= beta)).sum())
        return count

    plain = generate(TARGET, PROMPTS, max_new_tokens=40)
    for beta, tau in ((3, 1.0), (2, 0.5), (5, 0.2)):
        for method in (SmallModel(DRAFT), Random(toys.VOCAB)):
            results = run("top_beta", method, beta=beta, tau=tau)
            assert far(results, beta, tau) == 0
        assert far(run("top_beta", Random(toys.VOCAB), beta=toys.VOCAB, tau=9.0), beta, tau) > 10
    assert run("top_beta").statistics.accepted > run("ratio").statistics.accepted
    for options in ({"beta": 1}, {"tau": 0.0}):
        assert [result.tokens for result in run("top_beta", **options)] == [result.tokens for result in plain]


def test_top_beta_obeys_bans_and_minimal_lengths():
    free = run("top_beta", stop_ids=[3])
    assert any(result.finish_reason == "stop" for result in free)
    for result in run("top_beta", stop_ids=[3], min_new_tokens=9, ban_ids=[5]):
        assert 3 not in result.tokens[:9] and 5 not in result.tokens


@pytest.mark.parametrize("rule", ["coupled", "ratio", "block", "top_beta"])
def test_the_target_as_its_own_draft_model_is_always_kept(rule):
    options = {} if rule == "top_beta" else SAMPLED  # typical may find the target's own draws unlikely
    assert run(rule, SmallModel(TARGET), **options).statistics.acceptance_by_position == [1.0] * 5


@pytest.mark.parametrize("rule", list(RULES))
def test_penalties_and_narrow_models(rule):
    for dtype in (torch.float32, torch.bfloat16):
        target = toys.native(dtype=dtype)
        options = {} if rule == "top_beta" else SAMPLED
        for method in (SmallModel(toys.native(noise=0.15)), Known([[1, 2] * 30], toys.VOCAB)):
            result = generate(target, [1, 2], method=method, rule=rule, frequency_penalty=0.1, **options)
            assert result.finish_reason == "length" and len(result.tokens) == 62


def test_the_table_of_rules():
    assert list(RULES) == ["coupled", "ratio", "block", "typical", "top_beta"]
    for name, rule in RULES.items():
        assert rule.name == name == rule.number.name.lower()
        assert rule.parameters.keys() == rule.ranges.keys()
        for parameter, value in rule.parameters.items():
            low, high = rule.ranges[parameter]
            assert low <= value <= high < math.inf
