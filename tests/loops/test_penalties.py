"""Penalties in generation: plain decoding applies them as defined, and no method gives other tokens or another law."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import toys

from fastdecode import ops
from fastdecode.drafters import Context, Drafter, PromptLookup, SmallModel
from fastdecode.generation import generate
from fastdecode.testing import chi_square_z
from fastdecode.testing.drafters import Known, Random
from fastdecode.testing.models import noisy
from fastdecode.testing.reference import logits as reference

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 5, 6], [0, 0], [9, 1, 9, 1, 9], [12], [3, 2, 1], [7, 7, 7, 7, 7, 7, 7, 7]]
NEW = [12, 25, 3, 1, 18, 25, 7, 30]
# requests 1, 4 and 7 have none; negative ones are legal, they reward
PENALTIES = {
    "repetition_penalty": [1.3, 1.0, 1.0, 0.8, 1.0, 2.0, 1.1, 1.0],
    "frequency_penalty": [0.0, 0.0, 0.3, 0.1, 0.0, -0.2, 0.4, 0.0],
    "presence_penalty": [0.0, 0.0, 0.7, 0.0, 0.0, 0.5, -0.3, 0.0],
}
SAMPLED = {"temperature": 0.7, "top_p": 0.95}
TARGETS = {"table": toys.table(eos_token_ids=(11,)), "native": toys.native()}
DRAFTS = {"table": noisy(TARGETS["table"]), "native": toys.native(noise=0.15)}


def of_request(row: int) -> dict[str, float]:
    return {name: values[row] for name, values in PENALTIES.items()}


def of_batch(batch: int) -> dict[str, list[float]]:
    return {name: values[:batch] for name, values in PENALTIES.items()}


def penalized(kind: str, text: list[int], prompt_length: int, row: int) -> torch.Tensor:
    """The row after `text`, by the reference."""
    model = TARGETS[kind]
    logits = model.forward(torch.tensor([text]), cache=model.new_cache(1, 64)).logits[0, -1]
    values = {name.removesuffix("_penalty"): float(np.float32(value)) for name, value in of_request(row).items()}
    return torch.from_numpy(
        reference.penalize_row(logits.numpy(), text[:prompt_length], text[prompt_length:], **values)
    )


def plain(kind: str, batch: int, options: dict[str, float]) -> list[list[int]]:
    """Every request on its own, so that batching is compared too."""
    return [
        generate(TARGETS[kind], PROMPTS[i], max_new_tokens=NEW[i], seeds=[i], **of_request(i), **options).tokens
        for i in range(batch)
    ]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["table", "native"])
def test_plain_decoding_applies_the_definition(kind, options):
    found = plain(kind, 8, options)
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, found)):
        text = list(prompt)
        for token in tokens:
            logits = penalized(kind, text, len(prompt), row)[None]
            if options:
                expected = ops.sample(logits, **options, seed=row, offset=len(text)).tokens.item()
            else:
                expected = logits.argmax().item()
            assert token == expected
            text.append(token)
    without = [
        generate(TARGETS[kind], PROMPTS[i], max_new_tokens=NEW[i], seeds=[i], **options).tokens for i in range(8)
    ]
    changed = [row for row in range(8) if found[row] != without[row]]
    assert not {1, 4, 7} & set(changed) and len(changed) >= 2


def drafter(name: str, kind: str, texts: list[list[int]]) -> Drafter:
    if name == "small-model":
        return SmallModel(DRAFTS[kind])
    if name == "prompt-lookup":
        return PromptLookup()
    return Random(toys.VOCAB) if name == "random" else Known(texts, toys.VOCAB, shift=int(name == "adversarial"))


@pytest.mark.parametrize("name", ["small-model", "prompt-lookup", "perfect", "random", "adversarial"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("kind", ["table", "native"])
def test_same_tokens_as_plain(kind, options, batch, length, name):
    expected = plain(kind, batch, options)
    results = generate(
        TARGETS[kind],
        PROMPTS[:batch],
        method=drafter(name, kind, [prompt + tokens for prompt, tokens in zip(PROMPTS, expected)]),
        draft_length=length,
        max_new_tokens=NEW[:batch],
        seeds=list(range(batch)),
        **of_batch(batch),
        **options,
    )
    assert [result.tokens for result in results] == expected
    for result in results:
        if name == "adversarial":
            assert result.statistics.accepted == 0
        if name == "perfect":  # every pass gives length + 1 tokens; only the last may fall short
            assert result.statistics.target_passes == -(-len(result.tokens) // (length + 1))


@pytest.mark.parametrize("options", [{}, SAMPLED, {**SAMPLED, "rule": "ratio"}], ids=["greedy", "coupled", "ratio"])
def test_the_draft_model_is_penalized_for_its_own_drafts(options, monkeypatch):
    """The target as its own draft model is always right; one that is not told of its drafts is wrong now and then."""

    def accepted() -> list[float]:
        results = generate(
            TARGETS["native"],
            PROMPTS[:6],
            method="speculative",
            draft_model=TARGETS["native"],
            draft_length=4,
            max_new_tokens=25,
            repetition_penalty=1.5,
            frequency_penalty=[0.8, 0.0, 0.8, 0.8, 0.0, 0.8],
            **options,
        )
        return results.statistics.acceptance_by_position

    assert accepted() == [1.0] * 4
    draw = Context.draw
    monkeypatch.setattr(Context, "draw", lambda self, logits, step, drafted=None: draw(self, logits, step))
    assert min(accepted()) < 0.9


@pytest.mark.parametrize("method", ["plain", "speculative"])
def test_logprobs_stay_those_of_the_model(method):
    options = {"method": method, **({"draft_model": DRAFTS["native"]} if method == "speculative" else {})}
    target = TARGETS["native"]
    results = generate(target, PROMPTS, max_new_tokens=NEW, logprobs=1, **PENALTIES, **options)
    below = 0
    for result in results:
        text = result.prompt_tokens + result.tokens
        rows = target.forward(torch.tensor([text]), cache=target.new_cache(1, 64)).logits[0].log_softmax(-1)
        rows = rows[len(result.prompt_tokens) - 1 : -1]
        own = rows.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
        assert result.logprobs == pytest.approx(own.tolist(), abs=1e-12)
        assert [top[0][0] for top in result.top_logprobs] == rows.argmax(-1).tolist()
        below += int((own < rows.max(-1).values).sum())
    assert below > 0  # penalties chose others than the model's likeliest


def test_a_requests_tokens_do_not_depend_on_the_penalties_of_others():
    alone = [generate(TARGETS["native"], PROMPTS[i], seeds=[i], max_new_tokens=20, **SAMPLED).tokens for i in (1, 4, 7)]
    for method in ("plain", PromptLookup(), SmallModel(DRAFTS["native"])):
        results = generate(
            TARGETS["native"],
            PROMPTS,
            method=method,
            seeds=list(range(8)),
            max_new_tokens=[20, 20, 2, 3, 20, 4, 1, 20],  # the others leave the batch first
            **PENALTIES,
            **SAMPLED,
        )
        assert [results[i].tokens for i in (1, 4, 7)] == alone


def test_float32_and_bfloat16_models():
    for dtype in (torch.float32, torch.bfloat16):
        target = toys.native(dtype=dtype)
        for options in ({}, SAMPLED, {**SAMPLED, "rule": "ratio"}):
            result = generate(
                target, [1, 2], method="speculative", draft_model=DRAFTS["native"], frequency_penalty=0.1, **options
            )
            assert result.finish_reason == "length"


# --- the ratio rule: in law -------------------------------------------------------------------------------------------

V, LENGTH, DRAWS, BATCH = 4, 3, 20_000, 2_000
PROMPT, STRONG = [1, 2], {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5}
SMALL = toys.table(V, order=2, seed=3)
TEMPERATURE = 0.8


def exact_law() -> np.ndarray:
    """P of every text of LENGTH tokens, by enumeration."""
    probs = np.ones((V,) * LENGTH)
    values = {name.removesuffix("_penalty"): float(np.float32(value)) for name, value in STRONG.items()}
    for text in itertools.product(range(V), repeat=LENGTH):
        for i, token in enumerate(text):
            row = SMALL.table[tuple([*PROMPT, *text[:i]][-2:])].log().numpy()
            weights = np.exp(reference.penalize_row(row, PROMPT, list(text[:i]), **values) / TEMPERATURE)
            probs[text] *= weights[token] / weights.sum()
    assert abs(probs.sum() - 1) < 1e-9
    return probs


def law_error(drafter: Drafter) -> float:
    """Chi-square of the ratio rule's texts against the law, as a normal deviate."""
    found = np.zeros((V,) * LENGTH)
    for first in range(0, DRAWS, BATCH):
        results = generate(
            SMALL,
            [PROMPT] * BATCH,
            method=drafter,
            rule="ratio",
            draft_length=2,
            temperature=TEMPERATURE,
            max_new_tokens=LENGTH,
            seeds=list(range(first, first + BATCH)),
            **STRONG,
        )
        for result in results:
            found[tuple(result.tokens)] += 1
    return chi_square_z(found.ravel(), exact_law().ravel())


@pytest.mark.parametrize(
    "drafter",
    [SmallModel(noisy(SMALL, noise=1.2)), Known([[*PROMPT, 0, 0, 0]] * BATCH, V)],
    ids=["small-model", "fixed"],
)
def test_law_is_that_of_plain_decoding(drafter):
    z = law_error(drafter)
    assert z < 4, f"z = {z:.1f}"


def test_rows_that_ignore_the_drafts_are_caught(monkeypatch):
    penalize = Context.penalize
    monkeypatch.setattr(Context, "penalize", lambda self, logits, drafted=None: penalize(self, logits))
    z = law_error(SmallModel(noisy(SMALL, noise=1.2)))
    assert z > 8, f"z = {z:.1f}: the negative control passes"
