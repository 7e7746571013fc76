"""The CUDA kernels, run by the host executor, give the bits of the CPU kernels: tokens, integers and floats.

Every op on random calls, each under several orders of threads and both patterns of fresh shared memory. Floats are
equal bit for bit because every sum, exp and log is written out operation by operation on both sides; those of
random_calls.ROUNDED are near the CPU's, and the same bits under every order.
"""

from __future__ import annotations

import pytest
import torch

import backends
import fastdecode.ops
import random_calls
from random_calls import OPS
from support import same_bits

CALLS, SEEDS = 50, 5

pytestmark = pytest.mark.skipif(backends.why_not("simt") is not None, reason=str(backends.why_not("simt")))


def described(arguments: dict) -> str:
    return ", ".join(
        f"{k} {tuple(v.shape)} {v.stride()} {v.dtype}" if isinstance(v, torch.Tensor) else f"{k} {v}"
        for k, v in arguments.items()
    )


@pytest.mark.parametrize("op", OPS)
def test_equals_cpu(op):
    torch.set_num_threads(1)
    simt = backends.Simt(seed=0)
    ops = backends.Ops(simt.once)
    for number in range(CALLS):
        arguments = random_calls.call(op, number)
        want = random_calls.outputs(fastdecode.ops, op, arguments)
        if op in random_calls.ROUNDED:
            simt.configure(1000 * number, 0)
            on_cpu, want = want, random_calls.outputs(ops, op, arguments)
            assert random_calls.agree(op, on_cpu, want), f"call {number}: {described(arguments)}\n{on_cpu}\n{want}"
        for seed in range(SEEDS):
            for poison in (0, 1) if number % 5 == 0 else (seed % 2,):
                simt.configure(1000 * number + seed, poison)
                got = random_calls.outputs(ops, op, arguments)
                for i, (a, b) in enumerate(zip(want, got, strict=True)):
                    assert same_bits(a, b), (
                        f"output {i} of call {number}, seed {1000 * number + seed}, poison {poison}: "
                        f"{described(arguments)}\n{a}\n{b}"
                    )
