"""y = x W^T without a bias, with W in the layout that the processor multiplies fastest.

On x86 CPUs oneDNN multiplies few rows two to four times faster from a weight it has reordered once than
`torch.nn.functional.linear` does from a plain one (docs/results), and a decode step is little else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can take over this weight: a CPU matrix in fp32, or in bf16 where the processor has it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Linear:
    """One weight [out, in]. The plain tensor is not kept when it could be packed."""

    def __init__(self, weight: Tensor, *, pack: bool = True) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed = pack and can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight

    def __call__(self, x_ni: Tensor) -> Tensor:
        """[n, in] -> [n, out]."""
        if self.packed:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x_ni, self._weight, None, "none", [], "")
            return result
        return F.linear(x_ni, self._weight)
