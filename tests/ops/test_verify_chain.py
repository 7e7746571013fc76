from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdecode
from chain_inputs import FILTERS, MARGIN, compare, random_inputs, uniforms
from fastdecode.testing import chi_square_z
from fastdecode.testing.reference import rng
from fastdecode.testing.reference import verify as reference
from support import DTYPES, assert_same, check_op, compute_dtype, generator, raises, same_bits, views

MODES = {
    "probs": ("target_probs", "draft_probs", "draft_lens"),
    "probs, one-hot draft": ("target_probs", "draft_lens"),
    "logits": ("target_logits", "draft_probs", "draft_lens"),
    "logits, one-hot draft": ("target_logits", "draft_lens"),
    "filtered": ("target_logits", "draft_probs", "draft_lens", *FILTERS),
    "filtered, one-hot draft": ("target_logits", "draft_lens", *FILTERS),
    "coupled": ("target_logits", "draft_lens"),
    "coupled, filtered": ("target_logits", "draft_lens", *FILTERS),
}


def options(inputs: dict, mode: str, random: str) -> dict:
    names = ("draft_tokens", *MODES[mode], *(("uniforms",) if random == "uniforms" else ("seed", "offset")))
    return {k: inputs[k] for k in names} | {"rule": "coupled" if mode.startswith("coupled") else "ratio"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("random", ["uniforms", "seed"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_reference(ops, mode, random, dtype):
    skipped = compared = accepted = 0
    shapes = [(40, 3, 5), (10, 0, 7), (20, 1, 1), (20, 2, 2), (8, 5, 17), (8, 4, 65), (6, 3, 257), (6, 2, 2049)]
    for batch, longest, vocab_size in shapes:
        chosen = options(random_inputs(batch, longest, vocab_size, dtype, seed=1), mode, random)
        for emit_bonus in (True, False):
            got = ops.verify_chain(**chosen, emit_bonus=emit_bonus)
            want = reference.verify_chain(**chosen, emit_bonus=emit_bonus)
            skipped += compare(got, want, MARGIN[compute_dtype(dtype)], f"{batch, longest, vocab_size}")
            accepted, compared = accepted + int(got.num_accepted.sum()), compared + batch
    assert skipped <= 0.05 * compared
    assert accepted > 0.2 * compared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coupled_returns_the_tokens_of_plain_sampling(ops, dtype):
    """Whatever is drafted, the emitted tokens are `sample` at the same seed and positions: bit-equal laws."""
    inputs = random_inputs(30, 4, 300, dtype, seed=2)
    filters = {k: inputs[k] for k in FILTERS}
    plain = torch.stack(
        [
            ops.sample(
                inputs["target_logits"][:, i], seed=inputs["seed"], offset=inputs["offset"] + i, **filters
            ).tokens
            for i in range(5)
        ],
        1,
    )
    good = plain[:, :4].clone()
    half = good.clone()
    half[::2, 2] += 1
    for draft in (good, half, inputs["draft_tokens"], torch.full_like(good, 7)):
        out = ops.verify_chain(
            draft,
            target_logits=inputs["target_logits"],
            rule="coupled",
            seed=inputs["seed"],
            offset=inputs["offset"],
            **filters,
        )
        emitted = torch.arange(5) < out.num_emitted[:, None]
        assert torch.equal(out.tokens, plain.masked_fill(~emitted, -1))
        assert torch.equal(out.num_accepted, (draft == plain[:, :4]).int().cumprod(1).sum(1).int())


def test_seeded_ratio_law_by_chi_square(backend):
    """First token over 30,000 seeds, with residual races and acceptance bits; the drafter's law must be rejected."""
    ops, draws, vocab_size = backend.ops, 5_000 if backend.name == "simt" else 30_000, 6
    inputs = random_inputs(1, 1, vocab_size, torch.float32, seed=4)
    target, drafter = inputs["target_probs"], inputs["draft_probs"]
    seed, offset = torch.arange(draws), torch.full((draws,), 17)
    # Drafts drawn with the op and the drafter's own stream: accept, residual and draft noise must not be correlated.
    draft = ops.sample(drafter[:, 0].log().expand(draws, -1), seed=seed, offset=offset, stream=rng.DRAFT).tokens
    out = ops.verify_chain(
        draft[:, None],
        drafter.expand(draws, -1, -1),
        target_probs=target.expand(draws, -1, -1),
        seed=seed,
        offset=offset,
    )
    counts = np.bincount(out.tokens[:, 0].numpy(), minlength=vocab_size)
    assert abs(chi_square_z(counts, target[0, 0].double().numpy() / float(target[0, 0].sum()))) < 4
    assert chi_square_z(counts, drafter[0, 0].double().numpy()) > 6
    bonus = out.tokens[out.num_accepted == 1, 1].numpy()
    assert abs(chi_square_z(np.bincount(bonus, minlength=vocab_size), target[0, 1].double().numpy())) < 4
    expected = float(torch.minimum(target[0, 0], drafter[0, 0]).sum())
    rate = float(out.num_accepted.double().mean())
    assert abs(rate - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Edge cases of the contract


def test_acceptance_is_strict(ops):
    """u q < p: equality rejects; q = p accepts for every u below 1; u = 0 accepts whatever has mass."""
    target = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]], dtype=torch.float64)
    drafter = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64)
    for u, accepted in ((0.0, 1), (0.5 - 2**-54, 1), (0.5, 0), (0.75, 0)):
        out = ops.verify_chain(torch.tensor([[0]]), drafter, target_probs=target, uniforms=uniforms([u, 0.3]))
        assert out.num_accepted.tolist() == [accepted], u
        assert out.tokens.tolist() == [[0, 0] if accepted else [1, -1]]
    same = ops.verify_chain(
        torch.tensor([[0]]), target[:, :1], target_probs=target, uniforms=uniforms([1 - 2**-53, 0.5])
    )
    assert same.num_accepted.tolist() == [1]
    for u, accepted in ((0.25 - 2**-55, 1), (0.25, 0)):
        out = ops.verify_chain(torch.tensor([[0]]), target_probs=target, uniforms=uniforms([u, 0.0]))
        assert out.tokens.tolist() == [[0, 0] if accepted else [1, -1]]


