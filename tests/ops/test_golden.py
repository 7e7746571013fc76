"""Tokens that must never change: what the reference once gave, pinned in tests/golden. sample: test_sample.py."""

from __future__ import annotations

import json

import pytest
import torch

from golden_chains import CLEAR, PATH, RULES, as_dtype, both, inputs


def pinned() -> list[dict]:
    return json.loads(PATH.read_text())["cases"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_verify_chain(ops, cpu_level, dtype):
    for case in pinned():
        out = ops.verify_chain(**as_dtype(inputs(case), dtype))
        assert out.tokens.tolist() == [case["tokens"]] and out.num_accepted.tolist() == [case["num_accepted"]], case
        assert out.status.tolist() == [0]


def test_verify_chain_is_that_of_the_reference():
    found = pinned()
    for case in found:
        for out in both(case):
            assert out.margin[0] > CLEAR and out.tokens[0].tolist() == case["tokens"], case
    for rule in RULES:  # no kept draft, some, all of them
        chains = [(case["num_accepted"], case["draft_len"]) for case in found if case["rule"] == rule]
        assert len(chains) >= 25
        assert {0 if kept == 0 else 2 if kept == length else 1 for kept, length in chains} == {0, 1, 2}
