"""kv_flush_: keys coded along tokens, values along channels, as a function of the tokens alone."""

from __future__ import annotations

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import I32, KIVI, Guarded, assert_same_pages, copy_of, hostile_tokens, make_pages, tensors
from support import DTYPES, check_op, generator, raises, same_bits


def lens(*values):
    return torch.tensor(values, dtype=I32)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme, bits", [("kivi4", 4), ("kivi2", 2)])
def test_error_is_at_most_half_a_step(ops, scheme, bits, dtype):
    """Along tokens for keys, along channels for values, for the step that is stored; constants are exact."""
    group, head_dim = 8, 24
    pages = make_pages(scheme, head_dim=head_dim, group=group, dtype=dtype, batch=1, tail_size=24, num_pages=3)
    for i, ring in enumerate((pages.k_tail, pages.v_tail)):
        ring.copy_(hostile_tokens(24, 2, head_dim, dtype, i, first=i)[None].nan_to_num(0, 9, -9).clamp(-65280, 65280))
    pages.k_tail[:, :, :, 3], pages.v_tail[:, :, :, 8:16] = 1.5, -0.25
    table, zero = torch.tensor([[2, 0, 1]], dtype=I32), lens(0)
    assert ops.kv_flush_(pages, table, zero, lens(24)).tolist() == [0]
    back = ops.kv_dequant(pages, table, lens(24), dtype=torch.float64)
    at = table[0].long()
    # [tokens, H, D] of steps: of keys per page, head and group of tokens, of values per token and group of channels
    key_steps = pages.k_scale[at, :, :, 0].transpose(1, 2).flatten(0, 1).repeat_interleave(group, 0).double()
    value_steps = pages.v_scale[at, ..., 0].flatten(0, 1).repeat_interleave(group, -1).double()
    for x, y, steps in (
        (pages.k_tail[0], back.k[0], key_steps),
        (pages.v_tail[0], back.v[0], value_steps),
    ):
        # Rounding to long double does not pass the bound, which has the bits of a float16.
        error = abs(x.double().numpy().astype("longdouble") - y.numpy().astype("longdouble"))
        assert (error <= steps.numpy().astype("longdouble") / 2).all()
    assert (back.k[..., 3] == 1.5).all() and (back.v[..., 8:16] == -0.25).all()
    assert (key_steps > 0).sum() > 0.5 * key_steps.numel()


@pytest.mark.parametrize("scheme", KIVI)
def test_codes_are_a_function_of_the_tokens(backend, scheme):
    """Not of the order of appending and coding, the place in the ring, the pages, the other requests, threads."""
    ops, total, group, ring = backend.ops, 40, 8, 24
    table = torch.tensor([[3, 0, 4, 1, 2]], dtype=I32)

    def pages_of(seed, **more):
        return make_pages(scheme, head_dim=16, group=group, batch=2, tail_size=ring, num_pages=12, seed=seed, **more)

    k, v = (hostile_tokens(total, 2, 16, torch.float32, i, first=i) for i in (0, 1))

    def run(pieces, pages, row=0, pages_at=None):
        """Tokens come in pieces; groups are coded when they are complete, as late as the ring allows."""
        at = table if pages_at is None else pages_at
        both = at.expand(2, -1).contiguous() if row == 0 else torch.cat([table, at])
        done = here = 0
        for piece in pieces:
            if here + piece - done > ring:  # make room
                end = here // group * group
                status = ops.kv_flush_(pages, both, lens(*[done] * 2), lens(*[end if b == row else 0 for b in (0, 1)]))
                assert status.tolist()[1 - row] == 0
                done = end
            where = torch.arange(here, here + piece)
            ops.kv_append_(k[where], v[where], row * ring + where % ring, pages)
            here += piece
        ops.kv_flush_(pages, both, lens(*[done] * 2), lens(*[total if b == row else 0 for b in (0, 1)]))
        order = at[0].long()
        return [tensors(pages)[name][order] for name in ("k", "v", "k_scale", "v_scale")]

    want = run([24, 16], pages_of(0))
    for pieces in ([1] * total, [8] * 5, [16, 1, 1, 6, 5, 11], [3] * 13 + [1]):
        assert all(map(same_bits, run(pieces, pages_of(len(pieces))), want)), pieces
    elsewhere = torch.tensor([[11, 5, 9, 7, 6]], dtype=I32)
    assert all(map(same_bits, run([20, 4, 16], pages_of(1), row=1, pages_at=elsewhere), want))
    assert all(map(same_bits, run([24, 16], pages_of(2, layout="NHD")), want))
    for variant in backend.variants():
        assert all(map(same_bits, run([24, 16], pages_of(3)), want)), variant


