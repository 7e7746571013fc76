"""kv_flush_: keys coded along tokens, values along channels, as a function of the tokens alone."""

from __future__ import annotations

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import I32, KIVI, assert_same_pages, copy_of, hostile_tokens, make_pages
from support import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", KIVI)
def test_equals_reference(ops, scheme, dtype):
    for group, page_size, head_dim in ((8, 8, 16), (4, 12, 8), (16, 32, 48)):
        pages = make_pages(
            scheme,
            page_size=page_size,
            head_dim=head_dim,
            group=group,
            dtype=dtype,
            tail_size=2 * group + 5,
            batch=8,
            num_pages=8,
        )
        for i, tail in enumerate((pages.k_tail, pages.v_tail)):
            rows = hostile_tokens(8 * tail.shape[1], 2, head_dim, dtype, group, i, first=i)
            tail.copy_(rows.view(tail.shape))
            tail[1] = tail[0].nan_to_num(0, 1, -1).clamp(-5, 5)
        table = torch.tensor([[0, 1], [2, 3], [4, 4], [8, 8], [0, -1], [1, 1], [3, 0], [5, 6]], dtype=I32)
        begin = torch.tensor([0, group, 0, 0, page_size, 1, -group, 0], dtype=I32)
        end = torch.tensor([group, 2 * group, 0, group, page_size + group, group + 1, 0, 3 * group], dtype=I32)
        if group == 4:
            begin[6], end[6] = 2 * page_size - group, 2 * page_size + group  # behind the page table
        mine, want = copy_of(pages), copy_of(pages)
        status = ops.kv_flush_(mine, table, begin, end)
        assert status.tolist() == reference.flush(want, table, begin, end).tolist()
        assert status[1:7].tolist() == [0, 0, 64, 64, 32, 32]
        assert group == 4 or status[7] == 32  # more than the ring has
        assert_same_pages(mine, want, f"group {group}")
