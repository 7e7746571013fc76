"""verify_chain with a draft vocabulary of its own, and with flat ragged rows; laws: test_verify_chain_law.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from chain_inputs import MARGIN, NEW_FILTERS, compare, random_inputs, uniforms
from fastdecode.testing.reference import verify as reference
from support import DTYPES, assert_same, check_op, compute_dtype, generator, raises, same_bits, views

SEED = ("seed", "offset")
RULES: dict[str, tuple[str, ...]] = {
    "ratio": ("target_logits", "draft_probs", *SEED),
    "ratio, probs": ("target_probs", "draft_probs", "uniforms"),
    "ratio, filtered": ("target_logits", "draft_probs", *NEW_FILTERS, "uniforms"),
    "ratio, one-hot": ("target_logits", *SEED),
    "block": ("target_logits", "draft_probs", "uniforms"),
    "block, probs": ("target_probs", "draft_probs", *SEED),
    "block, filtered": ("target_logits", "draft_probs", *NEW_FILTERS, *SEED),
    "block, one-hot": ("target_probs", "uniforms"),
    "coupled": ("target_logits", *SEED),
    "coupled, filtered": ("target_logits", *NEW_FILTERS, *SEED),
    "typical": ("target_probs", "eps", "delta"),
    "typical, filtered": ("target_logits", "eps", "delta", *NEW_FILTERS),
    "top_beta": ("target_logits", "beta", "tau", "bitmask"),
}


def call(inputs: dict, name: str) -> dict:
    names = ("draft_tokens", "draft_lens", *RULES[name])
    chosen = {k: inputs[k] for k in names} | {"rule": name.split(",")[0]}
    return chosen | ({"draft_to_target": inputs["draft_to_target"]} if "draft_to_target" in inputs else {})


def mapped_inputs(
    batch: int, longest: int, vocab_size: int, draft_size: int, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Inputs of a drafter with ids of its own: some without an image, some with one in common, in no order."""
    inputs = random_inputs(batch, longest, vocab_size, dtype, seed)
    g = generator(seed, vocab_size, draft_size)
    to_target = torch.randint(vocab_size, (draft_size,), generator=g)  # with ids in common
    to_target[:vocab_size] = torch.randperm(vocab_size, generator=g)[:draft_size]
    to_target[torch.rand(draft_size, generator=g) < 0.15] = -1
    to_target[torch.rand(draft_size, generator=g) < 0.05] = vocab_size
    to_target[torch.rand(draft_size, generator=g) < 0.05] = 2**40
    mapped = (to_target >= 0) & (to_target < vocab_size)
    scores = torch.randn(batch, longest, draft_size, generator=g, dtype=torch.float64)
    image = to_target.clamp(0, vocab_size - 1)
    scores = torch.where(mapped, inputs["target_logits"][:, :longest].double()[..., image] + 0.7 * scores, scores)
    probs = torch.softmax(scores, -1)
    flat = probs.reshape(-1, draft_size)
    tokens = torch.multinomial(flat, 1, generator=g) if flat.numel() else torch.zeros(0, 1, dtype=torch.int64)
    tokens = tokens.reshape(batch, longest)
    strange = torch.rand(batch, longest, generator=g) < 0.03
    tokens[strange] = torch.tensor([-1, draft_size, 2**40, -(2**62)])[torch.randint(4, (int(strange.sum()),))]
    return inputs | {"draft_tokens": tokens, "draft_probs": probs.to(dtype), "draft_to_target": to_target}


# ----------------------------------------------------------------------------------------------------------------------
# draft_to_target


