"""kv_dequant: what the codes mean, rounded once."""

from __future__ import annotations

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import I32, KIVI, SCHEMES, make_pages
from support import DTYPES, same_bits


@pytest.mark.thin
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_reference(ops, scheme, dtype):
    for layout, head_dim in (("HND", 16), ("NHD", 40)):
        pages = make_pages(scheme, head_dim=head_dim, layout=layout, tail_size=6, batch=8, dtype=torch.bfloat16)
        table = torch.tensor([[0, 4, 2], [3, 3, 9], [1, 9, 9], [1, 2, -1], [0, 1, 2], [0, 0, 0], [1, 1, 1], [4, 3, 2]])
        lens = torch.tensor([24, 16, 0, 17, 21, -1, 22, 13], dtype=I32)
        tails = torch.tensor([0, 2, 0, 2, 6, 0, 7, 1], dtype=I32) if scheme in KIVI else None
        for length in (21, None):
            mine = ops.kv_dequant(pages, table.int(), lens, tail_lens=tails, length=length, dtype=dtype)
            want = reference.dequant(pages, table.int(), lens, tail_lens=tails, length=length, dtype=dtype)
            assert mine.status.tolist() == want[2].tolist()
            assert mine.status[[1, 5]].tolist() == [0, 32] and mine.status[3] == (0 if scheme in KIVI else 64)
            for got, exact in zip(mine[:2], want[:2], strict=True):
                assert same_bits(got, exact), (layout, length)
