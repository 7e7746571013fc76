"""Every benchmark: the peers do the job that ours does, and the verifications end as their names say."""

from __future__ import annotations

import pytest
import torch

from fastdecode.cli.bench import benchmarks

OPS = benchmarks("report").ops()
COMPARABLE = {  # peer -> how far it may be from ours; the others draw, or give something less
    "torch topk+scatter": 1e-5,
    "torch sort+scatter": 1e-5,
    "torch softmax": 1e-5,
    "torch log_softmax+topk": 1e-4,
    "torch unpack+masked_fill_": 0,
    "xgrammar": 0,
    "torch scatter_add_+where": 1e-4,
    "torch linear": 1e-3,
    "kv_dequant + SDPA": 1e-4,
    "paged_attention of each": 0,
    "torch softmax of states": 1e-2,
    "torch topk": 0,
    "torch cumprod": 0,
    "torch index+decode": 1e-5,
    "torch decode+sum": 0.1,
}


def quick_cases(op):
    torch.manual_seed(0)
    return list(benchmarks(f"ops.bench_{op}").cases(True))


def first(result):
    """The tensor that both sides give first."""
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("op", OPS)
def test_every_call_runs_and_peers_agree(op):
    for case in quick_cases(op):
        assert case.elements > 0 and case.bytes_moved > 0
        assert not case.goals  # they are about the large shapes
        for name, peer in case.peers.items():
            arguments = [argument.clone() for argument in case.inputs[0]]
            mine = case.ours(*[argument.clone() for argument in arguments])
            other = peer(*arguments)
            if name in COMPARABLE:
                other = first(arguments if other is None else other).double()
                mine = first(mine).double().reshape_as(other)
                close = torch.isclose(mine, other, rtol=0, atol=COMPARABLE[name])
                assert bool((close | (mine == other)).all()), (case.shape, name)


def test_row_stats_and_its_peer():
    case = quick_cases("row_stats")[0]
    mine, peer = case.ours(*case.inputs[0]), case.peers["torch topk+log_softmax"](*case.inputs[0])
    assert torch.equal(mine.max, peer[0][:, 0]) and torch.equal(mine.second, peer[0][:, 1])
    assert torch.equal(mine.argmax, peer[1][:, 0])
    assert torch.allclose(mine.logsumexp, peer[2]) and torch.allclose(mine.entropy, peer[3], rtol=1e-4)


def test_verify_chain_and_its_peer():
    for case in quick_cases("verify_chain"):
        arguments = case.inputs[0]
        mine, batch = case.ours(*arguments), len(arguments[0])
        accepted = 2 if "rejects" in case.shape else 4
        assert mine.num_accepted.tolist() == [accepted] * batch, case.shape
        if "uniforms" in case.shape:
            assert torch.equal(mine.tokens, case.peers["torch"](*arguments)), case.shape


def test_commit_and_its_peer():
    for case in quick_cases("commit"):
        states = [[argument.clone() for argument in case.inputs[0]] for _ in range(2)]
        mine, peer = case.ours(*states[0]), case.peers["torch masks"](*states[1])
        assert all(torch.equal(a.long(), b.long()) for a, b in zip(mine, peer, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_goals_are_about_all_large_shapes():
    large = [shape for shape in benchmarks("inputs").logits_shapes(False) if shape.large]
    assert {(shape.batch, shape.vocab_size, shape.dtype) for shape in large} == {
        (batch, vocab_size, dtype)
        for batch in (1, 8, 64)
        for vocab_size in (128256, 151936)
        for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.mark.parametrize("op", ["row_stats", "sample", "topk_logits", "verify_chain"])
def test_ops_with_goals_have_them(op, monkeypatch):
    module, inputs = benchmarks(f"ops.bench_{op}"), benchmarks("inputs")
    monkeypatch.setattr(module, "logits_shapes", lambda quick: [inputs.Shape(1, 128256, torch.float32)])
    monkeypatch.setattr(inputs, "MOST_BYTES", 0)  # two copies
    texts = [goal.text for case in module.cases(False) for goal in case.goals]
    assert (
        texts
        == {
            "row_stats": ["<= max(1.3 reads, 0.18 ns per element)"],
            "sample": [
                "<= max(2 reads, 0.2 ns per element)",
                "3x as fast as torch topk+multinomial",
                "<= max(2 reads, 0.2 ns per element)",
                "50x as fast as torch sort+multinomial",
                "<= max(2 reads, 0.2 ns per element)",
            ],
            "topk_logits": ["3x as fast as torch topk"],
            "verify_chain": [
                "<= 60 us beyond the call alone",
                "<= 0.6 ns x 128256 beyond fastdecode, uniforms",
                "<= 1.3x the time of fastdecode row_stats",
            ],
        }[op]
    )


@pytest.mark.parametrize("op", ["kv_append", "kv_flush", "kv_keep"])
def test_cache_ops_and_their_peers_leave_the_same(op):
    """Of codes most are the same: the torch expressions do not round step and offset before they code."""
    for case in quick_cases(op):
        left = []
        pages = case.ours.keywords["pages"]
        tensors = [t for t in (pages.k, pages.v, pages.k_scale, pages.v_scale) if t is not None]
        for tensor in tensors if op == "kv_keep" else []:
            tensor.copy_(torch.randint(100, tensor.shape))
        before = [t.clone() for t in tensors]
        for call in (case.ours, next(iter(case.peers.values()))):
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
            call(*case.inputs[0])
            left.append([t.clone() for t in tensors])
        for ours, theirs, old in zip(*left, before, strict=True):
            assert not torch.equal(ours, old), case.shape
            same = ours == theirs if ours.dtype == torch.uint8 else torch.isclose(ours, theirs, rtol=0.03, atol=0.01)
            assert same.double().mean() > (0.9 if op != "kv_keep" else 0.999), (case.shape, same.double().mean())
