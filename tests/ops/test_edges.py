"""Corners that more than one op shares: limits of numbers, views of per-request parameters, misuse of the wrappers."""

import pytest
import torch

from fastdecode import Status

INF = float("inf")


def logits(batch: int = 3, vocab_size: int = 50) -> torch.Tensor:
    return torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(0))


def test_parameters_may_be_views(ops):
    x, values = logits(), torch.tensor([0.5, 0.0, 0.9, 0.0, 1.3, 0.0])
    expected = ops.sample(x, temperature=values[::2].clone(), seed=torch.tensor([7] * 3), offset=4)
    got = ops.sample(x, temperature=values[::2], seed=torch.tensor([7]).expand(3), offset=torch.tensor([4]).expand(3))
    assert torch.equal(got.tokens, expected.tokens)
    every_second = torch.tensor([True, False, False, True, True, False])[::2]
    assert ops.row_stats(x, active=every_second).argmax.tolist() == [x[0].argmax(), -1, x[2].argmax()]


def test_mutated_arguments_must_be_contiguous(ops):
    state = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="commit: lengths: expected a contiguous last dimension, got stride 3"):
        ops.commit(torch.ones(2, 1, dtype=torch.int64), torch.ones(2, dtype=torch.int32), state[:, 0],
                   torch.zeros(2, dtype=torch.bool))  # fmt: skip
    assert not state.any()


def test_seeds_are_64_bits_signed_or_unsigned(ops):
    signed, unsigned = (ops.sample(logits(), seed=seed, offset=1).tokens for seed in (-1, 2**64 - 1))
    assert torch.equal(signed, unsigned)


@pytest.mark.parametrize("options,message", [
    ({"top_k": 2**40}, "sample: top_k: expected a torch.int32 number"),
    ({"temperature": "hot"}, "sample: temperature: expected a torch.float32 number"),
    ({"bias": [0.0] * 50}, "sample: bias: expected a tensor"),
])  # fmt: skip
def test_scalars_of_another_kind(ops, options, message):
    with pytest.raises(ValueError, match=message):
        ops.sample(logits(), seed=1, offset=0, **options)


def test_tensors_without_dimensions(ops):
    zero = torch.tensor(1.0)
    for call in (
        lambda: ops.sample(zero, seed=1, offset=0),
        lambda: ops.target_probs(zero),
        lambda: ops.row_stats(zero),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match=r"commit: tokens: expected 2 dimensions, got \[\]"):
        one = torch.tensor(1, dtype=torch.int32)
        ops.commit(torch.tensor(1), one, one, torch.tensor(False), stop_ids=torch.tensor([1]))


def test_rule_must_be_a_name_or_a_number(ops):
    with pytest.raises(ValueError, match=r"verify_chain: rule: expected a name or a Rule, got 1\.7"):
        ops.verify_chain(torch.zeros(1, 0, dtype=torch.int64), target_logits=torch.zeros(1, 1, 4), rule=1.7, seed=0,
                         offset=0)  # fmt: skip


def test_stream_and_node_belong_to_seeds(ops):
    with pytest.raises(ValueError, match="sample: stream, node: expected 0 beside uniforms, got 3 and 0"):
        ops.sample(logits(1), uniforms=torch.tensor([0.5], dtype=torch.float64), stream=3)


def test_a_vocabulary_that_overflows_the_sums_is_refused(ops):
    row = torch.zeros(1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"row_stats: logits: expected a vocabulary of at most 8388608"):
        ops.row_stats(row.expand(1, 2**23 + 1).contiguous())
    largest = torch.zeros(1, 2**23, dtype=torch.float16)
    drawn = ops.sample(largest, top_p=0.5, uniforms=torch.tensor([0.999], dtype=torch.float64))
    assert drawn.status.item() == 0 and 4_180_000 < drawn.tokens.item() < 2**22


@pytest.mark.parametrize("temperature,expected", [(INF, [0.5, 0.5, 0.0]), (float("nan"), [0.0, 1.0, 0.0]),
                                                  (-1.0, [0.0, 1.0, 0.0]), (1e-45, [0.0, 1.0, 0.0])])  # fmt: skip
def test_temperatures_out_of_this_world(ops, temperature, expected):
    row = torch.tensor([[1.0, 2.0, -INF]])
    assert ops.target_probs(row, temperature=temperature).probs[0].tolist() == expected
    if temperature == INF:
        filtered = ops.token_logprobs(row, torch.tensor([2]), filtered=True, temperature=temperature)
        assert filtered.logprobs.item() == -INF


