"""Products of few rows with a weight matrix (csrc/gemv)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import check_devices

_PANEL = 64  # kPanel of csrc/gemv/linear.h


def pack_weight(weight: Tensor) -> Tensor:
    """Lay out a matrix [N, K] for `linear`: [ceil(N / 64), K, 64], missing columns zero, same dtype and device."""
    if weight.dim() != 2:
        raise ValueError(f"pack_weight: weight: expected 2 dimensions, got {list(weight.shape)}")
    columns, inner = weight.shape
    panels = -(-columns // _PANEL)
    padded = weight.new_zeros(panels * _PANEL, inner)
    padded[:columns] = weight
    return padded.view(panels, _PANEL, inner).transpose(1, 2).contiguous()


def linear(
    x: Tensor, weight: Tensor, out_features: int, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x W^T (+ bias) (+ residual), for few rows: W is read once for every 6 of them.

    A row's result has the same bits whatever other rows there are, and for any thread count and instruction set.

    Args:
        x: float32 or float64 [M, K]; rows may be strided, last dim contiguous.
        weight: `pack_weight` of W [N, K], in the dtype of x.
        out_features: N.
        bias: [N], in the dtype of x.
        residual: [M, N], in the dtype of x; rows may be strided; not changed.
    Returns:
        [M, N] in the dtype of x. Does not synchronise.
    Raises:
        ValueError: wrong rank, shape, dtype, layout or device.
    Reference: the float64 product, in tests/ops/test_linear.py.
    """
    return torch.ops.fastdecode.linear.default(x, weight, out_features, bias, residual)


@torch.library.register_fake("fastdecode::linear")
def _(x: Tensor, weight: Tensor, out_features: int, *others: object) -> Tensor:
    check_devices("linear", x, weight, out_features, *others)
    return x.new_empty((x.shape[0], out_features))
