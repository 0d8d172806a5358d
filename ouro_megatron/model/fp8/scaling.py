"""Rounding to 8-bit floats and back, per recipe, with the scales that Transformer Engine would choose.

A scaled value is x * scale rounded to the nearest 8-bit float; what a matrix product sees is that float / scale. Here
the result is kept in fp32 (or wider), where it is exact for scales that are powers of two and within 2^-24 else, as in
a kernel that multiplies 8-bit floats and applies both scales to its fp32 sum.

Sources: transformer_engine/common/recipe (version 2.20), OCP Microscaling formats 1.0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Recipe = Literal["current", "blockwise", "delayed", "mxfp8"]

_TILE = {"blockwise": 128, "mxfp8": 32}
_LARGEST_FP32 = torch.finfo(torch.float32).max


def tensor_scale(amax: Tensor, form: torch.dtype) -> Tensor:
    """The scale that takes `amax` (fp32, any shape) to the largest value of `form`.

    1 where amax is zero or not finite; the largest fp32 where it would not be representable.
    """
    # A number divided by a tensor would be the reciprocal times the number: two roundings.
    scale = torch.full_like(amax, torch.finfo(form).max) / amax
    scale = torch.where(torch.isinf(scale), _LARGEST_FP32, scale)
    return torch.where((amax == 0) | ~torch.isfinite(amax), 1.0, scale)


def power_of_two_scale(amax: Tensor, form: torch.dtype) -> Tensor:
    """`tensor_scale` rounded down to a power of two: for blocks of 128."""
    scale = tensor_scale(amax, form)
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.full_like(mantissa, 0.5), exponent)


def e8m0_scale(amax: Tensor, form: torch.dtype) -> Tensor:
    """MXFP8's scale for quantising, a power of two: the reciprocal of amax / largest rounded up to one.

    The stored exponent has 8 bits without a sign and without a mantissa, so the reciprocal lies in [2^-127, 2^127].
    A block of zeros gets the smallest one, and one with an infinity the largest.
    """
    ratio = amax * (1.0 / torch.finfo(form).max)
    mantissa, exponent = torch.frexp(ratio)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(ratio == 0, -127, exponent).clamp(-127, 127)
    exponent = torch.where(torch.isinf(ratio), 127, exponent)
    scale = torch.ldexp(torch.ones_like(ratio), -exponent)
    return torch.where(torch.isnan(ratio), torch.nan, scale)


def round_trip(x: Tensor, scale: Tensor, form: torch.dtype) -> Tensor:
    """x rounded to `form` at `scale` (fp32, broadcast against x) and back, in fp32 or wider.

    Scaling is a product in fp32. Beyond the largest value, infinities included, the result saturates; NaN stays NaN.
    """
    largest = torch.finfo(form).max
    eight_bits = (x.float() * scale).clamp(-largest, largest).to(form)
    return eight_bits.to(torch.promote_types(x.dtype, torch.float32)) * scale.reciprocal()


def amax_of(x: Tensor) -> Tensor:
    """The largest absolute value, a scalar in fp32."""
    return x.detach().abs().amax().float()


@dataclass(frozen=True)
class Quantiser:
    """Rounds the operands of a layer's matrix products as one recipe says."""

    recipe: Recipe

    @property
    def gradient_format(self) -> torch.dtype:
        """E5M2 for per-tensor scales, which need its range; tiles have a scale near each value and keep E4M3."""
        return E5M2 if self.by_tensor else E4M3

    @property
    def by_tensor(self) -> bool:
        """One scale for a whole tensor: it serves both directions of a product."""
        return self.recipe in ("current", "delayed")

    @property
    def unit(self) -> int:
        """What every dimension of every operand must be a multiple of."""
        return _TILE.get(self.recipe, 16)

    def rounded(self, x_mk: Tensor, form: torch.dtype, *, contracted: int, scale: Tensor | None = None) -> Tensor:
        """An activation or gradient [m, k] for a product that sums over dimension `contracted`, in fp32 or wider.

        `scale` is the tensor's own where one is kept (delayed scaling). Raises ValueError when a dimension is not a
        multiple of `unit`.
        """
        self._check(x_mk)
        if scale is not None:
            return round_trip(x_mk, scale, form)
        if self.by_tensor:
            return round_trip(x_mk, tensor_scale(amax_of(x_mk), form), form)
        return self._tiled(x_mk, form, (1, self.unit) if contracted == 1 else (self.unit, 1))

    def rounded_weight(self, weight_nk: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A weight [n, k] for the forward product (over k) and for d x (over n); one tensor where both agree."""
        if self.recipe == "mxfp8":
            return (
                self.rounded(weight_nk, E4M3, contracted=1),
                self.rounded(weight_nk, E4M3, contracted=0),
            )
        self._check(weight_nk)
        if self.recipe == "blockwise":
            both = self._tiled(weight_nk, E4M3, (self.unit, self.unit))
        else:
            both = self.rounded(weight_nk, E4M3, contracted=1, scale=scale)
        return both, both

    def _tiled(self, x_mk: Tensor, form: torch.dtype, tile: tuple[int, int]) -> Tensor:
        (m, k), (tall, wide) = x_mk.shape, tile
        tiles = x_mk.reshape(m // tall, tall, k // wide, wide)
        amax = tiles.abs().amax(dim=(1, 3), keepdim=True).float()
        scale = e8m0_scale(amax, form) if self.recipe == "mxfp8" else power_of_two_scale(amax, form)
        return round_trip(tiles, scale, form).reshape(m, k)

    def _check(self, x_mk: Tensor) -> None:
        if any(size % self.unit for size in x_mk.shape):
            raise ValueError(
                f"FP8 {self.recipe} scaling works on multiples of {self.unit}, not on a matrix of {tuple(x_mk.shape)}"
            )
