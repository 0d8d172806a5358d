"""Linears whose three products see operands rounded to 8 bits and back: FP8's numbers on any device, without its speed.

y = x w^T, d x = d y w and d w = d y^T x each take their operands as Transformer Engine's kernels would; sums are fp32.
Parallelism is Megatron's: an operand is scaled by what its rank holds. Under sequence parallelism a gathered operand
is scaled after the gather, which is what Transformer Engine's reduction of its maximum over the tensor-parallel group
comes to.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from ouro_megatron.model.fp8.scaling import E4M3, Quantiser, amax_of, tensor_scale
from ouro_megatron.recipe.schema import Fp8Section


class Fp8Emulation:
    """What the emulated linears of one rank share."""

    def __init__(self, settings: Fp8Section, amax_group: dist.ProcessGroup) -> None:
        """`amax_group`: ranks that agree on the maxima of delayed scaling, those with the same layers."""
        self.quantiser = Quantiser(settings.recipe)
        self.visits = settings.amax_history
        self.amax_group = amax_group
        self.weights_version = 0
        self.weights_quantised = 0
        """Weights rounded so far: one for each linear and optimizer step."""

    def weights_changed(self) -> None:
        """Copies of weights are made anew when they are next used. To be called after each update and each load:
        Megatron's distributed optimizer writes through a buffer, which parameters cannot see."""
        self.weights_version += 1


class AmaxHistory(nn.Module):
    """Maxima of one tensor in the last visits, of all loops and microbatches together, and the scale they give.

    Shared by the ranks of `group`, as Transformer Engine does by default. A scale of 1 serves until the first maximum.
    """

    amax_v: Tensor

    def __init__(self, visits: int, device: torch.device, group: dist.ProcessGroup) -> None:
        super().__init__()
        # No part of the model's state dict: checkpoints name what they store (checkpoint/tensors.py).
        self.register_buffer("amax_v", torch.zeros(visits, dtype=torch.float32, device=device), persistent=False)
        self._group = group

    def scale(self, form: torch.dtype) -> Tensor:
        """From the visits before this one."""
        return tensor_scale(self.amax_v.amax(), form)

    def record(self, x: Tensor) -> None:
        """Adds a visit. All ranks of the group call it together."""
        amax = amax_of(x)
        if self._group.size() > 1:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self._group)
        if bool(torch.isfinite(amax)) and bool(amax > 0):
            self.amax_v.copy_(self.amax_v.roll(1))
            self.amax_v[0] = amax


class _Products(torch.autograd.Function):
    """x [m, k], weight [n, k] -> [m, n] in x's dtype.

    Keeps x itself, so that a caller who makes it again in backward (`not_kept`) saves as much as with other linears.
    """

    @staticmethod
    def forward(ctx: Any, x_mk: Tensor, weight_nk: Tensor, linear: "_Emulated", training: bool) -> Tensor:
        quantiser = linear.emulation.quantiser
        forward_nk, backward_nk = linear.weight_copies(weight_nk, training)
        scale = linear.visit("input", x_mk, E4M3, record=training)
        ctx.save_for_backward(x_mk, backward_nk)
        ctx.linear, ctx.input_scale, ctx.weight_dtype = linear, scale, weight_nk.dtype
        product = quantiser.rounded(x_mk, E4M3, contracted=1, scale=scale) @ forward_nk.t()
        return product.to(x_mk.dtype)

    @staticmethod
    def backward(ctx: Any, d_y_mn: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_mk, weight_nk = ctx.saved_tensors
        quantiser, form = ctx.linear.emulation.quantiser, ctx.linear.emulation.quantiser.gradient_format
        scale = ctx.linear.visit("gradient", d_y_mn, form, record=True)
        d_y = quantiser.rounded(d_y_mn, form, contracted=1, scale=scale)
        d_x_mk = (d_y @ weight_nk).to(x_mk.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_x_mk, None, None, None
        if not quantiser.by_tensor:
            d_y = quantiser.rounded(d_y_mn, form, contracted=0)
        x = quantiser.rounded(x_mk, E4M3, contracted=0, scale=ctx.input_scale)
        return d_x_mk, (d_y.t() @ x).to(ctx.weight_dtype), None, None


class _Emulated(nn.Module):
    """What both kinds of parallel linear have in common. The weight's gradient goes where Megatron's would."""

    weight: Tensor

    def _prepare(self, emulation: Fp8Emulation) -> None:
        self.emulation = emulation
        self._copies: tuple[Tensor, Tensor] | None = None
        self._copies_of: tuple[int, int, int] | None = None
        self._weight_recorded = False
        self.histories = nn.ModuleDict()
        if emulation.quantiser.recipe == "delayed":
            for tensor in ("input", "weight", "gradient"):
                self.histories[tensor] = AmaxHistory(emulation.visits, self.weight.device, emulation.amax_group)

    def visit(self, tensor: str, x: Tensor, form: torch.dtype, *, record: bool) -> Tensor | None:
        """The scale that delayed scaling keeps for `tensor`, from earlier visits; None for other recipes."""
        if not self.histories:
            return None
        history = self.histories[tensor]
        assert isinstance(history, AmaxHistory)
        scale = history.scale(form)
        if record:
            history.record(x)
        return scale

    def weight_copies(self, weight_nk: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """The rounded weight for both of its products: made once an optimizer step, for all loops and microbatches.

        Its maximum enters the history with its first visit in training: an evaluation, after which a run may end and go
        on, leaves no trace.
        """
        now = (self.emulation.weights_version, weight_nk._version, weight_nk.data_ptr())
        with torch.no_grad():
            if self._copies is None or self._copies_of != now:
                scale = self.visit("weight", weight_nk, E4M3, record=False)
                self._copies = self.emulation.quantiser.rounded_weight(weight_nk, scale)
                self._copies_of, self._weight_recorded = now, False
                self.emulation.weights_quantised += 1
            if training and not self._weight_recorded:
                self.visit("weight", weight_nk, E4M3, record=True)
                self._weight_recorded = True
        return self._copies

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        """Megatron's hook for the product: [s, b, k] -> [s, b, n]."""
        if how["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=how["tp_group"])
        elif how["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=how["tp_group"])
        y_mn = _Products.apply(input.flatten(0, -2), weight, self, torch.is_grad_enabled())
        return y_mn.view(*input.shape[:-1], -1)


class EmulatedColumnParallelLinear(_Emulated, ColumnParallelLinear):
    def __init__(self, *args: Any, emulation: Fp8Emulation, **kwargs: Any) -> None:
        ColumnParallelLinear.__init__(self, *args, **kwargs)
        self._prepare(emulation)


class EmulatedRowParallelLinear(_Emulated, RowParallelLinear):
    def __init__(self, *args: Any, emulation: Fp8Emulation, **kwargs: Any) -> None:
        RowParallelLinear.__init__(self, *args, **kwargs)
        self._prepare(emulation)


def amax_histories(module: nn.Module) -> Iterator[tuple[str, AmaxHistory]]:
    """Names (below `module`) and histories of delayed scaling, in order."""
    for name, part in module.named_modules():
        if isinstance(part, AmaxHistory):
            yield name, part
