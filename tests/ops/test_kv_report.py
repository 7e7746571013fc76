"""kv_report: errors of a cache without a copy of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import I32, KIVI, SCHEMES, Guarded, make_pages
from support import DTYPES, assert_same, check_op, generator, raises


@pytest.mark.thin
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_reference(ops, scheme, dtype):
    for layout, head_dim in (("HND", 16), ("NHD", 72)):
        pages = make_pages(
            scheme, num_pages=20, page_size=16, head_dim=head_dim, layout=layout, tail_size=6, batch=4, dtype=torch.half
        )
        for cache, width in ((pages.k, 15), (pages.v, 15)):
            if scheme.startswith("fp8"):
                cache &= width | 0x60  # no NaN, no inf
        table = torch.arange(20, dtype=I32).view(4, 5).clone()
        table[3, 2] = 20
        lens = torch.tensor([80, 0, 33, 41], dtype=I32)
        tails = torch.tensor([5, 0, 6, 1], dtype=I32) if scheme in KIVI else None
        k, v = (torch.randn(4, 80, 2, head_dim, generator=generator(i), dtype=torch.float64) for i in (1, 2))
        k, v = k.to(dtype), v.to(dtype)
        mine = ops.kv_report(k, v, pages, table, lens, tail_lens=tails)
        want, status = reference.report(k, v, pages, table, lens, tail_lens=tails)
        assert mine.status.tolist() == status.tolist() == [0, 0, 0, 64]
        got = mine.errors.numpy().astype(np.longdouble)
        assert (np.isnan(got) == np.isnan(want)).all() and np.isnan(want[:, 3]).all()
        # As many roundings of positive numbers as there are numbers in a head.
        close = np.abs(got - want) <= 80 * head_dim * np.finfo(np.float64).eps * want
        assert close[:, :3].all()


def test_nan_and_inf_reach_the_report(ops):
    pages = make_pages("int4")
    table, lens = torch.arange(3, dtype=I32)[None], torch.tensor([24], dtype=I32)
    k, v = torch.zeros(1, 24, 2, 16), torch.zeros(1, 24, 2, 16)
    k[0, 3, 0, 5], v[0, 23, 1, 0] = torch.nan, torch.inf
    errors, status = ops.kv_report(k, v, pages, table, lens)
    assert status.tolist() == [0]
    assert torch.isnan(errors[0, 0, 0]).all() and torch.isfinite(errors[0, 0, 1]).all()
    assert torch.isinf(errors[1, 0, 1]).all() and torch.isfinite(errors[1, 0, 0]).all()


def test_strides_threads_and_builds_change_nothing(backend):
    ops = backend.ops
    pages = make_pages("int4", num_pages=20, page_size=16, head_dim=72)
    table, lens = torch.arange(20, dtype=I32).view(4, 5), torch.tensor([80, 0, 33, 41], dtype=I32)
    k, v = (torch.randn(4, 80, 2, 72, generator=generator(i)) for i in (1, 2))
    want = tuple(ops.kv_report(k, v, pages, table, lens))
    other = k.transpose(1, 2).contiguous().transpose(1, 2), v.flip(0).contiguous().flip(0)
    assert_same(tuple(ops.kv_report(*other, Guarded(pages).pages, table, lens)), want, "strides")
    for variant in backend.variants():
        assert_same(tuple(ops.kv_report(k, v, pages, table, lens)), want, variant)


def test_sizes_of_nothing(ops):
    none = torch.zeros(0, 3, 2, 16)
    out = ops.kv_report(none, none, make_pages("int8"), torch.zeros(0, 3, dtype=I32), torch.zeros(0, dtype=I32))
    assert out.errors.shape == (2, 0, 2, 3) and out.status.shape == (0,)
    none, table = torch.zeros(1, 0, 2, 16), torch.zeros(1, 3, dtype=I32)
    out = ops.kv_report(none, none, make_pages("int8"), table, torch.zeros(1, dtype=I32))
    assert not out.errors.any() and out.status.tolist() == [0]


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    pages, x = make_pages("int4"), torch.randn(3, 8, 2, 16)
    table, lens = torch.arange(3, dtype=I32)[:, None], torch.tensor([5, 0, 8], dtype=I32)
    check_op(lambda: tuple(ops.kv_report(x, x, pages, table, lens)))


def test_messages(ops):
    x, table, zero = torch.zeros(3, 5, 2, 16), torch.zeros(3, 2, dtype=I32), torch.zeros(3, dtype=I32)
    good = {"k": x, "v": x, "pages": make_pages("int4"), "page_table": table, "kv_lens": zero}
    for change, message in (
        ({"k": x[0]}, r"k: expected 4 dimensions, got \[5, 2, 16\]"),
        ({"k": x[:, :, :1]}, r"k: expected \[3, 5, 2, 16\], got \[3, 5, 1, 16\]"),
        ({"v": x[:, :4]}, r"v: expected \[3, 5, 2, 16\], got \[3, 4, 2, 16\]"),
        ({"v": x.half()}, "v: expected float32, got float16"),
        ({"page_table": table[:2]}, r"page_table: expected \[3, 2\], got \[2, 2\]"),
        ({"kv_lens": zero.long()}, "kv_lens: expected int32, got int64"),
        ({"tail_lens": zero}, "tail_lens: expected None for this scheme, got a tensor"),
    ):
        with raises(f"^kv_report: {message}"):
            ops.kv_report(**(good | change))
