from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdecode
from attention_inputs import SCHEMES, Inputs, make, plain_attention
from fastdecode import KVScheme, Status
from fastdecode.ops import KVPages
from fastdecode.testing.reference import attention as reference
from support import DTYPES, assert_as_good_as_torch, assert_same, check_op, generator, raises, same_bits, views

I32, F64 = torch.int32, torch.float64
BF16 = torch.bfloat16


def check(ops, inputs: Inputs, what: str = "") -> None:
    """Against the reference, by the rule of `assert_as_good_as_torch`."""
    out, lse, status = inputs(ops.paged_attention)
    want = inputs(reference.paged_attention)
    assert status.tolist() == want.status.tolist(), what
    plain, plain_lse = plain_attention(inputs)
    assert_as_good_as_torch(out, want.out, plain, f"{what} out")
    assert_as_good_as_torch(lse, want.lse, plain_lse, f"{what} lse")


def test_every_scheme_equals_reference_in_every_dtype(ops):
    for scheme in (*SCHEMES, "fp8_static"):
        for dtype in DTYPES:
            for layout in ("HND", "NHD"):
                check(ops, make(scheme=scheme, dtype=dtype, layout=layout), f"{scheme} {dtype} {layout}")


@pytest.mark.parametrize("cpu_level", fastdecode.cpu_levels())
def test_every_build_equals_reference(cpu_level):
    with fastdecode.set_cpu_level(cpu_level):
        for scheme in SCHEMES:
            for dtype in (torch.float32, torch.float16, BF16):
                check(fastdecode.ops, make(scheme=scheme, dtype=dtype, head_dim=80, group=None), f"{scheme} {dtype}")


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": 1},
        {"window": 9},
        {"window": 30, "causal": False},
        {"softcap": 3.0},
        {"softcap": 30.0, "window": 20},
        {"scale": 0.7},
    ],
    ids=str,
)
def test_options_equal_reference(ops, options, dtype):
    for scheme in ("plain", "int4", "kivi4"):
        check(ops, make(scheme=scheme, dtype=dtype, lens=(90, 7, 65), slots=5, **options), scheme)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 1), (8, 2), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_heads_equal_reference(ops, heads, kv_heads, dtype):
    for scheme in ("plain", "int8"):
        for head_dim in (16, 48, 80, 128, 256):
            inputs = make(scheme=scheme, dtype=dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, lens=(17, 70))
            check(ops, inputs, f"{scheme} {head_dim}")


@pytest.mark.parametrize("page_size", [1, 5, 16, 64, 70])
def test_page_sizes_equal_reference(ops, page_size):
    for scheme in SCHEMES if page_size % 16 == 0 else ("plain", "fp8_e4m3", "int4"):
        check(ops, make(scheme=scheme, dtype=BF16, page_size=page_size, lens=(129, 64, 1)), scheme)


@pytest.mark.parametrize("scheme", ["fp8_e4m3", "int8", "int4", "kivi4", "kivi2"])
def test_groups_equal_reference(ops, scheme):
    for head_dim, group in ((64, 8), (64, 16), (128, 64), (128, 32), (48, 16)):
        for dtype in (torch.float32, BF16):
            check(ops, make(scheme=scheme, dtype=dtype, head_dim=head_dim, group=group, page_size=64, lens=(97, 130)))


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_cache_of_another_dtype(ops, cache_dtype):
    for dtype in DTYPES:
        for scheme in ("plain", "kivi4"):
            inputs = make(scheme=scheme, dtype=dtype, cache_dtype=cache_dtype)
            out = inputs(ops.paged_attention).out
            want = inputs(reference.paged_attention).out
            scale = torch.finfo(dtype).eps * 40
            assert np.abs(out.double().numpy() - want).max() < scale, (dtype, scheme)


def test_strided_queries_and_tables(ops):
    inputs = make(slots=4, lens=(30, 40, 50))
    want = inputs(ops.paged_attention)
    flat = inputs.q.flatten(1, 2)
    for name, view in views(flat):
        q = view.unflatten(1, inputs.q.shape[1:3])
        assert_same(want, ops.paged_attention(q, inputs.pages, inputs.page_table, inputs.kv_lens), name)
    for name, table in views(inputs.page_table):
        assert_same(want, ops.paged_attention(inputs.q, inputs.pages, table, inputs.kv_lens), name)


