"""The references are right by themselves: exact laws through them, and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import chain_law
from chain_law import EXACT, VISIBLE, Drafter, Target
from fastdecode.testing.reference import sample, verify

MAPPED = Drafter(to_target=(2, -1, 0))


# ----------------------------------------------------------------------------------------------------------------------
# Laws of the rules


@pytest.mark.parametrize("rule", ["ratio", "block"])
@pytest.mark.parametrize("drafter", [Drafter(), MAPPED], ids=["same ids", "mapped"])
def test_rules_keep_the_law(rule, drafter):
    target = Target(filters={"temperature": 0.8, "typical_p": 0.9}, seed=2)
    assert chain_law.speculative_error(verify.verify_chain, target, drafter, rule=rule) < EXACT
    assert chain_law.speculative_error(verify.verify_chain, target, drafter, rule=rule, flat=True) < EXACT
    assert max(chain_law.single_errors(verify.verify_chain, target, drafter, length=1, rule=rule)) < EXACT


def test_block_may_stop_where_earlier_drafts_say():
    lens = lambda x: 1 if x[0] == 2 else 2  # noqa: E731
    assert chain_law.speculative_error(verify.verify_chain, Target(), rule="block", lens=lens) < EXACT


@pytest.mark.parametrize("rule", ["ratio", "block"])
def test_wrong_draft_probs_are_seen(rule):
    wrong = lambda q: q**1.3 / (q**1.3).sum()  # noqa: E731
    assert chain_law.speculative_error(verify.verify_chain, Target(), rule=rule, given=wrong) > VISIBLE


def test_block_keeps_more_drafts():
    pair = (verify.verify_chain, Target(seed=1), Drafter(seed=11))
    ratio, block = (chain_law.expected_accepted(*pair, rule=rule) for rule in ("ratio", "block"))
    assert block > ratio + 1e-4


def test_block_example_of_the_paper():
    """Sun et al. 2024, section 2: two ids, independent tokens, target (1/3, 2/3), drafter (2/3, 1/3), two drafts: the
    ratio rule keeps 10/9 in the mean, block verification 11/9, which no verification beats."""

    def logits(b: int, n: int, law: tuple[float, float]) -> torch.Tensor:
        return torch.tensor(law, dtype=torch.float64).expand(b, n, 2)

    drafts = [(a, b) for a in range(2) for b in range(2)]
    target, drafter = (1 / 3, 2 / 3), (2 / 3, 1 / 3)
    for rule, mean in (("ratio", 10 / 9), ("block", 11 / 9)):
        laws = chain_law.law_of(
            verify.verify_chain,
            drafts,
            rule=rule,
            draft_probs=logits(4, 2, drafter),
            target_probs=logits(4, 3, target),
        )
        kept = sum(
            drafter[a] * drafter[b] * p * (sum(t >= 0 for t in tokens) - 1)
            for (a, b), law in zip(drafts, laws)
            for tokens, p in law.items()
        )
        assert kept == pytest.approx(mean, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Filters by hand


def kept(probs: list[float], **filters: object) -> list[int]:
    row = sample.law(np.log(np.array(probs)), sample.Filters(**filters))
    return np.flatnonzero(row.weights > 0).tolist()


def test_typical_by_hand():
    """p = .5 .2 .2 .1: H = 1.2206, surprises .6931 1.6094 1.6094 2.3026: 1 and 2 are .3888 away, 0 .5275, 3 1.082."""
    probs = [0.5, 0.2, 0.2, 0.1]
    for mass, want in (
        (1.0, [0, 1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (0.85, [0, 1, 2]),
        (0.5, [0, 1, 2]),
        (0.35, [1, 2]),
        (0.15, [1]),
        (0.0, [1]),
        (-1.0, [1]),
    ):
        assert kept(probs, typical_p=mass) == want, mass
    assert kept(probs, typical_p=0.3, temperature=0.0) == [0]
    assert kept(probs, typical_p=0.3, top_k=1) == [0]


def test_joint_by_hand():
    """p = .4 .3 .2 .1: after top-k 2 the first id alone holds .57 of what is left, before it two ids hold .5."""
    probs = [0.4, 0.3, 0.2, 0.1]
    assert kept(probs, top_k=2, top_p=0.5) == [0]
    assert kept(probs, top_k=2, top_p=0.5, order="joint") == [0, 1]
    assert kept(probs, top_k=1, top_p=0.5, order="joint") == [0]
    assert kept(probs, top_k=2, top_p=0.95, order="joint") == [0, 1]


def test_bitmask_by_hand():
    logits = np.zeros(40)
    words = np.array([-(2**31) + 5, 0x7FFFFF02], dtype=np.int32)  # ids 0, 2, 31, 33; 64 and up do not exist here
    row = sample.law(logits, sample.Filters(bitmask=words))
    assert np.flatnonzero(row.weights).tolist() == [0, 2, 31, 33]
    logits[5] = np.nan
    assert sample.law(logits, sample.Filters(bitmask=words)).status == 1
    nothing = sample.law(np.zeros(40), sample.Filters(bitmask=np.array([0, 256 - 2**31], dtype=np.int32)))
    assert nothing.status == 2


# ----------------------------------------------------------------------------------------------------------------------
# Lossy rules by hand


def test_typical_acceptance_by_hand():
    """p = .5 .25 .25: H = 1.0397, exp(-H) = .3536: with delta .8 the threshold is .2828, with eps .2 it is .2."""
    probs = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]], dtype=torch.float64)

    def run(draft: int, **options: object) -> tuple[list[int], int]:
        out = verify.verify_chain(torch.tensor([[draft]]), target_probs=probs, rule="typical", **options)
        return out.tokens[0].tolist(), int(out.num_accepted[0])

    assert run(0, eps=1.0, delta=0.8) == ([0, 2], 1)
    assert run(1, eps=1.0, delta=0.8) == ([0, -1], 0)
    assert run(1, eps=0.2, delta=0.8) == ([1, 2], 1)
    assert run(1, eps=1.0, delta=0.7) == ([1, 2], 1)
    assert run(0, eps=1.0, delta=0.8, emit_bonus=False) == ([0, -1], 1)
    half = {"bonus": "sample", "eps": 0.2, "delta": 0.8}
    for uniform, token in ((0.0, 0), (0.49, 0), (0.51, 1), (0.8, 2)):
        uniforms = torch.tensor([[0.0, uniform]], dtype=torch.float64)
        assert run(5, uniforms=uniforms, **half) == ([token, -1], 0)


def test_top_beta_by_hand():
    logits = torch.tensor([[[1.0, 3.0, 2.5, 3.0], [0.0, 1.0, -torch.inf, 0.5]]])

    def accepted(draft: int, **options: object) -> int:
        out = verify.verify_chain(torch.tensor([[draft]]), target_logits=logits, rule="top_beta", **options)
        assert out.tokens[0].tolist() == ([draft, 1] if out.num_accepted[0] else [1, -1])
        return int(out.num_accepted[0])

    assert [accepted(x) for x in range(4)] == [0, 1, 0, 0]  # ids 1 and 3 tie: the lower one is the best
    assert [accepted(x, beta=2) for x in range(4)] == [0, 1, 0, 1]
    assert [accepted(x, beta=4) for x in range(4)] == [0, 1, 0, 1]
    assert [accepted(x, beta=4, tau=0.5) for x in range(4)] == [0, 1, 1, 1]
    assert [accepted(x, beta=3, tau=9.0) for x in range(4)] == [0, 1, 1, 1]
    forbidden = {"bitmask": torch.tensor([[0b1010]], dtype=torch.int32)}
    assert [accepted(x, beta=4, tau=np.inf, **forbidden) for x in range(4)] == [0, 1, 0, 1]


def test_rows_that_do_not_fit():
    logits = torch.zeros(5, 3)
    starts = [[0, 2, 5], [0, 1, 5], [0, 6, 5], [-1, 2, 5], [3, 2, 5]]
    status = [
        verify.verify_chain(
            torch.zeros(2, 1, dtype=torch.int64), target_logits=logits, rule="top_beta", row_start=torch.tensor(start)
        ).status.tolist()
        for start in starts
    ]
    assert status == [[0, 0], [32, 0], [32, 32], [32, 0], [32, 0]]
