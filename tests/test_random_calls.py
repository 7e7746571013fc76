"""The random calls are calls: every one is taken by the CPU kernels, and between them they reach what they should."""

from __future__ import annotations

import pytest
import torch

import fastdecode.ops
import random_calls
from random_calls import CALLS, OPS, RULES
from support import same_bits, tensors_of


def test_every_op_has_an_entry():
    assert sorted(CALLS) == sorted(OPS), "add random calls of the new op to CALLS"


@pytest.mark.parametrize("op", OPS)
def test_calls_are_valid_and_repeat(op):
    shapes = set()
    for seed in range(60):
        arguments, again = (random_calls.call(op, seed) for _ in range(2))
        shapes.add(str([(v.shape, v.stride()) for v in tensors_of(arguments.values())]))
        out = random_calls.outputs(fastdecode.ops, op, arguments)
        assert all(map(same_bits, out, random_calls.outputs(fastdecode.ops, op, again))), seed
    assert len(shapes) > 45


def test_the_order_of_a_sum_shows():
    arguments = random_calls.sum_in_order()
    assert fastdecode.ops.verify_chain(**arguments).tokens.tolist() == [[0, -1]] * 2
    arguments["draft_probs"] = arguments["draft_probs"].flip(-1)
    assert fastdecode.ops.verify_chain(**arguments).tokens.tolist() == [[1, -1]] * 2


def test_chains_of_every_rule_are_kept_and_rejected():
    kept: dict[str, set] = {}
    for seed in range(600):
        arguments = random_calls.call("verify_chain", seed)
        rule = "typical, sampled" if "bonus" in arguments else arguments["rule"]
        lens = arguments.get("draft_lens", torch.tensor(arguments["draft_tokens"].shape[1]))
        out = fastdecode.ops.verify_chain(**arguments)
        found = kept.setdefault(rule, set())
        good = (out.status & ~28 == 0) & (out.num_emitted > 0)
        found |= {"none"} if (good & (out.num_accepted == 0) & (lens > 0)).any() else set()
        found |= {"some"} if (good & (out.num_accepted > 0) & (out.num_accepted < lens)).any() else set()
        found |= {"all"} if (good & (out.num_accepted == lens) & (lens > 1)).any() else set()
        found |= {"error"} if (out.status & 3 != 0).any() else set()
    assert set(kept) == set(RULES)
    assert all(found == {"none", "some", "all", "error"} for found in kept.values()), kept
