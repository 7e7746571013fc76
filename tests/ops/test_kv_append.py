"""kv_append_: codes, scales, rotation, scatter, against the reference byte for byte."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from fastdecode.testing.reference import kv as reference
from kv_inputs import (
    KIVI,
    PAGED,
    SCHEMES,
    Guarded,
    assert_same_pages,
    copy_of,
    hostile_tokens,
    make_pages,
    some_rope,
    some_slots,
    tensors,
)
from support import DTYPES, check_op, generator, map_tensors, raises, same_bits

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


def append_values(ops, scheme, values, *, group=None, **options):
    """One token of one head; its codes, scales and status."""
    pages = make_pages(scheme, num_pages=1, page_size=1, heads=1, head_dim=len(values), group=group, **options)
    k = values.view(1, 1, -1)
    status = ops.kv_append_(k, k, torch.zeros(1, dtype=torch.int64), pages)
    assert same_bits(pages.k, pages.v)
    return pages.k[0, 0, 0], pages.k_scale, int(status)


def unit_scales(scheme, values):
    pages = make_pages(scheme, num_pages=1, page_size=1, heads=1, head_dim=len(values), static_scales=True)
    pages.k_scale.fill_(1), pages.v_scale.fill_(1)
    return pages


FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", FP8)
def test_every_fp8_code(ops, scheme, dtype):
    """Codes decode to what torch says they are, and encode to themselves; midpoints go to the even code."""
    codes = torch.arange(256, dtype=torch.uint8)
    exact = codes.view(FP8[scheme]).double()
    assert torch.equal(exact, torch.tensor(reference.fp8_values(scheme[4:]), dtype=torch.float64).nan_to_num(7.0)) or (
        same_bits(exact.nan_to_num(7.0), torch.tensor(reference.fp8_values(scheme[4:])).double().nan_to_num(7.0))
    )
    finite = torch.isfinite(exact)
    slot = torch.zeros(1, dtype=torch.int64)
    for values in (exact[finite], -exact[finite]):
        pages = unit_scales(scheme, values)
        x = values.to(dtype).view(1, 1, -1)
        assert torch.equal(x.double().flatten(), values)  # every dtype has them
        assert ops.kv_append_(x, x, slot, pages).tolist() == [0]
        decoded = pages.k[0, 0, 0].view(FP8[scheme]).double()
        assert same_bits(decoded, values)
        back = ops.kv_dequant(pages, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
        assert same_bits(back.k.flatten().double(), values)
    positive = exact[finite & (codes < 128)]
    low, high = positive[:-1], positive[1:]
    assert (low < high).all()
    middle = ((low + high) / 2).to(dtype)
    given = middle.double() == (low + high) / 2  # float16 lacks some of the smallest
    assert given.all() or dtype == torch.float16
    x, even = middle[given].view(1, 1, -1), (torch.arange(len(low)) + 1) // 2 * 2
    for sign in (1, -1):
        pages = unit_scales(scheme, x.flatten())
        assert ops.kv_append_(sign * x, sign * x, slot, pages).tolist() == [0]
        assert pages.k.flatten().tolist() == (even[given] + (128 if sign < 0 else 0)).tolist()
    if dtype in (torch.float64, torch.float32):  # next to a midpoint
        for way, want in ((torch.inf, 1), (-torch.inf, 0)):
            x = middle.nextafter(torch.tensor(way, dtype=dtype)).view(1, 1, -1)
            pages = unit_scales(scheme, x.flatten())
            ops.kv_append_(x, x, slot, pages)
            assert pages.k.flatten().tolist() == (torch.arange(len(low)) + want).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fp8_saturates(ops, dtype):
    """464 and 61440 are the middles to what would follow; the first goes down to an even code, the second up."""
    for scheme, x, want, status in (
        ("fp8_e4m3", [448.0, 464.0, -464.0], [0x7E, 0x7E, 0xFE], 0),
        ("fp8_e4m3", [466.0, -1e30], [0x7E, 0xFE], 128),
        ("fp8_e4m3", [torch.inf, -torch.inf, torch.nan, -0.0], [0x7E, 0xFE, 0x7F, 0x80], 1),
        ("fp8_e5m2", [57344.0, -61184.0], [0x7B, 0xFB], 0),
        ("fp8_e5m2", [61440.0, -61440.0], [0x7B, 0xFB], 128),
        ("fp8_e5m2", [torch.inf, -torch.inf, -torch.nan, 0.0], [0x7B, 0xFB, 0x7F, 0], 1),
        ("fp8_e5m2", [torch.nan, 1e30], [0x7F, 0x7B], 129),
    ):
        values = torch.tensor(x, dtype=dtype)
        pages = unit_scales(scheme, values)
        k = values.view(1, 1, -1)
        assert ops.kv_append_(k, k, torch.zeros(1, dtype=torch.int64), pages).tolist() == [status], (scheme, x)
        assert pages.k.flatten().tolist() == want, (scheme, x)


def test_fp8_scales(ops):
    codes, scales, status = append_values(ops, "fp8_e4m3", torch.tensor([3.0, -7.0, 0, 0, 1e-40, 0]), group=2)
    assert scales.flatten().tolist() == [torch.tensor(7 / 448), 2.0**-126, 2.0**-126]
    assert codes.tolist()[1] == 0xFE and status == 0
    # 1e300 / 448 is beyond float32: the scale stops, the value saturates.
    codes, scales, status = append_values(ops, "fp8_e4m3", torch.tensor([1e300, 1.0], dtype=torch.float64))
    assert scales.item() == torch.finfo(torch.float32).max and codes.tolist() == [0x7E, 0] and status == 128


def within_half_a_step(x, codes, step, offset) -> bool:
    """Exactly."""
    for value, code in zip(x, codes, strict=True):
        if abs(Fraction(value) - code * Fraction(step) - Fraction(offset)) > Fraction(step) / 2:
            return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme, bits", [("int8", 8), ("int4", 4)])
def test_error_is_at_most_half_a_step(ops, scheme, bits, dtype):
    """For the step and offset that are stored; on rows made to break it: many values lie next to a midpoint."""
    tokens, head_dim, group = 66, 64, 32
    k = hostile_tokens(tokens, 1, head_dim, dtype, 1)
    g = generator(77)
    # Grids of our own: values on, and one unit next to, the middles between codes.
    steps = torch.tensor([2.0**-24, 2.0**-14, 0.01, 1, 3.14159, 200.0]).half().double()
    for row in range(0, tokens, 2):
        step, offset = steps[row // 2 % len(steps)], torch.randn((), generator=g).half().double()
        codes = torch.randint(2**bits - 1, (head_dim,), generator=g).double() + 0.5
        codes[::group], codes[1::group] = 0, 2**bits - 1
        x = (offset + codes * step).to(dtype)
        wide = x.float() if dtype != torch.float64 else x
        way = torch.randint(3, (head_dim,), generator=g) - 1.0
        k[row, 0] = torch.where(way == 0, wide, wide.nextafter(way.to(wide.dtype) * torch.inf)).to(dtype)
    pages = make_pages(scheme, num_pages=tokens, page_size=1, heads=1, head_dim=head_dim, group=group)
    ops.kv_append_(k, k, torch.arange(tokens), pages)
    for t in range(tokens):
        packed = pages.k[t, 0, 0]
        codes = packed if bits == 8 else torch.cat([packed & 15, packed >> 4])
        for i, (step, offset) in enumerate(pages.k_scale[t, 0, 0].double().tolist()):
            values = k[t, 0, i * group : (i + 1) * group].double()
            values = values[torch.isfinite(values)].clamp(-65504, 65504)
            if len(values) < group:
                continue
            assert within_half_a_step(values.tolist(), codes[i * group : (i + 1) * group].tolist(), step, offset), t
            assert offset <= values.min() and offset + (2**bits - 1) * step >= values.max()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_constant_groups_are_exact(ops, scheme):
    values = torch.tensor([1.5, 65504.0, -0.0, 2.0**-24, -(2.0**-24), -7.25]).repeat_interleave(8)
    codes, scales, status = append_values(ops, scheme, values, group=8)
    assert scales[0, 0, 0, :, 0].tolist() == [0.0] * 6 and status == 0 and not codes.any()
    assert same_bits(scales[0, 0, 0, :, 1], torch.tensor([1.5, 65504.0, 0.0, 2.0**-24, -(2.0**-24), -7.25]).half())


def test_nan_and_inf_of_integer_codes(ops):
    nan, inf = torch.nan, torch.inf
    for values, want, status in (
        ([nan, 1.0, 16.0, inf], [0, 0, 15, 15], 1),  # NaN as 0, below the range
        ([nan, -7.0, 8.0, -inf], [7, 0, 15, 0], 1),
        ([nan, inf, -inf, nan], [0, 0, 0, 0], 1),
        ([1e6, -1e6, 0.0, 0.0], [15, 0, 7, 7], 128),
        ([1e6, -1e6, nan, 0.0], [15, 0, 7, 7], 129),
    ):
        codes, scales, found = append_values(ops, "int4", torch.tensor(values))
        assert torch.cat([codes & 15, codes >> 4]).tolist() == want and found == status, values
        assert torch.isfinite(scales).all()


@pytest.mark.thin
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["plain", "int4", "kivi4"])
def test_rotation_equals_one_of_its_own(ops, scheme, dtype, interleaved):
    tokens, head_dim = 19, 48
    k, v, q = (hostile_tokens(tokens, heads, head_dim, dtype, i) for i, heads in enumerate((2, 2, 4)))
    rope, positions = some_rope(40, head_dim, dtype), torch.arange(tokens) + 7
    cosine, sine = rope[positions].unsqueeze(2).unbind(1)

    def rotated(x):
        wide = x.to(rope.dtype)
        a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
        pair = a * cosine - b * sine, b * cosine + a * sine
        return (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(dtype)

    pages = make_pages(scheme, head_dim=head_dim, dtype=dtype)
    fused, separate = copy_of(pages), copy_of(pages)
    slots = some_slots(pages, tokens, bad=False)
    turned = q.clone()
    given = {"rope": rope, "positions": positions, "interleaved": interleaved}
    status = ops.kv_append_(k, v, slots, fused, q=turned, **given)
    expected = ops.kv_append_(rotated(k), v, slots, separate)
    assert status.tolist() == expected.tolist()
    assert_same_pages(fused, separate)
    finite = ~torch.isnan(turned)
    assert torch.equal(finite, ~torch.isnan(rotated(q))) and torch.equal(turned[finite], rotated(q)[finite])
    again = q.clone()
    ops.kv_append_(k, v, slots, fused, q=again, rope=rope, positions=positions.int(), interleaved=interleaved)
    assert same_bits(again, turned)  # positions of 32 bits


def test_queries_are_rotated_where_nothing_is_stored(ops):
    pages = make_pages("plain")
    before = copy_of(pages)
    k, q = torch.randn(3, 2, 16), torch.randn(3, 4, 16)
    rope, turned = some_rope(9, 16, torch.float32), q.clone()
    slots = torch.tensor([-1, 400, -1])
    status = ops.kv_append_(k, k, slots, pages, q=turned, rope=rope, positions=torch.tensor([2, 2, 9]))
    assert status.tolist() == [0, 64, 64]
    assert not torch.equal(turned[0], q[0]) and torch.equal(turned[1:], q[1:])
    assert_same_pages(pages, before)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_writes_its_rows_and_nothing_else(ops, scheme, layout):
    """Through strides that nobody would choose; bad slots and positions write nothing at all."""
    pages = make_pages(scheme, head_dim=32, layout=layout)
    guarded = Guarded(pages)
    tokens = 30
    k, v, q = (hostile_tokens(tokens, heads, 32, torch.float32, i) for i, heads in enumerate((2, 2, 3)))
    slots = some_slots(pages, tokens)
    given = {"rope": some_rope(20, 32, torch.float32), "positions": torch.arange(tokens) - 2}
    wide = torch.full((tokens, 7, 3, 40), 5.0)
    spread = wide[:, ::3, 1, 4:36]
    assert spread.shape == q.shape
    spread.copy_(q)
    around = wide.clone()
    status = ops.kv_append_(k, v, slots, guarded.pages, q=spread, **given)
    want = reference.append(k, v, slots, pages, q=q, **given)
    assert status.tolist() == want.tolist() and {0, 64} < set(status.tolist())
    assert_same_pages(guarded.pages, pages)
    guarded.check()
    assert same_bits(spread, q)
    around[:, ::3, 1, 4:36] = q
    assert same_bits(wide, around)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_do_not_depend_on_the_way_tokens_come(backend, scheme):
    """At once, in pieces, one by one, backwards, into other pages, on other threads and builds."""
    ops, tokens = backend.ops, 29
    pages = make_pages(scheme, head_dim=64, group=32 if scheme in PAGED else 8)
    k, v = (hostile_tokens(tokens, 2, 64, torch.float16, i, first=i) for i in (0, 1))
    slots = some_slots(pages, tokens, bad=False)
    want = copy_of(pages)
    status = ops.kv_append_(k, v, slots, want)
    order = torch.randperm(tokens, generator=generator(5))
    for pieces in ([order], order.split(7), order.split(1), [order.flip(0)]):
        mine = copy_of(pages)
        for piece in pieces:
            assert ops.kv_append_(k[piece], v[piece], slots[piece], mine).tolist() == status[piece].tolist()
        assert_same_pages(mine, want, f"{len(pieces)} pieces")
    for variant in backend.variants():
        mine = copy_of(pages)
        assert ops.kv_append_(k, v, slots, mine).tolist() == status.tolist()
        assert_same_pages(mine, want, variant)
    if scheme in PAGED:  # pages in another order
        moved = torch.tensor([3, 0, 4, 1, 2])
        mine = map_tensors(lambda t: t if t.dim() == 1 else t[moved.argsort()], pages)
        ops.kv_append_(k, v, moved[slots // 8] * 8 + slots % 8, mine)
        assert_same_pages(map_tensors(lambda t: t if t.dim() == 1 else t[moved], mine), want, "pages permuted")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_drafts_leave_committed_rows_as_they_are(ops, scheme):
    pages = make_pages(scheme, head_dim=32)
    k, v = (torch.randn(20, 2, 32, generator=generator(i)) for i in (1, 2))
    size = pages.k_tail.shape[1] if scheme in KIVI else 40
    slots = torch.arange(20) % size
    ops.kv_append_(k[:9], v[:9], slots[:9], pages)
    before = copy_of(pages)
    ops.kv_append_(k[9:15], v[9:15], slots[9:15], pages)  # rejected
    for name, tensor in tensors(pages).items():
        if scheme in PAGED and tensor.dim() > 1:
            assert same_bits(tensor[0, :8], tensors(before)[name][0, :8])
            assert same_bits(tensor[1, :1], tensors(before)[name][1, :1])
            assert same_bits(tensor[2:], tensors(before)[name][2:])
        elif name.endswith("tail"):
            assert same_bits(tensor[0, :9], tensors(before)[name][0, :9])
        else:
            assert same_bits(tensor, tensors(before)[name])
    ops.kv_append_(k[9:12], v[9:12], slots[9:12], before)
    ops.kv_append_(k[9:12], v[9:12], slots[9:12], pages)  # what was accepted comes over the rejected
    for name, tensor in tensors(pages).items():
        if scheme in PAGED and tensor.dim() > 1:
            assert same_bits(tensor[1, :4], tensors(before)[name][1, :4])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_numbers_come_back(ops, scheme):
    """Not exactly but for plain: through kv_dequant, by E1 and the like."""
    pages = make_pages(scheme, heads=2, head_dim=64, group=None if scheme in PAGED else 8, batch=1, tail_size=24)
    k, v = (3 * torch.randn(20, 2, 64, generator=generator(i)) for i in (3, 4))
    kivi, at = scheme in KIVI, torch.arange(20)
    table = torch.tensor([[2, 0, 4]], dtype=torch.int32)
    slots = at if kivi else table[0].long()[at // 8] * 8 + at % 8
    assert not ops.kv_append_(k, v, slots, pages).any()
    lens = torch.tensor([20], dtype=torch.int32)
    tails = {"tail_lens": lens} if kivi else {}
    back = ops.kv_dequant(pages, table, lens, **tails)
    bound = {"fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "int8": 1 / 400, "int4": 1 / 25}.get(scheme, 0)
    for x, y in ((k, back.k[0, :20]), (v, back.v[0, :20])):
        assert (abs(x - y) <= bound * x.abs().amax(-1, keepdim=True) * 2).all()


def test_sizes_of_nothing(ops):
    for scheme in SCHEMES:
        pages = make_pages(scheme, num_pages=0, batch=0) if scheme in PAGED else make_pages(scheme, batch=0)
        none = torch.zeros(0, 2, 16)
        assert ops.kv_append_(none, none, torch.zeros(0, dtype=torch.int64), pages).shape == (0,)
        one = torch.ones(2, 2, 16)
        assert ops.kv_append_(one, one, torch.tensor([0, -1]), pages).tolist() == [64, 0]
    q, rope = torch.ones(1, 0, 16), some_rope(1, 16, torch.float32)
    pages = make_pages("int8")
    assert ops.kv_append_(one[:1], one[:1], torch.tensor([5]), pages, q=q, rope=rope, positions=torch.tensor([0])) == 0


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_and_compile(ops, scheme):
    pages = make_pages(scheme)
    if scheme.startswith("fp8"):
        pages.k.zero_(), pages.v.zero_()  # not NaN
    k, q = torch.randn(3, 2, 16), torch.randn(3, 4, 16)
    rope, positions = some_rope(4, 16, torch.float32), torch.arange(3)

    def call(**given):
        mine = copy_of(pages)
        out = ops.kv_append_(k, k + 1, torch.tensor([3, -1, 5]), mine, **given)
        return (out, *tensors(mine).values())

    check_op(call)
    check_op(lambda: call(q=q.clone(), rope=rope, positions=positions, interleaved=True))


def test_messages(ops):
    pages = make_pages("int4", head_dim=16)
    k, slots, rope = torch.zeros(3, 2, 16), torch.zeros(3, dtype=torch.int64), some_rope(4, 16, torch.float32)
    good = {"k": k, "v": k, "slots": slots, "pages": pages}
    turned = {"rope": rope, "positions": slots}
    for change, message in (
        ({"k": k[0]}, r"k: expected 3 dimensions, got \[2, 16\]"),
        ({"k": k.long()}, "k: expected float32, got int64"),
        ({"k": torch.zeros(3, 3, 16)}, r"k: expected \[3, 2, 16\], got \[3, 3, 16\]"),
        ({"k": k.mT.contiguous().mT}, "k: expected a contiguous last dimension, got stride 2"),
        ({"k": torch.zeros(3, 2, 2048)}, "k: expected a head_dim of 1..1024, got 2048"),
        ({"v": k.half()}, "v: expected float32, got float16"),
        ({"v": k[:2]}, r"v: expected \[3, 2, 16\], got \[2, 2, 16\]"),
        ({"slots": slots.int()}, "slots: expected int64, got int32"),
        ({"slots": slots[:2]}, r"slots: expected \[3\], got \[2\]"),
        ({"q": k}, "q: expected None without rope, got a tensor"),
        ({"positions": slots}, "positions: expected None without rope, got a tensor"),
        ({"interleaved": True}, "interleaved: expected False without rope, got True"),
        ({"rope": rope}, "positions: expected a tensor with rope, got None"),
        (turned | {"rope": rope.double()}, "rope: expected float32, got float64"),
        (turned | {"rope": rope[:, :, :4]}, r"rope: expected \[4, 2, 8\], got \[4, 2, 4\]"),
        (turned | {"rope": torch.cat([rope, rope], 1)[:, ::2]}, "rope: expected a contiguous tensor"),
        (turned | {"positions": slots.short()}, "positions: expected int64, got int16"),
        (turned | {"positions": slots[:1]}, r"positions: expected \[3\], got \[1\]"),
        (turned | {"q": k.half()}, "q: expected float32, got float16"),
        (turned | {"q": k[:1]}, r"q: expected \[3, 2, 16\], got \[1, 2, 16\]"),
        (turned | {"q": k[..., :8]}, r"q: expected \[3, 2, 16\], got \[3, 2, 8\]"),
    ):
        with raises(f"^kv_append_: {message}"):
            ops.kv_append_(**(good | change))
    odd = make_pages("plain", head_dim=5)
    with raises("kv_append_: rope: expected an even head_dim, got 5"):
        x = torch.zeros(3, 2, 5)
        ops.kv_append_(x, x, slots, odd, rope=torch.zeros(4, 2, 2), positions=slots)
