"""A weight matrix in the layout that is fastest for few rows on this device.

On the CPU in float32 and float64 that is our own `linear` up to `_FEW_ROWS` rows, and torch's matrix product on the
same packed weights beyond; in bfloat16 oneDNN's packed layout. Everywhere else it is a plain product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.gemv import pack_weight

__all__ = ["Linear", "can_prepack"]

# beyond this many rows a prompt is being read, where torch's blocked product wins
_FEW_ROWS = 16

# oneDNN chooses its blocking for a number of rows; blocks for 6 serve 1 to 16 within a few percent of their own best
_PACK_ROWS = 6


class Linear:
    """y = x W^T (+ bias) (+ residual) for x [M, K] and W [N, K].

    Args:
        weight: [N, K], in the compute dtype, on its device.
        bias: [N] or None.
        prepack: keep the matrix in a packed layout where there is one; False keeps it as it is.
    """

    __slots__ = ("_bias", "_blocked", "_panels", "_weight_t", "out_features")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, prepack: bool = True) -> None:
        self.out_features = weight.shape[0]
        self._bias = bias
        self._panels: Tensor | None = None  # of ops.linear
        self._blocked: Tensor | None = None  # of oneDNN
        self._weight_t: Tensor | None = None
        if prepack and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
            self._panels = pack_weight(weight)
        elif prepack and can_prepack(weight.dtype, weight.device):
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        else:
            self._weight_t = weight.contiguous().t()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[M, K] -> a new tensor [M, N]; `residual` [M, N] is added and not changed."""
        panels = self._panels
        if panels is not None and x.shape[0] <= _FEW_ROWS:
            return torch.ops.fastdecode.linear.default(x, panels, self.out_features, self._bias, residual)
        if panels is not None:
            y = torch.matmul(x, panels).transpose(0, 1).reshape(x.shape[0], -1)[:, : self.out_features]
            y = y if self._bias is None else y + self._bias
        elif self._blocked is not None:
            y = torch.ops.mkldnn._linear_pointwise.default(x, self._blocked, self._bias, "none", [], "")
        else:
            assert self._weight_t is not None
            y = torch.mm(x, self._weight_t) if self._bias is None else torch.addmm(self._bias, x, self._weight_t)
        return y.contiguous() if residual is None else y + residual


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch has oneDNN's packed linear for bfloat16 on this machine."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return False
    return bool(ops._is_mkldnn_bf16_supported())
