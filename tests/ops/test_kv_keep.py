"""kv_keep_: rows of an accepted path become consecutive, byte for byte."""

from __future__ import annotations

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import (
    I32,
    KIVI,
    PAGED,
    SCHEMES,
    Guarded,
    assert_same_pages,
    copy_of,
    hostile_tokens,
    make_pages,
    some_rope,
    tensors,
)
from support import check_op, raises, same_bits


def lens(*values):
    return torch.tensor(values, dtype=I32)


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


@pytest.mark.parametrize("base", [0, 3, 7, 13, 14])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_accepted_path_equals_plain_appending(ops, scheme, base):
    """Nodes of a tree are stored at slots of their own, rotated by their depth; the kept ones end up as if they had
    been appended one after the other: over borders of pages, around the ring, sources among the targets."""
    group = 4 if scheme in PAGED else 8
    pages = make_pages(scheme, page_size=8, head_dim=16, group=group, batch=2, tail_size=16, num_pages=6)
    table = torch.tensor([[5, 2, 0], [1, 4, 3]], dtype=I32)
    parents = [-1, 0, 0, 1, 1, 2, 4, 4, 6, 8]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    path = [0, 1, 4, 6, 8, 9]
    k, v = (hostile_tokens(base + 10, 2, 16, torch.float32, base, i, first=i) for i in (0, 1))
    rope = some_rope(40, 16, torch.float32)

    def slots(b, at):
        at = torch.tensor(at, dtype=torch.int64)
        return b * 16 + at % 16 if scheme in KIVI else table[b].long()[at // 8] * 8 + at % 8

    def put(target, b, rows, places, positions):
        given = {"rope": rope, "positions": torch.tensor(positions, dtype=torch.int64)}
        return ops.kv_append_(k[rows], v[rows], slots(b, places), target, **given)

    committed = list(range(base))
    for b in (0, 1):
        put(pages, b, committed, committed, committed)
    nodes = [base + i for i in range(10)]
    plain = copy_of(pages)
    put(pages, 0, nodes, nodes, [base + d for d in depths])
    kept = [base + node for node in path]
    put(plain, 0, kept, [base + i for i in range(6)], [base + i for i in range(6)])
    given = {} if scheme in KIVI else {"page_table": table}
    paths = torch.tensor([[*path, -7], [0] * 7], dtype=I32)
    assert ops.kv_keep_(pages, paths, lens(6, 1), lens(base, base), **given).tolist() == [0, 0]
    first = max(0, base + 10 - 16) if scheme in KIVI else 0  # what the ring still has
    for name, tensor in tensors(pages).items():
        if tensor.dim() == 1 or (scheme in KIVI) != name.endswith("tail"):
            continue
        for t in range(first, base + 6):
            at = (0, t % 16) if scheme in KIVI else (int(table[0, t // 8]), t % 8)
            assert same_bits(tensor[at], tensors(plain)[name][at]), (name, t)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_moves_its_rows_and_nothing_else(backend, scheme, layout):
    ops = backend.ops
    pages = make_pages(scheme, layout=layout, head_dim=8, group=8 if scheme in KIVI else 2, num_pages=9)
    path = torch.tensor([[1, 3, 4, 9], [0, 5, 6, 7], [2, 5, 5, 6]], dtype=I32)
    table = torch.arange(9, dtype=I32).view(3, 3)
    given = {} if scheme in KIVI else {"page_table": table}
    want = copy_of(pages)
    expected = reference.keep(want, path, lens(4, 2, 3), lens(6, 15, 0), **given)
    assert expected.tolist() == [0, 0, 32]
    guarded = Guarded(pages)
    assert ops.kv_keep_(guarded.pages, path, lens(4, 2, 3), lens(6, 15, 0), **given).tolist() == [0, 0, 32]
    assert_same_pages(guarded.pages, want)
    guarded.check()
    for variant in backend.variants():
        mine = copy_of(pages)
        ops.kv_keep_(mine, path, lens(4, 2, 3), lens(6, 15, 0), **given)
        assert_same_pages(mine, want, variant)


def test_static_scales_stay(ops):
    pages = make_pages("fp8_e4m3", static_scales=True)
    before = copy_of(pages)
    table = torch.tensor([[0, 1]], dtype=I32)
    assert ops.kv_keep_(pages, torch.tensor([[3, 9]], dtype=I32), lens(2), lens(2), page_table=table).tolist() == [0]
    assert same_bits(pages.k_scale, before.k_scale)
    assert same_bits(pages.k[0, 2], before.k[0, 5]) and same_bits(pages.v[0, 3], before.v[1, 3])


def test_sizes_of_nothing(ops):
    none = torch.zeros(0, 3, dtype=I32)
    assert ops.kv_keep_(make_pages("plain"), none, lens(), lens(), page_table=none).shape == (0,)
    assert ops.kv_keep_(make_pages("kivi4", batch=0), none, lens(), lens()).shape == (0,)
    table, path = torch.zeros(2, 1, dtype=I32), torch.zeros(2, 0, dtype=I32)
    assert ops.kv_keep_(make_pages("int4"), path, lens(0, 1), lens(3, 3), page_table=table).tolist() == [0, 32]


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_and_compile(ops, scheme):
    pages = make_pages(scheme)
    if scheme.startswith("fp8"):
        pages.k.zero_(), pages.v.zero_()  # not NaN
    path, table = torch.tensor([[1, 4]] * 3, dtype=I32), torch.arange(3, dtype=I32)[:, None]
    pages.k.copy_(pages.k.flip(1))

    def call():
        mine = copy_of(pages)
        given = {} if scheme in KIVI else {"page_table": table}
        return ops.kv_keep_(mine, path, lens(2, 0, 1), lens(2, 2, 2), **given), *tensors(mine).values()

    check_op(call)


def test_messages(ops):
    pages, kivi = make_pages("int4"), make_pages("kivi4")
    path, zero, table = torch.zeros(3, 2, dtype=I32), torch.zeros(3, dtype=I32), torch.zeros(3, 2, dtype=I32)
    good = {"pages": pages, "path": path, "num_keep": zero, "base_lens": zero, "page_table": table}
    for change, message in (
        ({"page_table": None}, "page_table: expected a tensor for this scheme, got None"),
        ({"pages": kivi}, "page_table: expected None for this scheme, got a tensor"),
        ({"page_table": table[:2]}, r"page_table: expected \[3, 2\], got \[2, 2\]"),
        ({"path": path[0]}, r"path: expected 2 dimensions, got \[2\]"),
        ({"path": path.long()}, "path: expected int32, got int64"),
        ({"path": path[:1]}, r"path: expected \[3, 2\], got \[1, 2\]"),
        ({"num_keep": zero[:1]}, r"num_keep: expected \[3\], got \[1\]"),
        ({"base_lens": zero.long()}, "base_lens: expected int32, got int64"),
    ):
        with raises(f"^kv_keep_: {message}"):
            ops.kv_keep_(**(good | change))
    with raises("^kv_keep_: k_tail: expected a ring for each of 2 requests, got 3"):
        ops.kv_keep_(kivi, path[:2], zero[:2], zero[:2])