def test_all_layers_of_a_page_together(ops):
    """The view of one layer of storage [P, L, H, page_size, D]."""
    inputs = make(dtype=BF16)
    want = inputs(ops.paged_attention)
    stores = []
    for store in (inputs.pages.k, inputs.pages.v):
        storage = torch.full((store.shape[0], 3, *store.transpose(1, 2).shape[1:]), torch.nan, dtype=store.dtype)
        storage[:, 1] = store.transpose(1, 2)
        stores.append(storage[:, 1].transpose(1, 2))
    pages = replace(inputs.pages, k=stores[0], v=stores[1])
    assert_same(want, replace(inputs, pages=pages)(ops.paged_attention))


# --- lengths and what must not be read --------------------------------------------------------------------------------


def test_ragged_queries_and_nothing_to_see(ops):
    num_queries = torch.tensor([0, 2, 4, 1, 0], dtype=I32)
    for scheme in ("plain", "int8", "kivi4"):
        inputs = make(scheme=scheme, dtype=BF16, lens=(20, 2, 70, 64, 0), slots=4, num_queries=num_queries)
        check(ops, inputs, scheme)
        out, lse, status = inputs(ops.paged_attention)
        idle = torch.arange(4) >= num_queries[:, None]
        assert status.tolist() == [0] * 5
        assert (out[idle] == 0).all() and torch.isneginf(lse[idle]).all() and torch.isfinite(lse[~idle]).all()


@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_a_tree_that_sees_nothing(ops, dtype):
    """No bit set and no token before: out 0, lse -inf."""
    inputs = make(dtype=dtype, lens=(3, 40), slots=3, tree_mask=torch.zeros(2, 3, 1, dtype=I32))
    out, lse, status = inputs(ops.paged_attention)
    assert status.tolist() == [0, 0] and (out[0] == 0).all() and torch.isneginf(lse[0]).all()
    assert torch.isfinite(lse[1]).all()
    check(ops, inputs)


def test_nan_where_it_is_read_and_nowhere_else(ops):
    """`make` puts NaN wherever nothing must be read, so all other tests look there too; here is what it would do."""
    for scheme in ("plain", "int8", "fp8_static"):
        for dtype in (F64, BF16):
            inputs = make(scheme=scheme, dtype=dtype, lens=(33, 40, 20))
            before = inputs(ops.paged_attention).out
            page = int(inputs.page_table[1, 0])
            if scheme == "plain":
                inputs.pages.v[page, 3] = torch.nan
            elif scheme == "int8":
                inputs.pages.v_scale[page, 3] = torch.nan
            else:
                inputs.pages.v[page, 3] = 0x7F
            after = inputs(ops.paged_attention).out
            assert torch.isnan(after[1]).all(), scheme
            assert same_bits(before[0], after[0]) and same_bits(before[2], after[2]), scheme