def test_draft_probability_zero(ops):
    target = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    out = ops.verify_chain(
        torch.tensor([[0]]), torch.tensor([[[0.0, 1.0]]]), target_probs=target, uniforms=uniforms([0.0, 0.9])
    )
    assert out.status.tolist() == [8] and out.tokens.tolist() == [[0, -1]] and out.num_emitted.tolist() == [1]


@pytest.mark.parametrize("foreign", [-1, 3, 2**40, -(2**62)])
def test_draft_outside_the_vocabulary(ops, foreign):
    """Rejected, with the residual that keeps the law: (p - q)+ with draft probabilities, p itself without."""
    target = torch.tensor([[[0.2, 0.3, 0.5]] * 2], dtype=torch.float64)
    drafter = torch.tensor([[[0.5, 0.25, 0.0]]], dtype=torch.float64)  # a quarter on ids the target does not have
    draft = torch.tensor([[foreign]])
    with_probs = ops.verify_chain(draft, drafter, target_probs=target, uniforms=uniforms([0.0, 0.05 / 0.55 - 1e-9]))
    assert with_probs.tokens.tolist() == [[1, -1]] and with_probs.status.tolist() == [4]
    assert with_probs.num_accepted.tolist() == [0] and with_probs.num_emitted.tolist() == [1]
    for u, token in ((0.1, 0), (0.4, 1), (0.6, 2)):
        for target_of in ({"target_probs": target}, {"target_logits": target.log()}):
            out = ops.verify_chain(draft, **target_of, uniforms=uniforms([0.0, u]))
            assert out.tokens.tolist() == [[token, -1]] and out.status.tolist() == [4]
    coupled = ops.verify_chain(draft, target_logits=target.log(), rule="coupled", uniforms=uniforms([0.4, 0.0]))
    assert coupled.tokens.tolist() == [[1, -1]] and coupled.status.tolist() == [4]


