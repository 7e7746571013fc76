from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdecode
from attention_inputs import SCHEMES, Inputs, make
from fastdecode import Status
from fastdecode.testing.reference import attention as reference
from support import DTYPES, assert_as_good_as_torch, assert_same, check_op, raises, same_bits, views

I32, F64, BF16 = torch.int32, torch.float64, torch.bfloat16


def prefixes(rows: int = 9, **options: Any) -> Inputs:
    """Groups with prefixes of their own; q [rows, Hq, D] by group_start."""
    inputs = make(**{"lens": (70, 0, 33), "slots": rows, "tail": None, **options})
    starts = torch.tensor([1, 3, 5, 8], dtype=I32)
    return replace(inputs, q=inputs.q[0], options={"group_start": starts})


def call(op: Any, inputs: Inputs, **changes: Any) -> Any:
    arguments = {"q": inputs.q, "pages": inputs.pages, "page_table": inputs.page_table, "prefix_lens": inputs.kv_lens}
    return op(**{**arguments, **inputs.options, **changes})


def plain_attention(inputs: Inputs) -> Tensor:
    """The PyTorch expression in the dtype of q."""
    q, starts = inputs.q, inputs.options["group_start"]
    out = torch.zeros_like(q)
    for g, length in enumerate(inputs.kv_lens.tolist()):
        if not length:
            continue
        pair = reference.keys_and_values(inputs.pages, inputs.page_table[g], length)
        k, v = (t.to(q.dtype).repeat_interleave(q.shape[1] // t.shape[1], 1) for t in pair)
        here = slice(int(starts[g]), int(starts[g + 1]))
        scores = torch.einsum("nhd,thd->nht", q[here], k) * q.shape[-1] ** -0.5
        out[here] = torch.einsum("nht,thd->nhd", torch.softmax(scores, -1), v)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(ops, dtype):
    for scheme in (*SCHEMES, "fp8_static"):
        inputs = prefixes(scheme=scheme, dtype=dtype)
        out, lse, status = call(ops.prefix_attention, inputs)
        want = call(reference.prefix_attention, inputs)
        assert status.tolist() == want.status.tolist() == [0, 0, 0]
        assert_as_good_as_torch(out, want.out, plain_attention(inputs), f"{scheme} {dtype}")
        got, exact = lse.double(), torch.from_numpy(want.lse.astype(float))
        torch.testing.assert_close(
            got, exact, rtol=0, atol={F64: 1e-13, BF16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
        )
        nobody = [0, 3, 4, 8]  # before, behind, or with a prefix of no tokens
        assert (out[nobody] == 0).all() and torch.isneginf(lse[nobody]).all()


def test_softcap_and_scale(ops):
    inputs = prefixes(dtype=F64)
    for options in ({"softcap": 2.0}, {"scale": 0.9}, {"softcap": 20.0, "scale": 3.0}):
        out, lse, _ = call(ops.prefix_attention, inputs, **options)
        want = call(reference.prefix_attention, inputs, **options)
        torch.testing.assert_close(out, torch.from_numpy(want.out.astype(float)), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(lse, torch.from_numpy(want.lse.astype(float)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_bits_of_paged_attention(ops, dtype):
    """A group of n rows is a request of n queries without a mask."""
    for scheme in ("plain", "int8", "fp8_e4m3"):
        inputs = make(scheme=scheme, dtype=dtype, lens=(130, 64), slots=3)
        paged = inputs(ops.paged_attention, causal=False)
        flat = replace(
            inputs, q=inputs.q.flatten(0, 1), options={"group_start": torch.tensor([0, 3, 6], dtype=I32)}
        )  # fmt: skip
        out, lse, status = call(ops.prefix_attention, flat)
        assert same_bits(out, paged.out.flatten(0, 1)) and same_bits(lse, paged.lse.flatten(0, 1))
        assert status.tolist() == [0, 0]


def test_bits_do_not_depend_on_company_or_threads(ops):
    for dtype in DTYPES:
        inputs = prefixes(dtype=dtype, lens=(1300, 64, 70), head_dim=64)
        want = call(ops.prefix_attention, inputs)
        for row in (1, 6):
            group = 0 if row == 1 else 2
            alone = replace(
                inputs,
                q=inputs.q[row : row + 1],
                page_table=inputs.page_table[group : group + 1],
                kv_lens=inputs.kv_lens[group : group + 1],
                options={"group_start": torch.tensor([0, 1], dtype=I32)},
            )
            out, lse, _ = call(ops.prefix_attention, alone)
            assert same_bits(out[0], want.out[row]) and same_bits(lse[0], want.lse[row]), (dtype, row)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same(want, call(ops.prefix_attention, inputs), f"{dtype} {threads} threads")
        torch.set_num_threads(1)


def test_strided_queries(ops):
    inputs = prefixes()
    want = call(ops.prefix_attention, inputs)
    for name, q in views(inputs.q):
        assert_same(want, call(ops.prefix_attention, inputs, q=q), name)


def test_bad_starts_lengths_and_pages(ops):
    inputs = prefixes(dtype=BF16, lens=(70, 20, 33))
    good = call(ops.prefix_attention, inputs)
    table, lens = inputs.page_table.clone(), inputs.kv_lens.clone()
    table[1, 0] = -1
    out = call(ops.prefix_attention, inputs, page_table=table)
    assert out.status.tolist() == [0, Status.BAD_PAGE, 0]
    lens[1] = 10**6
    long = call(ops.prefix_attention, inputs, prefix_lens=lens)
    assert long.status.tolist() == [0, Status.BAD_LENGTH, 0]
    others = [0, 1, 2, 5, 6, 7, 8]
    for got in (out, long):
        assert (got.out[3:5] == 0).all() and torch.isneginf(got.lse[3:5]).all()
        assert same_bits(got.out[others], good.out[others]) and same_bits(got.lse[others], good.lse[others])
    for starts, status in (
        ([-1, 3, 5, 8], [32, 0, 0]),
        ([1, 3, 5, 10], [0, 0, 32]),
        ([3, 5, 2, 6], [32, 32, 32]),  # rows 3 and 4 would belong to two groups
    ):
        got = call(ops.prefix_attention, inputs, group_start=torch.tensor(starts, dtype=I32))
        assert got.status.tolist() == status


def test_empty(ops):
    inputs = prefixes()
    none = torch.zeros(1, dtype=I32)
    out, lse, status = call(
        ops.prefix_attention, inputs, group_start=none, page_table=inputs.page_table[:0], prefix_lens=inputs.kv_lens[:0]
    )
    assert (out == 0).all() and torch.isneginf(lse).all() and status.shape == (0,)
    out, _, status = call(ops.prefix_attention, inputs, q=inputs.q[:0], group_start=torch.zeros(4, dtype=I32))
    assert out.shape == (0, 4, 32) and status.tolist() == [0, 0, 0]


# --- with merge_states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["plain", "int8", "int4"])
def test_prefix_and_suffix_are_the_whole(ops, scheme):
    """Three requests share 48 tokens; level 2 is a prefix of two of them: a tree of prefixes."""
    page = 16
    inputs = make(scheme=scheme, dtype=F64, lens=(48, 32, 21, 37, 16), slots=1, page_size=page)
    table = inputs.page_table

    def pages(*parts: tuple[int, int]) -> Tensor:
        return torch.cat([table[b, :count] for b, count in parts])

    whole = [pages((0, 3), (1, 2), (2, 2)), pages((0, 3), (1, 2), (3, 3)), pages((0, 3), (4, 1))]
    lens = torch.tensor([48 + 32 + 21, 48 + 32 + 37, 48 + 16], dtype=I32)
    full = torch.zeros(3, 8, dtype=I32)
    for b, ids in enumerate(whole):
        full[b, : len(ids)] = ids
    q = inputs.q[:3]
    want = ops.paged_attention(q, inputs.pages, full, lens)

    def prefix(rows: list[int], request: int, length: int) -> Any:
        return ops.prefix_attention(
            q[:, 0], inputs.pages, torch.tensor(rows, dtype=I32), table[request : request + 1],
            torch.tensor([length], dtype=I32),
        )  # fmt: skip

    first, second = prefix([0, 3], 0, 48), prefix([0, 2], 1, 32)
    own = ops.paged_attention(q, inputs.pages, table[2:5], torch.tensor([21, 37, 16], dtype=I32))
    states = [first, second, (own.out[:, 0], own.lse[:, 0])]
    out, lse = ops.merge_states([s[0].contiguous() for s in states], [s[1].contiguous() for s in states])
    torch.testing.assert_close(out, want.out[:, 0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, want.lse[:, 0], rtol=1e-12, atol=1e-13)


def test_a_mixture_of_codecs_is_one_pass_over_what_they_hold(ops):
    parts = [make(scheme=scheme, dtype=F64, lens=(40 + i,), slots=1) for i, scheme in enumerate(SCHEMES)]
    q = parts[0].q
    states, keys, values = [], [], []
    for part in parts:
        tail = int(part.options["tail_lens"][0]) if "tail_lens" in part.options else 0
        length = int(part.kv_lens[0])
        k, v = reference.keys_and_values(part.pages, part.page_table[0], length, 0, tail)
        keys.append(k)
        values.append(v)
        states.append(replace(part, q=q)(ops.paged_attention))
    out, lse = ops.merge_states([s.out[0] for s in states], [s.lse[0] for s in states])
    k, v = (torch.cat(t).repeat_interleave(2, 1) for t in (keys, values))
    scores = torch.einsum("hd,thd->ht", q[0, 0], k) * 32**-0.5
    want = torch.einsum("ht,thd->hd", torch.softmax(scores, -1), v)
    torch.testing.assert_close(out[0], want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse[0], torch.logsumexp(scores, -1), rtol=1e-12, atol=1e-13)


# --- the interface ----------------------------------------------------------------------------------------------------


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    inputs = prefixes(scheme="int8")
    check_op(lambda: tuple(call(ops.prefix_attention, inputs)))


def test_messages(ops):
    inputs = prefixes()

    def wrong(message: str, **changes: object) -> None:
        with raises(f"^prefix_attention: {message}"):
            call(ops.prefix_attention, inputs, **changes)

    wrong(r"q: expected 3 dimensions, got \[4, 32\]", q=inputs.q[0])
    wrong("q: expected a head_dim that is a multiple of 16", q=inputs.q[..., :8].contiguous())
    wrong("q: expected a multiple of the cache's 2 heads, got 3", q=inputs.q[:, :3])
    wrong(r"group_start: expected 1 dimensions, got \[1, 4\]", group_start=torch.zeros(1, 4, dtype=I32))
    wrong(r"group_start: expected \[groups \+ 1\], got \[0\]", group_start=torch.zeros(0, dtype=I32))
    wrong("group_start: expected int32, got int64", group_start=torch.zeros(4, dtype=torch.int64))
    wrong(r"page_table: expected \[3, 7\], got \[2, 7\]", page_table=inputs.page_table[:2])
    wrong(r"prefix_lens: expected \[3\], got \[2\]", prefix_lens=inputs.kv_lens[:2])
    wrong("softcap: expected more than 0 or None, got 0", softcap=0.0)
    assert fastdecode.ops.prefix_attention.__doc__