SHAPES = [
    (60, 3, 5, 4),
    (20, 2, 4, 9),
    (10, 2, 1, 3),
    (20, 3, 40, 13),
    (8, 4, 65, 65),
    (6, 3, 257, 100),
    (4, 2, 300, 999),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_mapped_drafts_equal_reference(ops, name, dtype):
    skipped = compared = accepted = unmapped = 0
    for shape in SHAPES:
        chosen = call(mapped_inputs(*shape, dtype, seed=61), name)
        for emit_bonus in (True, False):
            got = ops.verify_chain(**chosen, emit_bonus=emit_bonus)
            want = reference.verify_chain(**chosen, emit_bonus=emit_bonus)
            skipped += compare(got, want, MARGIN[compute_dtype(dtype)], f"{shape}")
            accepted, compared = accepted + int(got.num_accepted.sum()), compared + shape[0]
            unmapped += int((got.status & 4 > 0).sum())
    assert skipped <= 0.05 * compared
    assert accepted > 0.1 * compared and unmapped > 0.05 * compared


@pytest.mark.parametrize("name", RULES)
def test_identity_and_permutation_change_nothing(ops, name):
    """The same drafts under other names: bit-equal results."""
    inputs = random_inputs(40, 3, 17, torch.float32, seed=62)
    plain = call(inputs, name)
    want = ops.verify_chain(**plain)
    assert_same(tuple(want), tuple(ops.verify_chain(**plain, draft_to_target=torch.arange(17))), "identity")
    order = torch.randperm(17, generator=generator(1))  # draft id d means the target's order[d]
    renamed = plain | {"draft_tokens": order.argsort()[inputs["draft_tokens"]], "draft_to_target": order}
    if "draft_probs" in plain:
        renamed["draft_probs"] = inputs["draft_probs"][..., order].contiguous()
    assert_same(tuple(want), tuple(ops.verify_chain(**renamed)), "permutation")


@pytest.mark.parametrize("rule", ["ratio", "block"])
def test_draft_without_an_image_is_rejected_with_its_mass(ops, rule):
    """p = (.2, .3, .5), q_mapped = (.5, .25, 0), a quarter on an id without an image: (p - q)+ = (0, .05, .5)."""
    target = torch.tensor([[[0.2, 0.3, 0.5]] * 2], dtype=torch.float64)
    drafter = torch.tensor([[[0.25, 0.5, 0.25]]], dtype=torch.float64)
    to_target = torch.tensor([1, 0, -1])
    for draft in (2, 3, -1, 2**40):
        for u, token in ((0.05 / 0.55 - 1e-9, 1), (0.05 / 0.55 + 1e-9, 2)):
            options = {"draft_to_target": to_target, "uniforms": uniforms([0.0, u]), "rule": rule}
            out = ops.verify_chain(torch.tensor([[draft]]), drafter, target_probs=target, **options)
            assert out.tokens.tolist() == [[token, -1]] and out.status.tolist() == [4], draft
    for u, token in ((0.19, 0), (0.21, 1), (0.51, 2)):  # without draft probabilities: from p itself
        options = {"draft_to_target": to_target, "uniforms": uniforms([0.0, u]), "rule": rule}
        out = ops.verify_chain(torch.tensor([[2]]), target_probs=target, **options)
        assert out.tokens.tolist() == [[token, -1]] and out.status.tolist() == [4]


@pytest.mark.parametrize("rule", ["ratio", "block"])
def test_two_draft_ids_of_one_image_add_up(ops, rule):
    """q_mapped(0) = .3 + .3: at p(0) = .3 either is kept for u < 1/2, not for u < 1."""
    target = torch.tensor([[[0.3, 0.7]] * 2], dtype=torch.float64)
    drafter = torch.tensor([[[0.3, 0.3, 0.4]]], dtype=torch.float64)
    for draft, u, kept in ((0, 0.49, 1), (1, 0.49, 1), (0, 0.51, 0), (1, 0.51, 0)):
        options = {"draft_to_target": torch.tensor([0, 0, 1]), "uniforms": uniforms([u, 0.5]), "rule": rule}
        out = ops.verify_chain(torch.tensor([[draft]]), drafter, target_probs=target, **options)
        assert out.num_accepted.tolist() == [kept] and out.tokens.tolist() == [[0, 1] if kept else [1, -1]]


def test_zero_draft_probability_of_a_mapped_id(ops):
    target = torch.tensor([[[0.5, 0.5]] * 2], dtype=torch.float64)
    drafter = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64)
    for rule in ("ratio", "block"):
        options = {"draft_to_target": torch.tensor([0, 1, 1]), "uniforms": uniforms([0.0, 0.9]), "rule": rule}
        out = ops.verify_chain(torch.tensor([[0]]), drafter, target_probs=target, **options)
        assert out.status.tolist() == [8] and out.tokens.tolist() == [[0, -1]]
        shared = ops.verify_chain(torch.tensor([[2]]), drafter, target_probs=target, **options)
        assert shared.status.tolist() == [0] and shared.num_accepted.tolist() == [1]  # u q_mapped(1) = 0 < p(1)


