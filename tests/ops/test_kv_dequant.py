"""kv_dequant: what the codes mean, rounded once."""

from __future__ import annotations

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import I32, KIVI, SCHEMES, Guarded, make_pages
from support import DTYPES, assert_same, check_op, raises, same_bits


def lens(*values):
    return torch.tensor(values, dtype=I32)


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


@pytest.mark.parametrize("scheme, bits", [("int8", 8), ("int4", 4), ("kivi4", 4), ("kivi2", 2)])
def test_unpacks_what_was_packed(ops, scheme, bits):
    """Split order, written down here once more: byte j of a run of n has codes j, j + n, j + 2 n, ..."""
    head_dim, size = 16, 8
    pages = make_pages(scheme, num_pages=1, page_size=size, heads=1, head_dim=head_dim, batch=1)
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2, size, head_dim), generator=g)
    steps = {"k": pages.k_scale, "v": pages.v_scale}
    for name, scale in steps.items():
        step = 0 if name == "k" and scheme in KIVI else -1
        scale.select(3 if step == 0 else -1, 0).fill_(1), scale.select(3 if step == 0 else -1, 1).fill_(0)

    def packed(runs):
        parts = runs.view(*runs.shape[:-1], 8 // bits, -1)
        return (parts << bits * torch.arange(8 // bits)[:, None]).sum(-2).to(torch.uint8)

    pages.v[0, :, 0] = packed(codes[1])
    if scheme in KIVI:
        pages.k[0, 0] = packed(codes[0].T)
    else:
        pages.k[0, :, 0] = packed(codes[0])
    back = ops.kv_dequant(pages, torch.zeros(1, 1, dtype=I32), lens(size))
    assert torch.equal(back.k[0, :, 0].long(), codes[0]) and torch.equal(back.v[0, :, 0].long(), codes[1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strides_threads_and_company_change_nothing(backend, scheme):
    ops = backend.ops
    pages = make_pages(scheme, num_pages=9, head_dim=32, batch=3)
    table, count = torch.arange(9, dtype=I32).view(3, 3), lens(20, 24, 5)
    tails = {"tail_lens": lens(3, 0, 5)} if scheme in KIVI else {}
    want = ops.kv_dequant(pages, table, count, **tails)
    guarded = Guarded(pages)
    assert_same(tuple(ops.kv_dequant(guarded.pages, table, count, **tails)), tuple(want), "strides")
    guarded.check()
    wide = torch.full((3, 9), -1, dtype=I32)
    wide[:, 4:7] = table
    assert_same(tuple(ops.kv_dequant(pages, wide[:, 4:7], count, **tails)), tuple(want), "strided table")
    for variant in backend.variants():
        assert_same(tuple(ops.kv_dequant(pages, table, count, **tails)), tuple(want), variant)
    if scheme not in KIVI:
        order = torch.tensor([2, 0, 1])
        assert_same(tuple(ops.kv_dequant(pages, table[order], count[order])), tuple(o[order] for o in want), "order")


def test_values_beyond_float16_saturate(ops):
    """The top of a grid may lie a little above the largest float16."""
    pages = make_pages("int4", num_pages=1, page_size=1, heads=1, head_dim=2)
    x = torch.tensor([65504.0, -65504.0]).view(1, 1, 2)
    ops.kv_append_(x, x, torch.zeros(1, dtype=torch.int64), pages)
    table = torch.zeros(1, 1, dtype=I32)
    assert ops.kv_dequant(pages, table, lens(1)).k.flatten()[0] > 65504
    assert ops.kv_dequant(pages, table, lens(1), dtype=torch.half).k.flatten().tolist() == [65504.0, -65504.0]


def test_sizes_of_nothing(ops):
    for scheme in SCHEMES:
        pages = make_pages(scheme)
        none = ops.kv_dequant(pages, torch.zeros(0, 3, dtype=I32), lens())
        assert none.k.shape == none.v.shape == (0, 24, 2, 16) and none.status.shape == (0,)
        none = ops.kv_dequant(pages, torch.zeros(2, 0, dtype=I32), lens(0, 1))
        assert none.k.shape == (2, 0, 2, 16) and none.status.tolist() == [0, 32]
        short = ops.kv_dequant(pages, torch.zeros(2, 0, dtype=I32), lens(0, 1), length=3)
        assert not short.k.any() and short.status.tolist() == [0, 32]


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_and_compile(ops, scheme):
    pages = make_pages(scheme)
    if scheme.startswith("fp8"):
        pages.k.zero_(), pages.v.zero_()  # not NaN
    table = torch.arange(3, dtype=I32)[:, None]
    tails = {"tail_lens": lens(3, 0, 1)} if scheme in KIVI else {}
    check_op(lambda: tuple(ops.kv_dequant(pages, table, lens(5, 0, 8), dtype=torch.half, **tails)))


def test_messages(ops):
    pages, table, zero = make_pages("int4"), torch.zeros(3, 2, dtype=I32), torch.zeros(3, dtype=I32)
    for change, message in (
        ({"page_table": table.long()}, "page_table: expected int32, got int64"),
        ({"page_table": table[:2]}, r"page_table: expected \[3, 2\], got \[2, 2\]"),
        ({"kv_lens": zero.long()}, "kv_lens: expected int32, got int64"),
        ({"kv_lens": zero[None]}, r"kv_lens: expected 1 dimensions, got \[1, 3\]"),
        ({"tail_lens": zero}, "tail_lens: expected None for this scheme, got a tensor"),
        ({"length": -1}, "length: expected at least 0, got -1"),
        ({"dtype": torch.int64}, "dtype: expected float32, got int64"),
    ):
        with raises(f"^kv_dequant: {message}"):
            ops.kv_dequant(**({"pages": pages, "page_table": table, "kv_lens": zero} | change))
    with raises(r"^kv_dequant: tail_lens: expected \[3\], got \[2\]"):
        ops.kv_dequant(make_pages("kivi2"), table, zero, tail_lens=zero[:2])
