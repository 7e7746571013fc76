"""Ratio and block keep the law of plain sampling, through the whole loop; a drafter that breaks it is caught."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import toys
from torch import Tensor

from fastdecode import Stream, ops
from fastdecode.drafters import Context, Drafter, PromptLookup, SmallModel
from fastdecode.generation import generate
from fastdecode.policies import ConfidenceStop
from fastdecode.testing import chi_square_z
from fastdecode.testing.drafters import Discarding, Known
from fastdecode.testing.models import noisy

RULES = ["ratio", "block"]
V, NEW, DRAWS, BATCH = 4, 3, 20_000, 2_000
PROMPT = [1, 2]
TARGET = toys.table(V, order=2, seed=3)
DRAFT = noisy(TARGET, noise=1.2)


def exact_law(temperature: float, min_new: int, eos: int | None) -> np.ndarray:
    """P of every text of NEW tokens, by enumeration; EOS is absorbing (texts are filled up with it)."""
    probs = np.zeros((V,) * NEW)
    for text in itertools.product(range(V), repeat=NEW):
        history, p, ended = list(PROMPT), 1.0, False
        for position, token in enumerate(text):
            if ended:
                p *= token == eos
                continue
            row = TARGET.table[tuple(history[-2:])].numpy() ** (1 / temperature)
            if eos is not None and position < min_new:
                row[eos] = 0
            p *= row[token] / row.sum()
            history.append(token)
            ended = token == eos
        probs[text] = p
    assert abs(probs.sum() - 1) < 1e-9
    return probs


def counts(
    drafter: Drafter, length: int, temperature: float, rule: str, draws: int = DRAWS, **options: object
) -> np.ndarray:
    eos = options.get("stop_ids", [None])[0]  # type: ignore[index]
    found = np.zeros((V,) * NEW)
    for first in range(0, draws, BATCH):
        results = generate(
            TARGET,
            [PROMPT] * BATCH,
            method=drafter,
            rule=rule,
            draft_length=None if "policy" in options else length,
            temperature=temperature,
            max_new_tokens=NEW,
            seeds=list(range(first, first + BATCH)),
            **options,
        )
        for result in results:
            found[tuple(result.tokens + [eos] * (NEW - len(result.tokens)))] += 1
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "drafter",
    [SmallModel(DRAFT), PromptLookup(), Known([[*PROMPT, 0, 1, 2]] * BATCH, V)],
    ids=["small-model", "prompt-lookup", "fixed"],
)
def test_law_is_the_targets(drafter, rule):
    z = chi_square_z(counts(drafter, 2, 0.8, rule).ravel(), exact_law(0.8, 0, None).ravel())
    assert z < 4, f"z = {z:.1f}"


@pytest.mark.parametrize("rule", RULES)
def test_law_with_stopping_by_confidence(rule):
    found = counts(SmallModel(DRAFT), 3, 1.0, rule, policy=ConfidenceStop(3, 0.5))
    z = chi_square_z(found.ravel(), exact_law(1.0, 0, None).ravel())
    assert z < 4, f"z = {z:.1f}"


@pytest.mark.parametrize("rule", RULES)
def test_law_with_an_end_that_is_banned_for_two_tokens(rule):
    found = counts(SmallModel(DRAFT), 2, 1.0, rule, stop_ids=[3], min_new_tokens=2)
    z = chi_square_z(found.ravel(), exact_law(1.0, 2, 3).ravel())
    assert z < 4, f"z = {z:.1f}"


@pytest.mark.parametrize("rule", RULES)
def test_taking_drawn_tokens_back_is_caught(rule):
    z = chi_square_z(counts(Discarding(DRAFT), 2, 1.0, rule).ravel(), exact_law(1.0, 0, None).ravel())
    assert z > 8, f"z = {z:.1f}: the negative control passes"


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_draft_noise_keyed_by_position_is_caught_under_block(rule, monkeypatch):
    """Block judges all drafts before it rejects the first, so a position that is drafted again needs other noise."""

    def draw(context: Context, logits: Tensor, step: int, drafted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = {"temperature": context.filters.temperature, "active": context.active}
        position = context.offset + step
        drawn = ops.sample(logits, **options, seed=context.seeds, offset=position, stream=Stream.DRAFT)
        return drawn.tokens, ops.target_probs(logits, **options).probs

    monkeypatch.setattr(Context, "draw", draw)
    found = counts(SmallModel(DRAFT), 3, 1.0, rule, draws=10 * DRAWS)
    z = chi_square_z(found.ravel(), exact_law(1.0, 0, None).ravel())
    assert z > 8 if rule == "block" else z < 4, f"z = {z:.1f}"