@pytest.mark.parametrize("scheme", KIVI)
def test_writes_its_groups_and_nothing_else(ops, scheme):
    """Rings keep their tokens; other groups of the same page their codes."""
    pages = make_pages(scheme, page_size=16, head_dim=16, layout="NHD")
    guarded, table = Guarded(pages), torch.tensor([[0, 1], [2, 3], [4, 9]], dtype=I32)
    before = copy_of(pages)
    begin, end = lens(8, 16, 8), lens(16, 24, 24)
    status = ops.kv_flush_(guarded.pages, table, begin, end)
    assert status.tolist() == [0, 0, 64]
    reference.flush(pages, table, begin, end)
    assert_same_pages(guarded.pages, pages)
    guarded.check()
    assert same_bits(pages.k_tail, before.k_tail) and same_bits(pages.v_tail, before.v_tail)
    assert same_bits(pages.v[0, :8], before.v[0, :8]) and not same_bits(pages.v[0, 8:], before.v[0, 8:])
    half = pages.k.shape[-1] // 2
    assert same_bits(pages.k[0, ..., :half], before.k[0, ..., :half])
    assert same_bits(pages.k[[1, 2, 4]], before.k[[1, 2, 4]])


def test_sizes_of_nothing(ops):
    pages = make_pages("kivi4", batch=0)
    assert ops.kv_flush_(pages, torch.zeros(0, 2, dtype=I32), lens(), lens()).shape == (0,)
    pages = make_pages("kivi4", batch=2, tail_size=0)
    table = torch.zeros(2, 2, dtype=I32)
    assert ops.kv_flush_(pages, table, lens(0, 0), lens(0, 8)).tolist() == [0, 32]
    pages = make_pages("kivi4", batch=2, num_pages=0)
    assert ops.kv_flush_(pages, table, lens(0, 0), lens(0, 8)).tolist() == [0, 64]
    assert ops.kv_flush_(pages, table[:, :0], lens(0, 0), lens(0, 8)).tolist() == [0, 32]


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("scheme", KIVI)
def test_opcheck_and_compile(ops, scheme):
    pages = make_pages(scheme)
    pages.k_tail.copy_(torch.randn(pages.k_tail.shape, generator=generator(1)))
    table = torch.arange(3, dtype=I32)[:, None]

    def call():
        mine = copy_of(pages)
        return ops.kv_flush_(mine, table, lens(0, 0, 0), lens(8, 0, 8)), *tensors(mine).values()

    check_op(call)


def test_messages(ops):
    pages, table, zero = make_pages("kivi4"), torch.zeros(3, 2, dtype=I32), torch.zeros(3, dtype=I32)
    for arguments, message in (
        ((make_pages("int4"), table, zero, zero), r"scheme: expected 5 or 6 \(kivi\), got 4"),
        ((pages, table[0], zero, zero), r"page_table: expected 2 dimensions, got \[2\]"),
        ((pages, table.long(), zero, zero), "page_table: expected int32, got int64"),
        ((pages, table[:2], zero, zero), r"page_table: expected \[3, 2\], got \[2, 2\]"),
        ((pages, table, zero[:2], zero[:2]), "k_tail: expected a ring for each of 2 requests, got 3"),
        ((pages, table, zero.long(), zero), "begin: expected int32, got int64"),
        ((pages, table, zero, zero[:2]), r"end: expected \[3\], got \[2\]"),
    ):
        with raises(f"^kv_flush_: {message}"):
            ops.kv_flush_(*arguments)
