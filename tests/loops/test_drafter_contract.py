"""What the loop makes of a drafter of the user's own: wrong ids are rejected, a broken draft is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import toys

from fastdecode.drafters import Context, Drafter, StopRule
from fastdecode.generation import generate
from fastdecode.testing.drafters import ragged
from fastdecode.testing.models import Broken
from fastdecode.types import Draft

TARGET = toys.table()
PROMPTS = [[1, 2], [3], [4, 5, 6]]


class Own(Drafter):
    """Proposes what a function of the context and the budget says."""

    def __init__(self, say: Callable[[Context, list[int]], object]) -> None:
        self.say = say

    def propose(self, context: Context, budget: list[int], stop: StopRule | None) -> Draft:
        return self.say(context, budget)  # type: ignore[return-value]


@pytest.mark.parametrize("model", [TARGET, toys.native()], ids=["table", "native"])
@pytest.mark.parametrize("wrong", [-1, -(2**63), toys.VOCAB, 2**62])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "rule": "ratio"}],
    ids=["greedy", "coupled", "ratio"],
)
def test_an_id_outside_the_vocabulary_is_rejected(model, wrong, options):
    for place in range(3):

        def say(context: Context, budget: list[int], place: int = place) -> Draft:
            chains = []
            for row, most in enumerate(budget):
                chain = [0, 0, 0][:most]
                if row == 1 and len(chain) > place:
                    chain[place] = wrong
                chains.append(chain)
            return ragged(chains)

        results = generate(model, PROMPTS, method=Own(say), draft_length=3, max_new_tokens=10, **options)
        assert [result.finish_reason for result in results] == ["length"] * 3
        assert all(0 <= token < toys.VOCAB for result in results for token in result.tokens)
        if options.get("rule") != "ratio":
            plain = generate(model, PROMPTS, max_new_tokens=10, **options)
            assert [result.tokens for result in results] == [result.tokens for result in plain]


def test_an_id_outside_the_vocabulary_before_a_broken_row():
    """-1 is also what an op reports for a row without an argmax: the two are not equal."""
    broken = Broken(TARGET, marked=1, first=3)
    result = generate(broken, [1, 2], method=Own(lambda context, budget: ragged([[-1, -1][: budget[0]]])))
    assert result.finish_reason == "error" and all(token >= 0 for token in result.tokens)


@pytest.mark.parametrize("rule", ["greedy", "coupled", "ratio"])
def test_any_strides_will_do(rule):
    """An expanded token, every other length, a transposed law: what a drafter writes without thinking."""
    law = torch.full((toys.VOCAB, 3, 2), 1 / toys.VOCAB, dtype=torch.float64).permute(2, 1, 0)

    def say(context: Context, budget: list[int], dense: bool) -> Draft:
        size = max(budget)
        tokens = context.tokens.gather(1, context.lengths[:, None].long() - 1).expand(-1, size)
        lens = torch.tensor([[most, 9] for most in budget], dtype=torch.int32)[:, 0]
        given = Draft(tokens, lens, law[: len(budget), :size] if rule == "ratio" else None)
        if not dense:
            return given
        probs = given.probs if given.probs is None else given.probs.contiguous()
        return Draft(tokens.contiguous(), lens.contiguous(), probs)

    options = {} if rule == "greedy" else {"temperature": 1.0, "rule": rule}
    strided, dense = (
        generate(TARGET, PROMPTS[:2], method=Own(lambda *a, d=d: say(*a, d)), draft_length=3, **options)
        for d in (False, True)
    )
    assert [result.tokens for result in strided] == [result.tokens for result in dense]


def draft(tokens: object = None, lens: object = None, probs: object = None) -> object:
    tokens = torch.zeros(1, 2, dtype=torch.int64) if tokens is None else tokens
    lens = torch.tensor([2], dtype=torch.int32) if lens is None else lens
    return Draft(tokens, lens, probs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (None, r"expected a Draft, got None"),
        (torch.zeros(1, 2), r"expected a Draft, got tensor"),
        (draft(tokens=[[1, 2]]), r"tokens: expected int64 \[1, K\], got \[\[1, 2\]\]"),
        (draft(tokens=torch.zeros(1, 2)), r"tokens: expected int64 \[1, 2\], got torch.float32 \[1, 2\]"),
        (draft(tokens=torch.zeros(2, dtype=torch.int64)), r"tokens: expected int64 \[1, K\], got torch.int64 \[2\]"),
        (
            draft(tokens=torch.zeros(2, 2, dtype=torch.int64)),
            r"tokens: expected int64 \[1, 2\], got torch.int64 \[2, 2\]",
        ),
        (draft(lens=[2]), r"lens: expected int32 \[1\], got \[2\]"),
        (draft(lens=torch.tensor([2])), r"lens: expected int32 \[1\], got torch.int64 \[1\]"),
        (draft(lens=torch.tensor([2, 2], dtype=torch.int32)), r"lens: expected int32 \[1\], got torch.int32 \[2\]"),
        (
            draft(lens=torch.tensor([-1], dtype=torch.int32)),
            r"lens: expected 0\.\.2 within the budget \[4\], got \[-1\]",
        ),
        (draft(lens=torch.tensor([3], dtype=torch.int32)), r"lens: expected 0\.\.2 within the budget \[4\], got \[3\]"),
        (
            draft(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([9], dtype=torch.int32)),
            r"lens: expected 0\.\.9 within the budget \[4\], got \[9\]",
        ),
        (
            draft(probs=torch.zeros(1, 2, 5)),
            r"probs: expected float64 or .* \[1, 2, 13\], got torch.float32 \[1, 2, 5\]",
        ),
    ],
)
def test_a_broken_draft_is_refused_by_the_name_of_the_drafter(broken, message):
    for options in ({}, {"temperature": 1.0, "rule": "ratio"}):
        with pytest.raises(ValueError, match=f"^Own.propose: {message}"):
            generate(TARGET, [1, 2], method=Own(lambda context, budget: broken), **options)


def test_a_drafter_with_propose_alone_sees_the_last_round():
    seen = []

    def say(context: Context, budget: list[int]) -> Draft:
        seen.append(context.last)
        return ragged([[0] * most for most in budget])

    result = generate(TARGET, [1, 2], method=Own(say), draft_length=2, max_new_tokens=8)
    assert seen[0] is None and len(seen) == result.statistics.target_passes
    text = []
    for last in seen[1:]:
        text += last.tokens[0, : int(last.num_committed)].tolist()
        accepted = int(last.num_accepted)
        # the row behind the last accepted draft chose the token after it
        assert last.output.logits[0, accepted].argmax() == last.tokens[0, accepted]
    assert text == result.tokens[: len(text)]