def test_greedy_verification_of_a_row_without_an_argmax(ops):
    draft = torch.tensor([[5, 6], [-1, 6], [4, 6]])
    target = torch.tensor([[5, -1, 7], [-1, 6, 7], [5, -1, -1]])
    got = ops.verify_chain_greedy(draft, target)
    assert got.status.tolist() == [Status.NO_MASS, Status.NO_MASS, 0]  # the third request never comes to such a row
    assert got.num_accepted.tolist() == [0, 0, 0] and got.num_emitted.tolist() == [0, 0, 1]
    assert got.tokens.tolist() == [[-1] * 3, [-1] * 3, [5, -1, -1]]


def test_infinite_probabilities_are_errors(ops):
    draft, half = torch.tensor([[0]]), [0.5, 0.5]
    for target in ([[INF, 0.0], half], [half, [INF, 0.0]]):
        got = ops.verify_chain(draft, target_probs=torch.tensor([target]), uniforms=torch.full((1, 2), 0.25).double())
        assert got.status.item() == Status.NAN and got.num_emitted.item() == 0


def test_lengths_stop_at_their_type(ops):
    top = 2**31 - 1
    lengths, finished = torch.tensor([top - 1, top], dtype=torch.int32), torch.zeros(2, dtype=torch.bool)
    committed = ops.commit(
        torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 3], dtype=torch.int32), lengths, finished
    )
    assert lengths.tolist() == [top, top] and committed.num_committed.tolist() == [1, 0]
    assert finished.tolist() == [True, True] and committed.reason.tolist() == [2, 2]


def test_a_tensor_on_another_device_is_refused(ops):
    x, away = logits(), torch.zeros(3, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="token_logprobs: tokens: expected cpu, got meta"):
        ops.token_logprobs(x, away)
    with pytest.raises(ValueError, match="sample: seed: expected cpu, got meta"):
        ops.sample(x, seed=away, offset=0)
    with pytest.raises(ValueError, match="verify_chain_greedy: target_ids: expected cpu, got meta"):
        ops.verify_chain_greedy(torch.zeros(3, 0, dtype=torch.int64), away.unsqueeze(1))


def test_the_most_likely_id_of_a_law_need_not_be_the_largest_logit(ops):
    """Only typical_p can take the largest logit out: rule typical must then go by what is left."""
    logits, none = torch.tensor([[[0.4] + [0.03] * 20]]).log(), torch.zeros(1, 0, dtype=torch.int64)
    chosen = {"target_logits": logits, "rule": "typical", "typical_p": 0.05}
    assert ops.verify_chain(none, **chosen).tokens.tolist() == [[1]]
    for random in ({"uniforms": torch.full((1, 1), 0.5).double()}, {"seed": 3, "offset": 4}):
        got = ops.verify_chain(none, **chosen, bonus="sample", eps=1.0, delta=1.0, **random)
        assert got.tokens.item() in (1, 2) and got.status.item() == 0


def test_lossy_rules_need_mass(ops):
    none = torch.zeros(2, 0, dtype=torch.int64)
    got = ops.verify_chain(none, target_probs=torch.zeros(2, 1, 5), rule="typical")
    assert got.status.tolist() == [Status.NO_MASS] * 2 and got.tokens.tolist() == [[-1]] * 2


@pytest.mark.parametrize("uniform", [-1.0, float("nan"), 0.0, 1.0, 2.0, INF])
def test_any_uniform_gives_an_id_with_mass(ops, uniform):
    x = torch.full((1, 5000), -INF)
    x[0, 17], x[0, 4000] = -200.0, 0.0
    for filters in ({}, {"top_k": 2}):
        assert ops.sample(x, uniforms=torch.tensor([uniform]).double(), **filters).tokens.item() == 4000


def test_nan_of_a_draft_outside_the_list_is_an_error(ops):
    logits = torch.tensor([[[3.0, 2.0, 0.0, -1.0]] * 2])
    q = torch.tensor([[[0.4, 0.3, 0.2, float("nan")]]])
    for rule in ("ratio", "block"):
        random = {"uniforms": torch.full((1, 2), 0.5).double()}
        got = ops.verify_chain(torch.tensor([[3]]), q, target_logits=logits, rule=rule, top_k=2, **random)
        assert got.status.item() & Status.NAN and got.num_emitted.item() == 0