def test_a_broken_key_or_value_spoils_only_rows_that_see_it(ops):
    """Here of a sibling, or of a token that has left a window."""
    mask = torch.tensor([[[0b001], [0b011], [0b101]]], dtype=I32)
    for scheme in ("plain", "int8"):
        for dtype in DTYPES:
            inputs = make(scheme=scheme, dtype=dtype, lens=(70,), tree_mask=mask)
            want = inputs(ops.paged_attention)
            page, slot = int(inputs.page_table[0, 68 // 16]), 68 % 16
            for store, scale in ((inputs.pages.v, inputs.pages.v_scale), (inputs.pages.k, inputs.pages.k_scale)):
                (store if scale is None else scale)[page, slot] = torch.inf if dtype != F64 else torch.nan
                out, lse, _ = inputs(ops.paged_attention)
                assert same_bits(out[:, [0, 2]], want.out[:, [0, 2]]) and same_bits(lse[:, 0], want.lse[:, 0])
                assert not torch.isfinite(out[:, 1]).all()
            inputs = make(scheme=scheme, dtype=dtype, lens=(70,), slots=9, window=4)
            want = inputs(ops.paged_attention)
            page, slot = int(inputs.page_table[0, 60 // 16]), 60 % 16
            (inputs.pages.v if scheme == "plain" else inputs.pages.v_scale)[page, slot] = torch.nan
            out = inputs(ops.paged_attention).out  # query i stands at 61 + i
            assert same_bits(out[:, 3:], want.out[:, 3:]) and torch.isnan(out[:, :3]).all()


def test_bad_lengths_and_pages(ops):
    for scheme in ("plain", "int4", "kivi4"):
        inputs = make(scheme=scheme, lens=(40, 33, 20, 37))
        good = inputs(ops.paged_attention)
        room = inputs.page_table.shape[1] * inputs.pages.page_size
        changes: list[tuple[str, int, int]] = [
            ("page_table", -1, Status.BAD_PAGE),
            ("page_table", inputs.pages.num_pages, Status.BAD_PAGE),
            ("page_table", -(2**31), Status.BAD_PAGE),
            ("page_table", 2**31 - 1, Status.BAD_PAGE),
            ("kv_lens", -1, Status.BAD_LENGTH),
            ("kv_lens", room + inputs.pages.page_size * 9, Status.BAD_LENGTH),
            ("kv_lens", 2**31 - 1, Status.BAD_LENGTH),
            ("kv_lens", 2, Status.BAD_LENGTH),
            ("num_queries", 4, Status.BAD_LENGTH),
            ("num_queries", -1, Status.BAD_LENGTH),
        ]
        if scheme == "kivi4":
            changes += [("tail_lens", -1, Status.BAD_LENGTH), ("tail_lens", 34, Status.BAD_LENGTH)]
        for name, value, status in changes:
            tensors = {
                "page_table": inputs.page_table.clone(),
                "kv_lens": inputs.kv_lens.clone(),
                "num_queries": torch.full((4,), 3, dtype=I32),
                **{k: v.clone() for k, v in inputs.options.items()},
            }
            tensors[name].view(4, -1)[1, 0] = value
            out = ops.paged_attention(inputs.q, inputs.pages, **tensors)
            assert out.status.tolist() == [0, status, 0, 0], (scheme, name, value)
            assert (out.out[1] == 0).all() and torch.isneginf(out.lse[1]).all()
            others = [0, 2, 3]
            assert_same(tuple(t[others] for t in good[:2]), tuple(t[others] for t in out[:2]), f"{scheme} {name}")


def test_empty(ops):
    for batch, slots in ((0, 3), (2, 0)):
        inputs = make(lens=(20, 30)[:batch], slots=slots) if batch else make(lens=(), slots=slots)
        out, lse, status = inputs(ops.paged_attention)
        assert out.shape == inputs.q.shape and lse.shape == out.shape[:-1] and status.tolist() == [0] * batch


# --- trees ------------------------------------------------------------------------------------------------------------


def random_parents(nodes: int, seed: int) -> Tensor:
    uniform = torch.rand(nodes, generator=generator(seed, nodes), dtype=F64)
    parents = (uniform * torch.arange(nodes)).int()
    parents[0] = -1
    return parents[None]


def star(nodes: int) -> Tensor:
    return torch.tensor([[-1] + [0] * (nodes - 1)], dtype=I32)


def chain(nodes: int) -> Tensor:
    return torch.arange(-1, nodes - 1, dtype=I32)[None]


@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 64, 65, 129])
def test_trees_equal_reference(ops, nodes):
    for kind, parents in (("random", random_parents(nodes, 1)), ("star", star(nodes))):
        mask = fastdecode.ops.tree_mask(parents).mask
        for scheme, dtype, window in (("plain", F64, None), ("int8", BF16, None), ("plain", torch.float32, 3)):
            inputs = make(
                scheme=scheme, dtype=dtype, lens=(nodes + 9,), slots=nodes, heads=2, head_dim=16, tree_mask=mask,
                window=window,
            )  # fmt: skip
            check(ops, inputs, f"{kind} {scheme}")


@pytest.mark.parametrize("nodes", [1, 5, 33, 129])
def test_a_chain_is_a_tree(ops, nodes):
    for dtype in DTYPES:
        inputs = make(dtype=dtype, lens=(nodes + 70,), slots=nodes)
        mask = fastdecode.ops.tree_mask(chain(nodes)).mask
        for window in (None, 7):
            assert_same(
                inputs(ops.paged_attention, window=window), inputs(ops.paged_attention, window=window, tree_mask=mask)
            )


def test_each_path_of_a_tree_alone(ops):
    """A node's row is causal attention of its own root path; in float64 only the order of the sum differs."""
    nodes, base = 40, 77
    parents = random_parents(nodes, 3)
    for scheme in ("plain", "int4"):
        inputs = make(scheme=scheme, dtype=F64, lens=(base + nodes,), slots=nodes, page_size=1, head_dim=16)
        out, lse, _ = inputs(ops.paged_attention, tree_mask=fastdecode.ops.tree_mask(parents).mask)
        for node in range(0, nodes, 3):
            path = [node]
            while path[0] > 0:
                path.insert(0, int(parents[0, path[0]]))
            at = torch.tensor([*range(base), *(base + n for n in path)])
            alone = replace(
                inputs,
                q=inputs.q[:, path],
                page_table=inputs.page_table[:, at],
                kv_lens=torch.tensor([len(at)], dtype=I32),
            )(ops.paged_attention)
            torch.testing.assert_close(alone.out[0, -1], out[0, node], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(alone.lse[0, -1], lse[0, node], rtol=1e-12, atol=1e-12)


def test_permuted_siblings_permute_rows(ops):
    parents = torch.tensor([[-1, 0, 0, 0, 1, 2]], dtype=I32)
    order = [0, 3, 1, 2, 4, 5]  # the siblings 1, 2, 3 in another order
    renamed = torch.tensor([[-1, 0, 0, 0, 2, 3]], dtype=I32)
    inputs = make(dtype=F64, lens=(20,), slots=6, page_size=1)
    out = inputs(ops.paged_attention, tree_mask=fastdecode.ops.tree_mask(parents).mask)
    table = inputs.page_table[:, [*range(14), *(14 + n for n in order)]]
    moved = replace(inputs, q=inputs.q[:, order], page_table=table)
    again = moved(ops.paged_attention, tree_mask=fastdecode.ops.tree_mask(renamed).mask)
    torch.testing.assert_close(again.out, out.out[:, order], rtol=1e-13, atol=1e-13)


def test_siblings_share_a_window(ops):
    """Two siblings of one depth see the same prefix, though they stand in different slots."""
    parents = torch.tensor([[-1, 0, 0]], dtype=I32)
    inputs = make(dtype=F64, lens=(40,), slots=3, page_size=1, tree_mask=fastdecode.ops.tree_mask(parents).mask)
    inputs.q[:, 2] = inputs.q[:, 1]
    last = inputs.page_table[0, 38:40].long()
    inputs.pages.k[last[1]], inputs.pages.v[last[1]] = inputs.pages.k[last[0]], inputs.pages.v[last[0]]
    for window in (1, 2, 3, 20):
        out, lse, _ = inputs(ops.paged_attention, window=window)
        torch.testing.assert_close(out[:, 1], out[:, 2], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(lse[:, 1], lse[:, 2], rtol=1e-14, atol=1e-14)
        check(ops, replace(inputs, options={**inputs.options, "window": window}))


# --- rings ------------------------------------------------------------------------------------------------------------


def with_both(inputs: Inputs, coded: int, extra: int, length: int) -> Inputs:
    """Codes beyond what the ring still holds: tokens coded .. coded + extra - 1 in both forms."""
    b, size = 0, inputs.pages.page_size
    assert inputs.pages.k_scale is not None and inputs.pages.v_scale is not None
    for t in range(coded, coded + extra):
        page, slot = int(inputs.page_table[b, t // size]), t % size
        inputs.pages.k_scale[page, :, slot // inputs.pages.group] = 0.11
        inputs.pages.v_scale[page, slot] = 0.07
    return inputs


@pytest.mark.parametrize("dtype", [F64, torch.float32, BF16], ids=str)
@pytest.mark.parametrize("scheme", ["kivi4", "kivi2"])
def test_each_query_has_its_own_boundary(ops, scheme, dtype):
    inputs = make(scheme=scheme, dtype=dtype, lens=(75,), slots=4, tail=25)
    tail = int(inputs.options["tail_lens"][0])
    coded = 75 - tail
    with_both(inputs, coded, 16, 75)
    boundaries = torch.tensor([[coded, coded, coded + 8, coded + 16]], dtype=I32)
    given = replace(inputs, options={**inputs.options, "coded_lens": boundaries})
    check(ops, given)
    one = given(ops.paged_attention)
    for i in range(4):  # alone, with the same bits
        length = torch.tensor([72 + i], dtype=I32)
        alone = replace(given, q=given.q[:, i : i + 1], kv_lens=length)
        options = {"tail_lens": length - coded, "coded_lens": boundaries[:, i : i + 1].contiguous()}
        out, lse, status = alone(ops.paged_attention, **options)
        assert status.tolist() == [0] and same_bits(out[:, 0], one.out[:, i]) and same_bits(lse[:, 0], one.lse[:, i])
    for bad in (coded - 1, 76):
        boundaries[0, 2] = bad
        assert given(ops.paged_attention, coded_lens=boundaries).status.tolist() == [Status.BAD_LENGTH]


def test_ring_goes_round(ops):
    for lens in ((200, 31), (29, 1000)):
        check(ops, make(scheme="kivi4", dtype=torch.float32, lens=lens, tail=17), str(lens))


# --- bits -------------------------------------------------------------------------------------------------------------


def each_build(name: str) -> Iterator[int]:
    """Threads under each build of the CPU; on other backends one turn."""
    if name != "cpu":
        yield 1
        return
    for level in fastdecode.cpu_levels():
        with fastdecode.set_cpu_level(level):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                yield threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_and_company_of_requests(ops, backend, dtype):
    """Shuffled, alone, and with other threads: the same bits. (Builds may differ in bfloat16.)"""
    for scheme in ("plain", "int8", "kivi4", "fp8_e4m3"):
        inputs = make(scheme=scheme, dtype=dtype, lens=(130, 3, 64, 1), slots=2)
        want = None
        for threads in each_build(backend.name):
            got = inputs(ops.paged_attention)
            want = got if threads == 1 else want
            assert want is not None
            assert_same(want, got, f"{threads} threads")
            for b in range(4):
                alone = inputs.of_request(b)(ops.paged_attention)
                assert_same(tuple(t[b : b + 1] for t in want), alone, f"request {b} alone")
            if inputs.pages.has_ring:
                continue
            order = torch.tensor([2, 0, 3, 1])
            options = {k: v[order] for k, v in inputs.options.items()}
            moved = replace(
                inputs, q=inputs.q[order], page_table=inputs.page_table[order], kv_lens=inputs.kv_lens[order]
            )(ops.paged_attention, **options)
            assert_same(tuple(t[order] for t in want), moved, "shuffled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_query_has_the_bits_of_sixteen(ops, backend, dtype):
    for scheme in ("plain", "int4", "fp8_e5m2"):
        inputs = make(scheme=scheme, dtype=dtype, lens=(150,), slots=16, heads=6)
        for _ in each_build(backend.name):
            out, lse, _ = inputs(ops.paged_attention)
            for i in range(16):
                alone = replace(inputs, q=inputs.q[:, i : i + 1], kv_lens=torch.tensor([135 + i], dtype=I32))
                got = alone(ops.paged_attention)
                assert same_bits(got.out[:, 0], out[:, i]) and same_bits(got.lse[:, 0], lse[:, i]), (scheme, i)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_and_threads(ops, dtype):
    """Long enough that threads share the keys of one head, and more rows than one thread takes at once."""
    for scheme, slots, heads in (("plain", 1, 1), ("int8", 3, 100), ("kivi4", 150, 1)):
        inputs = make(scheme=scheme, dtype=dtype, lens=(2500,), slots=slots, heads=heads, kv_heads=1, head_dim=64)
        for level in fastdecode.cpu_levels()[-1:]:
            with fastdecode.set_cpu_level(level):
                want = None
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    got = inputs(ops.paged_attention)
                    want = want or got
                    assert_same(want, got, f"{scheme} {level} {threads}")
                assert want is not None
        tail = int(inputs.options["tail_lens"][0]) if "tail_lens" in inputs.options else 0
        k, v = (t[:, 0] for t in reference.keys_and_values(inputs.pages, inputs.page_table[0], 2500, 0, tail))
        seen = torch.arange(2500) <= 2500 - slots + torch.arange(slots)[:, None]

        def expression(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            scores = (torch.einsum("nhd,td->nht", q, k) / 8).masked_fill(~seen[:, None], -torch.inf)
            return torch.softmax(scores, -1) @ v

        exact = expression(inputs.q[0].double(), k, v)
        if dtype == F64:
            torch.testing.assert_close(want.out[0], exact, rtol=1e-12, atol=1e-14)
        else:
            plain = expression(inputs.q[0], k.to(dtype), v.to(dtype))
            assert_as_good_as_torch(want.out[0], exact.numpy().astype(np.longdouble), plain, scheme)


def test_pages_may_lie_anywhere(ops):
    for scheme in SCHEMES:
        inputs = make(scheme=scheme, dtype=BF16)
        order = torch.randperm(inputs.pages.num_pages, generator=generator(7))
        place = torch.argsort(order).int()
        pages = replace(
            inputs.pages,
            **{
                name: store[order]
                for name in ("k", "v", "k_scale", "v_scale")
                if (store := getattr(inputs.pages, name)) is not None
            },
        )
        inside = (inputs.page_table >= 0) & (inputs.page_table < inputs.pages.num_pages)
        table = torch.where(inside, place[inputs.page_table.clamp(0, len(order) - 1).long()], inputs.page_table)
        moved = replace(inputs, pages=pages, page_table=table)
        assert_same(inputs(ops.paged_attention), moved(ops.paged_attention), scheme)


def test_requests_may_share_pages(ops):
    inputs = make(dtype=BF16, lens=(64, 64))
    table = inputs.page_table.clone()
    table[1, :3] = table[0, :3]
    shared = replace(inputs, page_table=table)
    check(ops, shared)


# --- the law of errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int4", "kivi4", "kivi2"])
def test_error_of_a_coded_cache_is_bounded(ops, scheme):
    """With eps = scale * max |q.(k - k^)|: |lse - lse^| <= eps and |out - out^| <= (e^(2 eps) - 1) max |v| +
    max |v - v^|, for originals half a step away from their codes, as far along and against the query as that goes."""
    inputs = make(scheme=scheme, dtype=F64, lens=(64,), slots=1, heads=1, kv_heads=1, head_dim=32, tail=None)
    pages, tightest = inputs.pages, 0.0
    got = inputs(ops.paged_attention)
    k, v = (t[:, 0] for t in reference.keys_and_values(pages, inputs.page_table[0], 64))
    at = torch.arange(64)
    page, slot = inputs.page_table[0, at // pages.page_size].long(), at % pages.page_size
    assert pages.k_scale is not None and pages.v_scale is not None
    v_step = pages.v_scale[page, slot, 0, :, 0].double().repeat_interleave(pages.group, -1)
    if pages.has_ring:
        k_step = pages.k_scale[page, 0, slot // pages.group, 0].double()
    else:
        k_step = pages.k_scale[page, slot, 0, :, 0].double().repeat_interleave(pages.group, -1)
    q, scale = inputs.q[0, 0, 0], 32**-0.5
    for way in (1.0, -1.0, torch.sign(torch.randn(64, 1, generator=generator(5), dtype=F64))):
        k_true, v_true = k + way * k_step / 2 * torch.sign(q), v + v_step / 2 * torch.sign(got.out[0, 0, 0])
        eps = float((scale * (k_true - k) @ q).abs().max())
        scores = scale * k_true @ q
        out, lse = torch.softmax(scores, 0) @ v_true, torch.logsumexp(scores, 0)
        error = float((lse - got.lse[0, 0, 0]).abs())
        assert error <= eps * (1 + 1e-12)
        tightest = max(tightest, error / eps)
        bound = np.expm1(2 * eps) * v_true.norm(dim=-1).max() + (v_true - v).norm(dim=-1).max()
        assert (out - got.out[0, 0, 0]).norm() <= bound
    assert tightest > 0.5  # so half the bound would not hold


# --- the interface ----------------------------------------------------------------------------------------------------


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    for scheme in ("plain", "kivi4"):
        inputs = make(scheme=scheme)
        check_op(lambda inputs=inputs: tuple(inputs(ops.paged_attention)))


def test_messages(ops):
    inputs = make()
    kivi = make(scheme="kivi4")
    q, pages, table, lens = inputs.q, inputs.pages, inputs.page_table, inputs.kv_lens

    def wrong(message: str, given: Inputs = inputs, **changes: object) -> None:
        arguments = {"q": given.q, "pages": given.pages, "page_table": given.page_table, "kv_lens": given.kv_lens}
        with raises(f"^paged_attention: {message}"):
            ops.paged_attention(**{**arguments, **given.options, **changes})

    wrong(r"q: expected 4 dimensions, got \[3, 4, 32\]", q=q[0])
    wrong("q: expected float32, got int64", q=q.long())
    wrong("q: expected a head_dim that is a multiple of 16 up to 256", q=q[..., :8].contiguous())
    wrong("q: expected a multiple of the cache's 2 heads, got 3", q=q[:, :, :3])
    wrong(r"k_cache: expected \[\d+, 16, 2, 16\], got", q=q[..., :16].contiguous())
    wrong(r"page_table: expected \[3, 6\], got \[2, 6\]", page_table=table[:2])
    wrong("page_table: expected int32, got int64", page_table=table.long())
    wrong(r"kv_lens: expected \[3\], got \[2\]", kv_lens=lens[:2])
    wrong("kv_lens: expected int32, got int64", kv_lens=lens.long())
    wrong(r"num_queries: expected \[3\], got \[2\]", num_queries=lens[:2])
    wrong("tail_lens: expected None for a scheme without a ring", tail_lens=lens)
    wrong("coded_lens: expected None for a scheme without a ring", coded_lens=lens[:, None])
    wrong("tail_lens: expected a tensor for a scheme with a ring, got None", kivi, tail_lens=None)
    wrong(r"coded_lens: expected \[3, 3\], got \[3\]", kivi, coded_lens=lens)
    wrong(r"k_tail: expected rings for 3 requests", kivi, pages=make(scheme="kivi4", lens=(20,)).pages)
    wrong(r"tree_mask: expected \[3, 3, 1\], got \[3, 3, 2\]", tree_mask=torch.zeros(3, 3, 2, dtype=I32))
    wrong("causal: expected True beside a tree_mask", tree_mask=torch.zeros(3, 3, 1, dtype=I32), causal=False)
    wrong("window: expected an int of at least 1 or None, got 0", window=0)
    wrong("softcap: expected more than 0 or None, got -1", softcap=-1.0)
    wrong("scale: expected a finite number, got inf", scale=float("inf"))
    empty = KVPages(pages.k, pages.v, scheme=KVScheme.INT8, group=32, head_dim=32)
    wrong("k_scale: expected a tensor for this scheme, got None", pages=empty)


@pytest.mark.parametrize("scheme", ["plain", "int8", "int4", "fp8_e4m3"])
@pytest.mark.parametrize("largest", [30.0, 2000.0, 60000.0])
def test_one_channel_of_a_query_may_dominate(ops, scheme, largest):
    """Where keys are 0 it decides nothing: all others must keep their precision beside it."""
    g = generator(77)
    k, v = torch.randn(40, 2, 64, generator=g), torch.randn(40, 2, 64, generator=g)
    k[..., 0] = 0
    options = {"dtype": torch.bfloat16} if scheme == "plain" else {}
    pages = ops.KVPages.allocate(2, 32, 2, 64, scheme=scheme, **options)
    ops.kv_append_(k, v, torch.arange(40), pages)
    table, lens = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    q = torch.randn(1, 1, 4, 64, generator=g)
    q[..., 0] = largest
    q = q.bfloat16()
    out = ops.paged_attention(q, pages, table, lens).out[0, 0].double()
    cached = ops.kv_dequant(pages, table, lens, length=40, dtype=torch.float64)
    keys, values = (x[0].repeat_interleave(2, 1) for x in (cached.k, cached.v))
    weights = (torch.einsum("hd,thd->ht", q[0, 0].double(), keys) / 8).softmax(-1)
    want = torch.einsum("ht,thd->hd", weights, values)
    rounded = [x.transpose(0, 1).bfloat16() for x in (keys, values)]
    peer = torch.nn.functional.scaled_dot_product_attention(q[0].transpose(0, 1), *rounded)[:, 0].double()
    assert (out - want).norm() < max(2.0**-8 * want.norm(), 2 * (peer - want).norm())
