"""y = x W^T without a bias, with W in the layout that the processor multiplies fastest.

A decode step is little else than reading the weights, and how fast that goes depends on their layout (docs/results):

- bf16 on x86: from a weight that oneDNN has reordered once, one and a half times as fast as from a plain one.
- fp32, few rows: from the transposed weight, a tenth faster than from a plain one. oneDNN's is slower there.
- fp32, many rows: oneDNN's again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 3
"""Up to here fp32 products are faster from the transposed weight, beyond from a packed one."""


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can take over this weight: a CPU matrix in fp32, or in bf16 where the processor has it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Linear:
    """One weight [out, in], kept in one layout. `rows`: how many rows it will mostly be asked for."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.out_features, self.in_features = weight.shape
        transposed = weight.device.type == "cpu" and weight.dtype == torch.float32 and rows <= FEW_ROWS
        self.packed = not transposed and can_pack(weight)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        elif transposed:
            weight = weight.t().contiguous().t()
        self._weight = weight

    def __call__(self, x_ni: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        if self.packed:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x_ni, self._weight, None, "none", [], "")
            return result
        return F.linear(x_ni, self._weight)