def test_residual_without_mass_falls_back_to_the_target(ops):
    target = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], dtype=torch.float64)
    for random, token in (({"uniforms": uniforms([0.9, 0.2])}, 0), ({"uniforms": uniforms([0.9, 0.3])}, 1)):
        out = ops.verify_chain(torch.tensor([[0]]), 2 * target[:, :1], target_probs=target, **random)
        assert out.status.tolist() == [16] and out.tokens.tolist() == [[token, -1]]
    lone = torch.tensor([[[0.5, 0.0], [0.5, 0.5]]], dtype=torch.float64)
    out = ops.verify_chain(torch.tensor([[0]]), target_probs=lone, uniforms=uniforms([0.9, 0.9]))
    assert out.status.tolist() == [16] and out.tokens.tolist() == [[0, -1]]


def test_greedy_target_is_exact_match(ops):
    logits = torch.randn(40, 4, 9, generator=generator(3))
    best = logits.argmax(-1)
    draft = best[:, :3].clone()
    draft[::3, 1] = (draft[::3, 1] + 1) % 9
    want = ops.verify_chain_greedy(draft, best)
    for rule in ("ratio", "coupled"):
        for random in (
            {"uniforms": torch.rand(40, 4, dtype=torch.float64, generator=generator(4))},
            {"seed": torch.arange(40), "offset": torch.arange(40)},
        ):
            out = ops.verify_chain(draft, target_logits=logits, rule=rule, temperature=0.0, **random)
            assert_same(tuple(want), tuple(out), rule)