def test_emitted_tokens_are_target_ids(ops):
    inputs = mapped_inputs(80, 3, 40, 13, torch.float32, seed=63)
    for name in RULES:
        out = ops.verify_chain(**call(inputs, name))
        emitted = torch.arange(4) < out.num_emitted[:, None]
        assert ((out.tokens >= 0) == emitted).all() and (out.tokens < 40).all()
        kept = torch.arange(3) < out.num_accepted[:, None]
        image = inputs["draft_to_target"][inputs["draft_tokens"].clamp(0, 12)]
        assert torch.equal(out.tokens[:, :3][kept], image[kept])


# ----------------------------------------------------------------------------------------------------------------------
# Flat rows


def flat(chosen: dict, *, before: int = 1, between: int = 2, after: int = 3) -> tuple[dict, Tensor]:
    """The same call with rows [R, V]: lens[b] + 1 rows per request and `between` more that nobody may read.

    Returns the call and which of the flat rows are needed.
    """
    made = dict(chosen)
    lens = chosen["draft_lens"].tolist()
    row_start = [before]
    for n in lens:
        row_start.append(row_start[-1] + n + 1 + between)
    total = row_start[-1] + after
    needed = torch.zeros(total, dtype=torch.bool)
    for name in ("target_logits", "target_probs", "bitmask"):
        if name not in chosen:
            continue
        value = chosen[name]
        rows = torch.full((total, value.shape[-1]), 0 if name == "bitmask" else float("nan"), dtype=value.dtype)
        for b, n in enumerate(lens):
            rows[row_start[b] : row_start[b] + n + 1] = value[b, : n + 1]
            needed[row_start[b] : row_start[b] + n + 1] = True
        made[name] = rows
    made["row_start"] = torch.tensor(row_start, dtype=torch.int32)
    return made, needed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_flat_rows_equal_padded_rows(ops, name, dtype):
    """Bit for bit, with guard rows of NaN (and masks of nothing) that no request needs."""
    for vocab_size in (5, 33, 300):
        for inputs in (
            random_inputs(20, 3, vocab_size, dtype, seed=64),
            mapped_inputs(20, 3, vocab_size, 9, dtype, seed=65),
        ):
            chosen = call(inputs, name)
            want = ops.verify_chain(**chosen)
            for gaps in ({}, {"before": 0, "between": 0, "after": 0}):
                made, _ = flat(chosen, **gaps)
                assert_same(tuple(want), tuple(ops.verify_chain(**made)), f"{vocab_size}, {gaps}")


@pytest.mark.parametrize("name", RULES)
def test_flat_rows_equal_reference(ops, name):
    made, _ = flat(call(random_inputs(40, 3, 19, torch.float64, seed=66), name))
    assert compare(ops.verify_chain(**made), reference.verify_chain(**made), MARGIN[torch.float64], name) <= 2


@pytest.mark.parametrize("name", RULES)
def test_flat_rows_that_do_not_fit(ops, name):
    """Status 32, no token, nothing read; the other requests do not notice."""
    inputs = random_inputs(7, 3, 9, torch.float32, seed=67)
    inputs["draft_lens"][:] = torch.tensor([3, 0, 2, 3, 1, 2, 3])
    made, _ = flat(call(inputs, name), between=0)
    clean = ops.verify_chain(**made)
    total = made["row_start"].tolist()[-1] + 3
    start = made["row_start"].tolist()
    for change, broken in (
        ({4: start[4] + 1}, [4]),  # one row too few; the request before it has one too many
        ({7: start[7] - 1}, [6]),
        ({7: total + 1}, [6]),
        ({0: -1}, [0]),
        ({3: start[4] + 1}, [3]),  # falling
        ({3: total + 5}, [2, 3]),
        ({3: -7}, [2, 3]),
        ({2: 2**31 - 1, 3: -(2**31)}, [1, 2, 3]),
    ):
        changed = made | {"row_start": made["row_start"].clone()}
        for at, value in change.items():
            changed["row_start"][at] = value
        out = ops.verify_chain(**changed)
        expected = reference.verify_chain(**changed)
        assert out.status[broken].tolist() == [32] * len(broken), change
        assert (expected.status == 32).nonzero()[0].tolist() == (out.status == 32).nonzero()[:, 0].tolist(), change
        bad = out.status == 32
        assert (
            (out.tokens[bad] == -1).all() and (out.num_emitted[bad] == 0).all() and (out.num_accepted[bad] == 0).all()
        )
        same_rows = ~bad & (changed["row_start"][:-1] == made["row_start"][:-1])
        for a, b in zip(clean, out):
            assert same_bits(a[same_rows], b[same_rows]), change


