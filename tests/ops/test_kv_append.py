"""kv_append_: codes, scales, rotation, scatter, against the reference byte for byte."""

from __future__ import annotations

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import (
    KIVI,
    SCHEMES,
    assert_same_pages,
    copy_of,
    hostile_tokens,
    make_pages,
    some_rope,
    some_slots,
)
from support import DTYPES, same_bits

SHAPES = [(64, 64), (96, 32), (16, 4), (128, 128), (10, 2), (6, 3), (256, 64)]  # head_dim, group


@pytest.mark.thin
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_reference(ops, scheme, dtype):
    for number, (head_dim, group) in enumerate(SHAPES):
        if scheme in KIVI and (head_dim % 4 or head_dim == 16):
            continue
        group = 8 if scheme in KIVI else group
        rotated = number % 3
        pages = make_pages(
            scheme, head_dim=head_dim, group=group, seed=number, layout=("HND", "NHD")[number % 2], dtype=torch.float16
        )
        tokens = 23
        k, v = (hostile_tokens(tokens, 2, head_dim, dtype, number, i, first=number) for i in (0, 1))
        given = {"k": k, "v": v, "slots": some_slots(pages, tokens, number)}
        if rotated:
            given |= {"rope": some_rope(9, head_dim, dtype), "interleaved": rotated == 2}
            given["positions"] = torch.arange(tokens) % 11 - 1
            given["q"] = hostile_tokens(tokens, 5, head_dim, dtype, number, 2)
        mine, want = copy_of(pages), copy_of(pages)
        q = {"q": given["q"].clone()} if rotated else {}
        status = ops.kv_append_(**given, pages=mine)
        expected = reference.append(**(given | q), pages=want)
        what = f"head_dim {head_dim}, group {group}"
        assert status.tolist() == expected.tolist(), what
        assert_same_pages(mine, want, what)
        if rotated:
            assert same_bits(given["q"], q["q"]), what
