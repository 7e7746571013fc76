"""linear and pack_weight against the product in float64."""

import pytest
import torch

from support import check_op, generator, raises

SHAPES = [(0, 64), (1, 1), (3, 7), (63, 64), (64, 65), (65, 1), (128, 257), (320, 192), (4097, 33), (70, 0)]
DTYPES = [torch.float32, torch.float64]


def inputs(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = generator(rows * 1000 + n + k)
    return tuple(torch.randn(shape, generator=g, dtype=dtype) for shape in ((rows, k), (n, k), (n,), (rows, n)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 11, 12, 16])
def test_equals_the_float64_product(ops, rows, dtype):
    for n, k in SHAPES:
        x, w, bias, residual = inputs(rows, n, k, dtype)
        exact = x.double() @ w.double().T
        got = ops.linear(x, ops.pack_weight(w), n)
        assert got.shape == (rows, n) and got.dtype == dtype
        # k rounded products and k rounded sums, each of at most the sum of magnitudes
        bound = (k + 1) * torch.finfo(dtype).eps * (x.double().abs() @ w.double().abs().T)
        assert ((got - exact).abs() <= bound).all(), (n, k)
        more = ops.linear(x, ops.pack_weight(w), n, bias=bias, residual=residual)
        assert torch.equal(more, (got + bias) + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(backend, dtype):
    ops, (x, w, _, _) = backend.ops, inputs(16, 1500, 200, dtype)
    packed = ops.pack_weight(w)
    expected = ops.linear(x, packed, 1500)
    for variant in backend.variants():
        for rows in (1, 2, 5, 6, 13):
            assert torch.equal(ops.linear(x[:rows], packed, 1500), expected[:rows]), (variant, rows)
        assert torch.equal(ops.linear(x.flip(0), packed, 1500), expected.flip(0)), variant


def test_rows_may_be_views(ops):
    x, w, _, residual = inputs(6, 70, 40, torch.float32)
    packed, wide = ops.pack_weight(w), torch.full((6, 90), float("nan"))
    wide[:, 20:60], out = x, torch.full((6, 100), float("nan"))
    out[:, 5:75] = residual
    expected = ops.linear(x, packed, 70, residual=residual)
    assert torch.equal(ops.linear(wide[:, 20:60], packed, 70, residual=out[:, 5:75]), expected)
    same = ops.linear(x[:1].expand(4, -1), packed, 70, residual=residual[:1].expand(4, -1))
    assert torch.equal(same, expected[:1].expand(4, -1))
    assert torch.equal(out[:, 5:75], residual)


def test_infinities_and_nan_stay_in_their_column(ops):
    x, w, _, _ = inputs(2, 130, 8, torch.float32)
    w[64, 3], w[129, 0] = float("inf"), float("nan")
    got = ops.linear(x, ops.pack_weight(w), 130)
    assert torch.isinf(got[:, 64]).all() and torch.isnan(got[:, 129]).all()
    assert torch.isfinite(got[:, [v for v in range(130) if v not in (64, 129)]]).all()


def test_messages(ops):
    x, w, bias, residual = inputs(2, 70, 8, torch.float32)
    packed = ops.pack_weight(w)
    with raises(r"pack_weight: weight: expected 2 dimensions, got \[70\]"):
        ops.pack_weight(bias)
    with raises(r"linear: x: expected 2 dimensions, got \[8\]"):
        ops.linear(x[0], packed, 70)
    with raises("linear: x: expected a contiguous last dimension, got stride 2"):
        ops.linear(x.t().contiguous().t(), packed, 70)
    with raises("linear: x: expected float32 or float64"):
        ops.linear(x.half(), packed.half(), 70)
    with raises("linear: out_features: expected at least 0, got -1"):
        ops.linear(x, packed, -1)
    with raises(r"linear: weight: expected \[3, 8, 64\], got \[2, 8, 64\]"):
        ops.linear(x, packed, 129)
    with raises("linear: weight: expected float32, got float64"):
        ops.linear(x, packed.double(), 70)
    with raises("linear: weight: expected a contiguous tensor"):
        ops.linear(x, torch.empty(4, 8, 64)[::2], 70)
    with raises(r"linear: bias: expected \[70\], got \[2, 70\]"):
        ops.linear(x, packed, 70, bias=residual)
    with raises(r"linear: residual: expected \[2, 70\], got \[70\]"):
        ops.linear(x, packed, 70, residual=bias)


@pytest.mark.backends("cpu", "cuda")
def test_opcheck_and_compile(ops):
    x, w, bias, residual = inputs(3, 70, 8, torch.float32)
    packed = ops.pack_weight(w)
    check_op(lambda: (ops.linear(x, packed, 70),))
    check_op(lambda: (ops.linear(x, packed, 70, bias=bias, residual=residual),))