def test_flat_rows_and_inactive_requests(ops):
    inputs = random_inputs(6, 3, 9, torch.float32, seed=68)
    active = torch.tensor([True, False, True, False, False, True])
    for name in RULES:
        made, _ = flat(call(inputs, name))
        clean = ops.verify_chain(**made)
        poisoned = dict(made)
        for target in ("target_logits", "target_probs"):
            if target in made:
                poisoned[target] = made[target].clone()
                for b in (~active).nonzero()[:, 0].tolist():
                    poisoned[target][int(made["row_start"][b]) : int(made["row_start"][b + 1])] = torch.nan
        out = ops.verify_chain(**poisoned, active=active)
        for a, b in zip(clean, out):
            assert same_bits(a[active], b[active]), name
        assert (out.tokens[~active] == -1).all() and (out.status[~active] == 0).all()


def test_flat_views_and_empty(ops):
    inputs = mapped_inputs(5, 2, 33, 9, torch.float32, seed=69)
    for name in ("ratio", "block, probs", "coupled, filtered", "top_beta"):
        made, _ = flat(call(inputs, name))
        want = ops.verify_chain(**made)
        for argument in ("target_logits", "target_probs", "bitmask", "draft_probs", "draft_tokens"):
            if argument in made:
                for view_name, view in views(made[argument]):
                    got = ops.verify_chain(**made | {argument: view})
                    assert_same(tuple(want), tuple(got), f"{name}, {argument}, {view_name}")
        none, _ = flat(call(random_inputs(0, 3, 5, torch.float32, seed=70), name))
        assert ops.verify_chain(**none).tokens.shape == (0, 4)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_rows_are_independent(ops, check_rows_independent, name):
    inputs = mapped_inputs(9, 3, 2100, 700, torch.float32, seed=71)
    chosen = call(inputs, name)
    fixed = {k: chosen.pop(k) for k in ("rule", "draft_to_target")}
    check_rows_independent(lambda **t: ops.verify_chain(**t, **fixed), chosen)


def test_every_level_equals_the_reference(ops, cpu_level):
    for name in RULES:
        chosen = call(mapped_inputs(20, 3, 300, 100, torch.float32, seed=72), name)
        assert compare(ops.verify_chain(**chosen), reference.verify_chain(**chosen), MARGIN[torch.float32], name) <= 4


def test_arguments(ops):
    inputs = mapped_inputs(3, 2, 8, 5, torch.float32, seed=73)
    chosen = call(inputs, "ratio")
    to_target, probs = inputs["draft_to_target"], inputs["draft_probs"]
    for wrong, argument in (
        ({"draft_to_target": to_target.int()}, "draft_to_target"),
        ({"draft_to_target": to_target[None]}, "draft_to_target"),
        ({"draft_probs": torch.zeros(3, 2, 6)}, "draft_probs|draft_to_target"),
        ({"draft_probs": torch.zeros(3, 2, 8)}, "draft_probs|draft_to_target"),
        ({"draft_to_target": None}, "draft_probs"),
    ):
        with raises(f"^verify_chain: ({argument}): expected "):
            ops.verify_chain(**chosen | wrong)
    made, _ = flat(call(inputs, "ratio"))
    for wrong in (
        {"row_start": made["row_start"].long()},
        {"row_start": made["row_start"][:-1]},
        {"row_start": made["row_start"][None]},
    ):
        with raises("^verify_chain: row_start: expected "):
            ops.verify_chain(**made | wrong)
    for wrong in (
        {"target_logits": inputs["target_logits"]},  # padded rows with row_start
        {"row_start": None},  # flat rows without
        {"draft_probs": probs.reshape(-1, 5)},
        {"bitmask": torch.zeros(made["target_logits"].shape[0] + 1, 1, dtype=torch.int32)},
    ):
        with raises("^verify_chain: "):
            ops.verify_chain(**made | wrong)


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    inputs = mapped_inputs(3, 2, 9, 5, torch.float32, seed=74)
    for name in ("block, probs", "typical, filtered"):
        chosen = call(inputs, name)
        check_op(lambda chosen=chosen: ops.verify_chain(**chosen))
    for name in ("ratio, filtered", "top_beta"):
        made, _ = flat(call(inputs, name))
        check_op(lambda made=made: ops.verify_chain(**made))
