"""A weight matrix in the layouts that are fastest for few rows on this device.

Measured on one AVX-512 core with rotating weights (256 x 1536, microseconds, minimum): float32 M = 1: transposed `mm`
29, `F.linear` 42, oneDNN packed 40; M = 6: 121, 170, 62. bfloat16 M = 1: `F.linear` 45, packed 28; M = 6: 60, 39. So
float32 holds both layouts (twice the memory), bfloat16 only the packed one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Linear", "can_prepack"]

# a pass over two tokens is still faster as `mm`, and leaves the second layout out of the processor's cache
_PACKED_FROM = 3

# oneDNN chooses its blocking for a number of rows; blocks for 6 serve 1 to 16 within a few percent of their own best
_PACK_ROWS = 6


class Linear:
    """y = x W^T (+ bias) (+ residual) for x [M, K] and W [N, K].

    Args:
        weight: [N, K], in the compute dtype, on its device.
        bias: [N] or None.
        prepack: also keep (float32) or only keep (bfloat16) the matrix in oneDNN's blocked layout, where it is
            supported.
    """

    __slots__ = ("_bias", "_packed", "_weight_t", "in_features", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, prepack: bool = True) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._packed = None
        self._weight_t: Tensor | None = None
        if prepack and can_prepack(weight.dtype, weight.device):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
            if weight.dtype == torch.bfloat16:
                return
        # a product with one row reads W in memory order: columns first pays unless W is much wider than tall
        tall = self.in_features <= 2 * self.out_features
        self._weight_t = weight.t().contiguous() if tall else weight.contiguous().t()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[M, K] -> a new tensor [M, N]; `residual` [M, N] is added and not changed."""
        weight_t = self._weight_t
        if weight_t is None or (self._packed is not None and x.shape[0] >= _PACKED_FROM):
            y = torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self._bias, "none", [], "")
            return y if residual is None else y.add_(residual)
        if residual is None:
            return torch.mm(x, weight_t) if self._bias is None else torch.addmm(self._bias, x, weight_t)
        y = torch.addmm(residual, x, weight_t)
        return y if self._bias is None else y.add_(self._bias)


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch has oneDNN's packed linear for this dtype on this machine."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or bool(ops._is_mkldnn_bf16_supported())
