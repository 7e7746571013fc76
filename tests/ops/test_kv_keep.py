"""kv_keep_: rows of an accepted path become consecutive, byte for byte."""

from __future__ import annotations

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import I32, KIVI, SCHEMES, assert_same_pages, copy_of, make_pages


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_reference(ops, scheme):
    pages = make_pages(scheme, num_pages=12, tail_size=16, batch=9)
    path = torch.tensor(
        [
            [0, 2, 3, 7],  # over a border of pages, sources among targets
            [0, 1, 2, 3],  # nothing moves
            [1, 9, 15, -5],
            [0, 2, 2, 3],  # does not rise
            [0, 1, -1, -1],  # -1 is read
            [0, 2, 3, 4],  # a page outside
            [5, 6, 7, 8],  # num_keep 0
            [0, 1, 2, 3],  # num_keep too large
            [0, 3, 8, 200],  # behind the page table, or the ring
        ],
        dtype=I32,
    )
    num_keep = torch.tensor([4, 4, 3, 4, 3, 4, 0, 5, 4], dtype=I32)
    base = torch.tensor([6, 5, 0, 3, 3, 7, 9, 0, 2], dtype=I32)
    table = torch.tensor(
        [[0, 1, 2], [3, 77, 77], [5, 6, 0], [7, 7, 7], [8, 8, 8], [9, 99, 10], [99, 99, 99], [11, 11, 11], [4, 4, 4]],
        dtype=I32,
    )
    mine, want = copy_of(pages), copy_of(pages)
    given = {} if scheme in KIVI else {"page_table": table}
    status = ops.kv_keep_(mine, path, num_keep, base, **given)
    assert status.tolist() == reference.keep(want, path, num_keep, base, **given).tolist()
    assert status.tolist() == [0, 0, 0, 32, 32, 0 if scheme in KIVI else 64, 0, 32, 32]
    assert_same_pages(mine, want)