def test_equal_draft_and_target_accept_everything_and_disjoint_nothing(ops):
    inputs = random_inputs(50, 3, 11, torch.float64, seed=9)
    same = ops.verify_chain(
        inputs["draft_tokens"],
        inputs["target_probs"][:, :3],
        target_probs=inputs["target_probs"],
        uniforms=inputs["uniforms"],
    )
    assert (same.num_accepted == 3).all() and (same.num_emitted == 4).all()
    target, drafter = torch.zeros(9, 2, 4), torch.zeros(9, 1, 4)
    target[:, :, :2], drafter[:, :, 2:] = 0.5, 0.5
    out = ops.verify_chain(
        torch.full((9, 1), 2), drafter, target_probs=target, seed=torch.arange(9), offset=torch.arange(9)
    )
    assert (out.num_accepted == 0).all() and (out.tokens[:, 0] < 2).all() and (out.status == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("random", ["uniforms", "seed"])
@pytest.mark.parametrize("mode", MODES)
def test_unused_rows_are_not_read(ops, mode, random, dtype):
    """NaN in every row past the first rejection or the draft's length, junk in the unused drafts."""
    inputs = random_inputs(30, 4, 17, dtype, seed=5)
    chosen = options(inputs, mode, random)
    clean = ops.verify_chain(**chosen)
    used = clean.num_accepted  # rows 0 .. num_accepted of the target were needed
    poisoned = dict(chosen)
    at = torch.arange(5)
    for name in ("target_logits", "target_probs"):
        if name in chosen:
            poisoned[name] = chosen[name].masked_fill((at > used[:, None])[..., None], torch.nan)
    if "draft_probs" in chosen:
        lens = chosen["draft_lens"]
        unread = (at[:4] > used[:, None]) | (at[:4] >= lens[:, None])
        poisoned["draft_probs"] = chosen["draft_probs"].masked_fill(unread[..., None], torch.nan)
    poisoned["draft_tokens"] = chosen["draft_tokens"].masked_fill(at[:4] > used[:, None], 2**40)
    assert_same(tuple(clean), tuple(ops.verify_chain(**poisoned)), mode)


@pytest.mark.parametrize("mode", MODES)
def test_broken_rows_end_their_request_only(ops, mode):
    inputs = random_inputs(6, 3, 9, torch.float32, seed=6)
    inputs["draft_lens"][:] = 3
    chosen = options(inputs, mode, "uniforms")
    clean = ops.verify_chain(**chosen)
    name = "target_logits" if "target_logits" in chosen else "target_probs"
    broken = dict(chosen)
    broken[name] = chosen[name].clone()
    broken[name][1, 0] = torch.nan
    broken[name][2, 0] = torch.inf if name == "target_logits" else torch.nan
    broken[name][3, 0] = -torch.inf if name == "target_logits" else 0.0
    broken["draft_lens"] = torch.tensor([3, 3, 3, 3, -1, 4], dtype=torch.int32)
    out = ops.verify_chain(**broken)
    if name == "target_logits":
        assert out.status[1:].tolist() == [1, 1, 2, 32, 32]
    else:
        assert out.status[[1, 2, 4, 5]].tolist() == [1, 1, 32, 32] and int(out.status[3]) & 2
    assert (out.tokens[1:] == -1).all() and (out.num_accepted[1:] == 0).all() and (out.num_emitted[1:] == 0).all()
    for a, b in zip(clean, out):
        assert same_bits(a[:1], b[:1])


def test_error_in_a_later_row_takes_back_what_was_accepted(ops):
    target = torch.tensor([[[1.0, 0.0], [torch.nan, 0.5], [0.5, 0.5]]] * 2)
    out = ops.verify_chain(
        torch.tensor([[0, 0], [0, 0]]),
        target_probs=target,
        uniforms=uniforms([0.5] * 3, [0.5] * 3),
        draft_lens=torch.tensor([2, 1], dtype=torch.int32),
    )
    assert out.status.tolist() == [1, 1] and (out.tokens == -1).all()
    assert (out.num_accepted == 0).all() and (out.num_emitted == 0).all()


def test_nan_in_the_draft_row(ops):
    target = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    out = ops.verify_chain(
        torch.tensor([[0]]), torch.tensor([[[torch.nan, 0.5]]]), target_probs=target, uniforms=uniforms([0.5, 0.5])
    )
    assert out.status.tolist() == [1] and out.tokens.tolist() == [[-1, -1]] and out.num_emitted.tolist() == [0]


def test_inactive_rows_are_not_read(ops):
    inputs = random_inputs(6, 3, 9, torch.float32, seed=7)
    active = torch.tensor([True, False, True, False, False, True])
    for mode in MODES:
        chosen = options(inputs, mode, "seed")
        clean = ops.verify_chain(**chosen)
        poisoned = {
            k: t.masked_fill(~active.view(-1, *[1] * (t.dim() - 1)), torch.nan)
            if isinstance(t, torch.Tensor) and t.is_floating_point()
            else t
            for k, t in chosen.items()
        }
        poisoned["draft_lens"] = chosen["draft_lens"].masked_fill(~active, 77)
        out = ops.verify_chain(**poisoned, active=active)
        for a, b in zip(clean, out):
            assert same_bits(a[active], b[active])
        assert (out.tokens[~active] == -1).all() and (out.status[~active] == 0).all()
        assert (out.num_accepted[~active] == 0).all() and (out.num_emitted[~active] == 0).all()


def test_min_lengths_move_with_the_row(ops):
    logits = torch.tensor([[[0.0, 9.0], [0.0, 9.0], [0.0, 9.0]]])
    out = ops.verify_chain(
        torch.tensor([[0, 0]]),
        target_logits=logits,
        temperature=0.0,
        rule="coupled",
        ban_ids=torch.tensor([[1]]),
        min_lengths=torch.tensor([[12]]),
        offset=torch.tensor([10]),
        seed=torch.tensor([0]),
    )
    assert out.tokens.tolist() == [[0, 0, 1]]  # positions 10 and 11 are below 12, position 12 is not
    ratio = ops.verify_chain(
        torch.tensor([[0, 0]]),
        target_logits=logits,
        temperature=0.0,
        ban_ids=torch.tensor([[1]]),
        min_lengths=torch.tensor([[12]]),
        offset=torch.tensor([10]),
        uniforms=uniforms([0.5] * 3),
    )
    assert ratio.tokens.tolist() == [[0, 0, 1]]


def test_views(ops):
    inputs = random_inputs(6, 3, 33, torch.float32, seed=8)
    for mode in ("probs", "logits", "coupled"):
        chosen = options(inputs, mode, "uniforms")
        want = ops.verify_chain(**chosen)
        for argument in ("target_logits", "target_probs", "draft_probs", "draft_tokens"):
            if argument in chosen:
                for name, view in views(chosen[argument]):
                    assert_same(tuple(want), tuple(ops.verify_chain(**chosen | {argument: view})), f"{argument} {name}")
        shared = {
            k: t[:1].expand_as(t) if isinstance(t, torch.Tensor) and t.dim() > 1 and k != "uniforms" else t
            for k, t in chosen.items()
        }
        dense = {k: t.contiguous() if isinstance(t, torch.Tensor) else t for k, t in shared.items()}
        assert_same(tuple(ops.verify_chain(**dense)), tuple(ops.verify_chain(**shared)), "stride 0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_independent(ops, check_rows_independent, mode, dtype):
    for random in ("uniforms", "seed"):
        chosen = options(random_inputs(9, 3, 2100, dtype, seed=10), mode, random)
        rule = chosen.pop("rule")
        check_rows_independent(lambda rule=rule, **t: ops.verify_chain(**t, rule=rule), chosen)


def test_changing_one_length_changes_no_other_row(ops):
    inputs = random_inputs(6, 3, 33, torch.float32, seed=11)
    chosen = options(inputs, "filtered", "seed")
    before = ops.verify_chain(**chosen)
    lens = chosen["draft_lens"].clone()
    lens[2] = 0
    after = ops.verify_chain(**chosen | {"draft_lens": lens})
    keep = torch.arange(6) != 2
    for a, b in zip(before, after):
        assert same_bits(a[keep], b[keep])
    assert int(after.num_accepted[2]) == 0 and int(after.num_emitted[2]) == 1


def test_every_level_equals_the_reference(ops, cpu_level):
    for mode in MODES:
        chosen = options(random_inputs(8, 3, 300, torch.float32, seed=12), mode, "seed")
        assert compare(ops.verify_chain(**chosen), reference.verify_chain(**chosen), MARGIN[torch.float32], mode) <= 1


def test_empty_batch_and_empty_draft(ops):
    for batch, longest in ((0, 3), (0, 0), (2, 0)):
        inputs = random_inputs(batch, longest, 5, torch.float32, seed=13)
        for mode in MODES:
            out = ops.verify_chain(**options(inputs, mode, "uniforms"))
            assert out.tokens.shape == (batch, longest + 1) and (out.num_emitted == 1).all()


def test_arguments_that_conflict(ops):
    inputs = random_inputs(2, 3, 5, torch.float32, seed=14)
    names = ("draft_tokens", "target_logits", "target_probs", "draft_probs")
    tokens, logits, probs, drafter = (inputs[k] for k in names)
    u, keys = {"uniforms": inputs["uniforms"]}, {k: inputs[k] for k in ("seed", "offset")}
    for wrong in (
        {**u},
        {"target_logits": logits, "target_probs": probs, **u},  # neither, both
        {"target_probs": probs, "temperature": 0.5, **u},
        {"target_probs": probs, "top_k": 2, **u},
        {"target_probs": probs, "ban_ids": torch.tensor([[1]] * 2), **u},
        {"target_logits": logits, "draft_probs": drafter, "rule": "coupled", **u},
        {"target_probs": probs, "rule": "coupled", **u},
        {"target_logits": logits},
        {"target_logits": logits, **u, **keys},
        {"target_logits": logits, "seed": keys["seed"]},
        {"target_logits": logits, "offset": keys["offset"], **u},
    ):
        with raises("^verify_chain: "):
            ops.verify_chain(tokens, **wrong)


def test_rule_by_enum(ops):
    chosen = options(random_inputs(4, 2, 5, torch.float32, seed=15), "coupled", "seed")
    by_enum = ops.verify_chain(**chosen | {"rule": fastdecode.Rule.COUPLED})
    assert_same(tuple(ops.verify_chain(**chosen)), tuple(by_enum))


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    inputs = random_inputs(3, 2, 9, torch.float32, seed=16)
    extra = {
        "bias": torch.zeros(3, 9),
        "ban_ids": torch.tensor([[1, -1]] * 3),
        "min_lengths": torch.full((3, 2), 9),
        "active": torch.tensor([True, False, True]),
        "emit_bonus": False,
    }
    for mode, random, more in (
        ("probs", "uniforms", {}),
        ("probs", "seed", {}),
        ("logits, one-hot draft", "seed", {}),
        ("filtered", "seed", extra),
        ("coupled, filtered", "seed", extra),
        ("coupled", "uniforms", {}),
    ):
        chosen = options(inputs, mode, random) | more
        if random == "uniforms":
            chosen.pop("draft_lens")
        check_op(lambda chosen=chosen: ops.verify_chain(**chosen))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_inductor(ops):
    chosen = options(random_inputs(3, 2, 9, torch.float32, seed=16), "filtered", "seed")
    check_op(lambda: ops.verify_chain(**chosen), inductor=True)
