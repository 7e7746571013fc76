"""Rules "typical" and "top_beta" of verify_chain: they change the law, as test_verify_chain_law.py sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdecode
from chain_inputs import MARGIN, NEW_FILTERS, compare, random_inputs, uniforms
from fastdecode.testing import exact_law
from fastdecode.testing.reference import verify as reference
from support import DTYPES, assert_same, check_op, compute_dtype, generator, raises, same_bits, views

SHAPES = [(40, 3, 5), (10, 0, 7), (20, 1, 1), (20, 2, 2), (8, 5, 17), (8, 4, 65), (6, 3, 257), (4, 2, 2049)]
TYPICAL = {
    "probs": ("target_probs", "draft_lens", "eps", "delta"),
    "logits": ("target_logits", "draft_lens", "eps", "delta"),
    "filtered": ("target_logits", "draft_lens", "eps", "delta", *NEW_FILTERS),
}
BONUS = {"greedy": (), "sample by uniforms": ("uniforms",), "sample by seed": ("seed", "offset")}
TOP_BETA = {
    "plain": ("target_logits", "draft_lens", "beta", "tau"),
    "masked": ("target_logits", "draft_lens", "beta", "tau", "bitmask"),
}


def typical(inputs: dict, mode: str, bonus: str = "greedy") -> dict:
    names = ("draft_tokens", *TYPICAL[mode], *BONUS[bonus])
    return {k: inputs[k] for k in names} | {"rule": "typical", "bonus": bonus.split()[0]}


def top_beta(inputs: dict, mode: str) -> dict:
    return {k: inputs[k] for k in ("draft_tokens", *TOP_BETA[mode])} | {"rule": "top_beta"}


def every_call(inputs: dict) -> dict[str, dict]:
    calls = {f"typical, {mode}, {bonus}": typical(inputs, mode, bonus) for mode in TYPICAL for bonus in BONUS}
    return calls | {f"top_beta, {mode}": top_beta(inputs, mode) for mode in TOP_BETA}


CALLS = list(every_call(random_inputs(1, 1, 2, torch.float32, seed=0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_equals_reference(ops, name, dtype):
    skipped = compared = accepted = 0
    tolerance = 0 if name.startswith("top_beta") else MARGIN[compute_dtype(dtype)]  # logits are compared as they are
    for batch, longest, vocab_size in SHAPES:
        inputs = random_inputs(batch, longest, vocab_size, dtype, seed=41)
        inputs["draft_tokens"][1::9] = vocab_size
        for emit_bonus in (True, False):
            chosen = every_call(inputs)[name] | {"emit_bonus": emit_bonus}
            got, want = ops.verify_chain(**chosen), reference.verify_chain(**chosen)
            skipped += compare(got, want, tolerance, f"{batch, longest, vocab_size}")
            accepted, compared = accepted + int(got.num_accepted.sum()), compared + batch
    assert skipped <= 0.05 * compared
    assert accepted > 0.2 * compared


def entropy(probs: Tensor) -> Tensor:
    return -torch.where(probs > 0, probs * probs.log(), 0).sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Typical


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5}, {"top_k": 6, "top_p": 0.9}], ids=str)
def test_what_is_accepted_clears_the_threshold_and_what_is_rejected_does_not(ops, filters):
    inputs = random_inputs(300, 4, 11, torch.float64, seed=42)
    chosen = typical(inputs, "logits")
    out = ops.verify_chain(**chosen, **filters)
    probs = ops.target_probs(inputs["target_logits"], **filters).probs
    threshold = torch.minimum(
        inputs["eps"].double()[:, None], inputs["delta"].double()[:, None] * (-entropy(probs)).exp()
    )
    drafted = probs[:, :4].gather(2, inputs["draft_tokens"][..., None])[..., 0]
    used = torch.arange(4) < inputs["draft_lens"][:, None]
    clears = (drafted > threshold[:, :4]) & used
    assert torch.equal(out.num_accepted, clears.int().cumprod(1).sum(1).int())
    assert 0.2 < (out.num_accepted / inputs["draft_lens"].clamp(min=1)).mean() < 0.9
    at = out.num_accepted.long()[:, None]
    assert torch.equal(out.tokens.gather(1, at)[:, 0], probs.argmax(-1).gather(1, at)[:, 0])
    assert torch.equal(out.num_emitted, out.num_accepted + 1)


@pytest.mark.parametrize("bonus", ["greedy", "sample by uniforms", "sample by seed"])
def test_cold_rows_are_greedy(ops, bonus):
    inputs = random_inputs(60, 3, 9, torch.float32, seed=43)
    best = inputs["target_logits"].argmax(-1)
    draft = best[:, :3].clone()
    draft[::3, 1] = (draft[::3, 1] + 1) % 9
    want = ops.verify_chain_greedy(draft, best, inputs["draft_lens"])
    for temperature in (0.0, 1e-4):
        chosen = typical(inputs, "logits", bonus) | {"draft_tokens": draft, "temperature": temperature, "eps": 0.5}
        assert_same(tuple(want), tuple(ops.verify_chain(**chosen | {"delta": 0.9})), f"{temperature}")


@pytest.mark.parametrize("vocab_size", [2, 8, 1000])
def test_uniform_rows_accept_everything_below_delta_one(ops, vocab_size):
    """H = ln V, exp(-H) = 1 / V = p: accepted iff 1 > delta, as long as eps does not decide."""
    probs = torch.full((3, 3, vocab_size), 1 / vocab_size, dtype=torch.float64)
    draft = torch.randint(vocab_size, (3, 2), generator=generator(1, vocab_size))
    delta = torch.tensor([0.3, 0.99, 1.01])
    out = ops.verify_chain(draft, target_probs=probs, rule="typical", eps=1.0, delta=delta)
    assert out.num_accepted.tolist() == [2, 2, 0]
    assert out.tokens[:2, 2].tolist() == [0, 0] and out.tokens[2].tolist() == [0, -1, -1]
    small_eps = ops.verify_chain(draft, target_probs=probs, rule="typical", eps=0.9 / vocab_size, delta=delta)
    assert small_eps.num_accepted.tolist() == [2, 2, 2]


def test_one_hot_rows_accept_their_mode_only(ops):
    probs = torch.zeros(4, 2, 4)
    probs[:, 0, 2] = probs[:, 1, 1] = 1
    out = ops.verify_chain(torch.arange(4)[:, None], target_probs=probs, rule="typical")
    assert out.num_accepted.tolist() == [0, 0, 1, 0]
    assert out.tokens.tolist() == [[2, -1], [2, -1], [2, 1], [2, -1]]


def test_typical_defaults(ops):
    inputs = random_inputs(100, 3, 17, torch.float64, seed=44)
    chosen = {k: inputs[k] for k in ("draft_tokens", "target_logits")}
    default = ops.verify_chain(**chosen, rule="typical")
    assert_same(tuple(default), tuple(ops.verify_chain(**chosen, rule="typical", eps=0.09, delta=0.3, bonus="greedy")))
    by_enum = {"rule": fastdecode.Rule.TYPICAL, "bonus": fastdecode.Bonus.GREEDY}
    assert_same(tuple(default), tuple(ops.verify_chain(**chosen, **by_enum)))
    tensors = {"eps": torch.full((100,), 0.09), "delta": torch.full((100,), 0.3)}
    assert_same(tuple(default), tuple(ops.verify_chain(**chosen, **tensors, rule="typical")))
    higher = ops.verify_chain(**chosen, rule="typical", eps=0.5, delta=0.9)
    lower = ops.verify_chain(**chosen, rule="typical", eps=0.01)
    assert (lower.num_accepted >= default.num_accepted).all() and (default.num_accepted >= higher.num_accepted).all()
    assert lower.num_accepted.sum() > default.num_accepted.sum() > higher.num_accepted.sum()


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_sampled_bonus_follows_the_truncated_row(ops, mode):
    """Exactly, by bisection: after a rejection at row 0, after full acceptance in row 1."""
    g = np.random.default_rng(3)
    logits = 0.8 * g.normal(size=(2, 2, 6))
    probs = np.exp(logits)
    probs /= probs.sum(-1, keepdims=True)
    worst, best = int(probs[0, 0].argmin()), int(probs[1, 0].argmax())
    draft = torch.tensor([[worst], [best]])
    target = {f"target_{mode}": torch.from_numpy(probs if mode == "probs" else logits)}
    settings = {"eps": 0.15, "delta": 0.8, "bonus": "sample", "rule": "typical"}

    def outcome(case: np.ndarray, u: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.concatenate([np.full_like(u, 0.5), u], 1))
        rows = {k: t[case] for k, t in target.items()}
        return ops.verify_chain(draft[case], uniforms=given, **rows, **settings).tokens.numpy()

    for b, law in enumerate(exact_law(outcome, 1, 2)):
        row = probs[b, b]
        threshold = min(np.float32(0.15), np.float32(0.8) * np.exp((row * np.log(row)).sum()))
        left = np.where((row > threshold) | (row == row.max()), row, 0)
        left /= left.sum()
        assert 2 <= (left > 0).sum() < 6
        want = {((best, v) if b else (v, -1)): p for v, p in enumerate(left) if p > 0}
        assert law.keys() == want.keys() and max(abs(law[k] - want[k]) for k in want) < 1e-12


def test_most_likely_id_stays_where_no_id_clears(ops):
    """delta above 1: nothing clears a flat row, and the draw is the lowest of the most likely ids."""
    probs = torch.tensor([[[0.25] * 4] * 2, [[0.2, 0.4, 0.4, 0.0]] * 2], dtype=torch.float64)
    for random in ({"uniforms": uniforms([0.5, 0.9], [0.5, 0.9])}, {"seed": 3, "offset": 5}):
        options = {"rule": "typical", "eps": 1.0, "delta": 1.6, "bonus": "sample"}
        out = ops.verify_chain(torch.tensor([[3], [0]]), target_probs=probs, **options, **random)
        assert out.tokens.tolist() == [[0, -1], [1, -1]]


@pytest.mark.parametrize("draft", range(5))
def test_acceptance_under_the_typical_filter(ops, draft):
    """p = .5 .2 .2 .1: typical_p .35 leaves ids 1 and 2 at a half each, so the likeliest id of the row is out.

    exp(-H) = .5: at delta .3 both clear the threshold, at delta 1.5 none does, and the first of them stays.
    """
    row = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log().expand(1, 2, 4)
    chosen = {"target_logits": row, "rule": "typical", "typical_p": 0.35, "eps": 1.0}
    drafts, accepted = torch.tensor([[draft]]), draft in (1, 2)
    out = ops.verify_chain(drafts, **chosen, delta=0.3)
    assert out.tokens.tolist() == [[draft, 1] if accepted else [1, -1]]
    for u, token in ((0.0, 1), (0.49, 1), (0.51, 2)):
        random = {"bonus": "sample", "uniforms": uniforms([0.5, u])}
        out = ops.verify_chain(drafts, **chosen, delta=0.3, **random)
        assert out.tokens.tolist() == [[draft, token] if accepted else [token, -1]]
        assert ops.verify_chain(drafts, **chosen, delta=1.5, **random).tokens.tolist() == [[1, -1]]
    for seed in range(5):
        out = ops.verify_chain(drafts, **chosen, delta=1.5, bonus="sample", seed=seed, offset=0)
        assert out.tokens.tolist() == [[1, -1]]


# ----------------------------------------------------------------------------------------------------------------------
# Top-beta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beta_one_or_tau_zero_is_greedy(ops, dtype):
    for vocab_size in (2, 9, 300):
        inputs = random_inputs(60, 3, vocab_size, dtype, seed=45)
        inputs["target_logits"] = inputs["target_logits"].double().round().to(dtype)  # many ties
        best = inputs["target_logits"].double().argmax(-1)
        draft = best[:, :3].clone()
        draft[::3, 1] = (draft[::3, 1] + 1) % vocab_size
        want = ops.verify_chain_greedy(draft, best, inputs["draft_lens"])
        chosen = {"target_logits": inputs["target_logits"], "draft_lens": inputs["draft_lens"], "rule": "top_beta"}
        for slack in ({}, {"beta": 1, "tau": 0.0}, {"beta": 1, "tau": 100.0}):
            assert_same(tuple(want), tuple(ops.verify_chain(draft, **chosen, **slack)), f"{slack}")
        ties = ops.verify_chain(draft, **chosen, beta=vocab_size, tau=0.0)
        value = inputs["target_logits"].double()
        tied = value[:, :3].gather(2, draft[..., None])[..., 0] == value[:, :3].amax(-1)
        used = torch.arange(3) < inputs["draft_lens"][:, None]
        assert torch.equal(ties.num_accepted, (tied & used).int().cumprod(1).sum(1).int())


def test_more_slack_accepts_more(ops):
    inputs = random_inputs(300, 4, 30, torch.float32, seed=46, noise=1.5)
    chosen = {k: inputs[k] for k in ("draft_tokens", "target_logits", "draft_lens")} | {"rule": "top_beta"}
    before = None
    for beta, tau in ((1, 0.0), (2, 0.5), (2, 2.0), (5, 2.0), (30, 9.0)):
        count = ops.verify_chain(**chosen, beta=beta, tau=tau).num_accepted
        if before is not None:
            assert (count >= before).all() and count.sum() > before.sum(), (beta, tau)
        before = count
    everything = ops.verify_chain(**chosen, beta=30, tau=torch.inf)
    assert torch.equal(everything.num_accepted, inputs["draft_lens"])


def test_what_top_beta_accepts(ops):
    """Rank below beta by logit, ties by lowest id, and a logit at most tau below the best one."""
    inputs = random_inputs(200, 3, 12, torch.float32, seed=47)
    inputs["target_logits"] = (2 * inputs["target_logits"]).round() / 2
    draft, logits = inputs["draft_tokens"], inputs["target_logits"][:, :3]
    out = ops.verify_chain(**top_beta(inputs, "plain") | {"target_logits": inputs["target_logits"]})
    ranks = logits.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    rank = ranks.gather(2, draft[..., None])[..., 0]
    gap = logits.amax(-1) - logits.gather(2, draft[..., None])[..., 0]
    used = torch.arange(3) < inputs["draft_lens"][:, None]
    good = (rank < inputs["beta"][:, None]) & (gap <= inputs["tau"][:, None]) & used
    assert torch.equal(out.num_accepted, good.int().cumprod(1).sum(1).int())
    at = out.num_accepted.long()[:, None]
    assert torch.equal(out.tokens.gather(1, at), inputs["target_logits"].argmax(-1).gather(1, at))


def test_forbidden_ids_are_never_accepted(ops):
    logits = torch.tensor([[[1.0, 3.0, 2.5, -torch.inf], [0.0, 1.0, 0.0, 0.0]]]).expand(4, 2, 4)
    slack = {"rule": "top_beta", "beta": 4, "tau": torch.inf}
    draft = torch.arange(4)[:, None]
    for forbid in (
        {"bitmask": torch.tensor([0b1101], dtype=torch.int32)},
        {"ban_ids": torch.tensor([1])},
        {"bias": torch.tensor([0.0, -torch.inf, 0.0, 0.0])},
    ):
        out = ops.verify_chain(draft, target_logits=logits, **slack, **forbid)
        assert out.num_accepted.tolist() == [1, 0, 1, 0]
        assert out.tokens.tolist() == [[0, 0], [2, -1], [2, 0], [2, -1]]
    biased = ops.verify_chain(
        draft, target_logits=logits, bias=torch.tensor([2.5, 0.0, 0.0, 0.0]), rule="top_beta", beta=2, tau=0.5
    )
    assert biased.num_accepted.tolist() == [1, 1, 0, 0] and biased.tokens[:, 0].tolist() == [0, 1, 0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Both


def needed_rows(out, lens: Tensor) -> Tensor:
    """Bool [B, K + 1]: rows up to the one that gave the last token."""
    return torch.arange(out.tokens.shape[1]) <= out.num_accepted[:, None]


@pytest.mark.parametrize("name", CALLS)
def test_unused_rows_are_not_read(ops, name):
    inputs = random_inputs(30, 4, 17, torch.float32, seed=48)
    chosen = every_call(inputs)[name]
    clean = ops.verify_chain(**chosen)
    unread = ~needed_rows(clean, inputs["draft_lens"])
    poisoned = dict(chosen)
    for target in ("target_logits", "target_probs"):
        if target in chosen:
            poisoned[target] = chosen[target].masked_fill(unread[..., None], torch.nan)
    poisoned["draft_tokens"] = chosen["draft_tokens"].masked_fill(unread[:, :4], 2**40)
    assert_same(tuple(clean), tuple(ops.verify_chain(**poisoned)), name)


@pytest.mark.parametrize("name", CALLS)
def test_broken_and_inactive_rows(ops, name):
    inputs = random_inputs(8, 3, 9, torch.float32, seed=49)
    inputs["draft_lens"][:] = 3
    clean = ops.verify_chain(**every_call(inputs)[name])
    for target, nothing in (("target_logits", -torch.inf), ("target_probs", 0.0)):
        inputs[target] = inputs[target].clone()
        inputs[target][1, 0, 5] = torch.nan
        inputs[target][2, 0, 8] = torch.inf
        inputs[target][3, 0] = nothing
        inputs[target][6] = torch.nan
    inputs["draft_lens"] = torch.tensor([3, 3, 3, 3, -1, 4, 77, 3], dtype=torch.int32)
    active = torch.arange(8) != 6
    out = ops.verify_chain(**every_call(inputs)[name], active=active)
    assert out.status[[1, 2, 3, 4, 5, 6]].tolist() == [1, 1, 2, 32, 32, 0]
    assert (out.tokens[1:7] == -1).all() and (out.num_accepted[1:7] == 0).all() and (out.num_emitted[1:7] == 0).all()
    for a, b in zip(clean, out):
        assert same_bits(a[[0, 7]], b[[0, 7]])


@pytest.mark.parametrize("name", CALLS)
def test_drafts_outside_the_vocabulary_mismatch(ops, name):
    inputs = random_inputs(4, 1, 9, torch.float32, seed=50)
    inputs["draft_tokens"] = torch.tensor([[9], [-1], [2**40], [-(2**62)]])
    inputs["draft_lens"][:] = 1
    out = ops.verify_chain(**every_call(inputs)[name])
    assert out.status.tolist() == [4] * 4 and (out.num_accepted == 0).all() and (out.num_emitted == 1).all()
    assert ((out.tokens[:, 0] >= 0) & (out.tokens[:, 0] < 9)).all()


@pytest.mark.parametrize("name", CALLS)
def test_views(ops, name):
    chosen = every_call(random_inputs(6, 3, 33, torch.float32, seed=51))[name]
    want = ops.verify_chain(**chosen)
    for argument in ("target_logits", "target_probs", "draft_tokens", "bitmask"):
        if argument in chosen:
            for view_name, view in views(chosen[argument]):
                got = ops.verify_chain(**chosen | {argument: view})
                assert_same(tuple(want), tuple(got), f"{argument} {view_name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_rows_are_independent(ops, check_rows_independent, name, dtype):
    chosen = every_call(random_inputs(9, 3, 2100, dtype, seed=52))[name]
    fixed = {k: chosen.pop(k) for k in ("rule", "bonus") if k in chosen}
    check_rows_independent(lambda **t: ops.verify_chain(**t, **fixed), chosen)


def test_every_level_equals_the_reference(ops, cpu_level):
    for name, chosen in every_call(random_inputs(20, 3, 300, torch.float32, seed=53)).items():
        assert compare(ops.verify_chain(**chosen), reference.verify_chain(**chosen), MARGIN[torch.float32], name) <= 4


def test_empty_batch_and_empty_draft(ops):
    for batch, longest in ((0, 3), (0, 0), (2, 0)):
        for chosen in every_call(random_inputs(batch, longest, 5, torch.float32, seed=54)).values():
            out = ops.verify_chain(**chosen)
            assert out.tokens.shape == (batch, longest + 1) and (out.num_emitted == 1).all()


def test_arguments_that_conflict(ops):
    inputs = random_inputs(2, 3, 5, torch.float32, seed=55)
    uniform, keys = {"uniforms": inputs["uniforms"]}, {k: inputs[k] for k in ("seed", "offset")}
    good = typical(inputs, "logits")
    for wrong in (
        {"draft_probs": inputs["draft_probs"]},
        uniform,
        keys,
        {"bonus": "sample"},
        {"bonus": "sample", **uniform, **keys},
        {"bonus": "sample", "seed": keys["seed"]},
        {"bonus": "mean"},
        {"bonus": 2},
        {"beta": 1},
        {"tau": 0.0},
        {"target_probs": inputs["target_probs"]},
        {"target_logits": None},
        {"target_logits": None, "target_probs": inputs["target_probs"], "temperature": 0.5},
    ):
        with raises("^verify_chain: "):
            ops.verify_chain(**good | wrong)
    good = top_beta(inputs, "plain")
    for wrong in (
        {"draft_probs": inputs["draft_probs"]},
        uniform,
        keys,
        {"eps": 0.1},
        {"delta": 0.1},
        {"bonus": "sample"},
        {"target_logits": None, "target_probs": inputs["target_probs"]},
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"order": "joint"},
    ):
        with raises("^verify_chain: "):
            ops.verify_chain(**good | wrong)
    for rule in ("ratio", "coupled"):
        for wrong in ({"eps": 0.1}, {"delta": 0.1}, {"bonus": "sample"}, {"beta": 1}, {"tau": 0.0}):
            with raises("^verify_chain: "):
                ops.verify_chain(
                    inputs["draft_tokens"], target_logits=inputs["target_logits"], rule=rule, **keys, **wrong
                )


def test_min_lengths_move_with_the_row(ops):
    """Greedy by the rules themselves: id 1 is banned at positions below 12, rows stand at 10, 11, 12."""
    logits = torch.tensor([[[0.0, 9.0], [0.0, 9.0], [0.0, 9.0]]])
    bans = {"ban_ids": torch.tensor([[1]]), "min_lengths": torch.tensor([[12]]), "offset": torch.tensor([10])}
    for rule in ("typical", "top_beta"):
        out = ops.verify_chain(torch.tensor([[0, 0]]), target_logits=logits, rule=rule, **bans)
        assert out.tokens.tolist() == [[0, 0, 1]], rule


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    inputs = random_inputs(3, 2, 9, torch.float32, seed=16)
    extra = {"active": torch.tensor([True, False, True]), "emit_bonus": False}
    for name in ("typical, filtered, sample by seed", "top_beta, masked"):
        chosen = every_call(inputs)[name] | extra
        check_op(lambda chosen=chosen: ops.verify_chain(**chosen))
