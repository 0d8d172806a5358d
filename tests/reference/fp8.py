"""FP8 as plainly as it can be written, in fp64: a table of all 8-bit floats, scales by their definition, one shard
after the other. Shares nothing with ouro_megatron.model.fp8, not even torch's 8-bit types.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.looplm import Attention, ReferenceLoopLM, SwiGLU, rotate


def all_values(exponent_bits: int, mantissa_bits: int, largest: float) -> Tensor:
    """Every finite value of a sign/exponent/mantissa format up to `largest`, sorted, in fp64."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = {0.0}
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            value = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
            if value <= largest:
                values |= {value, -value}
    return torch.tensor(sorted(values), dtype=torch.float64)


LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
TABLE = {"e4m3": all_values(4, 3, 448.0), "e5m2": all_values(5, 2, 57344.0)}


def nearest(x: Tensor, form: str) -> Tensor:
    """The nearest value of the format, ties to the one whose last mantissa bit is 0, beyond the largest that one."""
    table = TABLE[form]
    above = torch.searchsorted(table, x.contiguous()).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    # Values alternate between even and odd mantissas, and zero in the table's middle is even.
    even_low = (above - 1 - len(table) // 2) % 2 == 0
    closer_low = (x - low < high - x) | ((x - low == high - x) & even_low)
    return torch.where(closer_low, low, high)


def per_tensor(amax: float, form: str) -> float:
    return 1.0 if amax == 0 else float(torch.tensor(LARGEST[form], dtype=torch.float32) / torch.tensor(amax).float())


def at_scale(x: Tensor, scale: float | Tensor, form: str) -> Tensor:
    """Kernels take fp32 and scale it in fp32; the rest is exact."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    return nearest((x.float() * scale).double(), form) * (1 / scale).double()


def by_blocks(x_mk: Tensor, tall: int, wide: int, scale_of: Callable[[Tensor], Tensor], form: str) -> Tensor:
    m, k = x_mk.shape
    blocks = x_mk.reshape(m // tall, tall, k // wide, wide).transpose(1, 2)
    scales = scale_of(blocks.abs().flatten(2).max(-1).values)[:, :, None, None]
    return at_scale(blocks, scales, form).transpose(1, 2).reshape(m, k)


def blockwise_scale(amax: Tensor) -> Tensor:
    return torch.where(amax == 0, 1.0, 2.0 ** torch.floor(torch.log2(448.0 / amax)))


def mx_scale(amax: Tensor) -> Tensor:
    return 2.0 ** -torch.ceil(torch.log2(amax / 448.0)).clamp(min=-127)


@dataclass
class History:
    """Maxima that delayed scaling keeps of one tensor, newest last."""

    visits: int
    amax: list[float] = field(default_factory=list)

    def scale_and_record(self, whole: Tensor, form: str) -> float:
        scale = per_tensor(max(self.amax[-self.visits :]), form) if self.amax else 1.0
        self.amax.append(float(whole.abs().max()))
        return scale


@dataclass
class Fp8Reference:
    """The recipe, how a tensor is cut over ranks, and delayed scaling's memory."""

    recipe: str
    tensor: int = 1
    data: int = 1
    context: int = 1
    """Ranks that hold two slices of each sequence: the r-th from its beginning and from its end."""
    visits: int = 16
    histories: dict[tuple[int, str], History] = field(default_factory=dict)
    weights: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The step's rounded weights, made once."""

    @property
    def gradient_form(self) -> str:
        return "e5m2" if self.recipe in ("current", "delayed") else "e4m3"

    def kept_scale(self, key: int, tensor: str, whole: Tensor, form: str) -> float | None:
        if self.recipe != "delayed":
            return None
        return self.histories.setdefault((key, tensor), History(self.visits)).scale_and_record(whole, form)

    def operand(self, x_mk: Tensor, form: str, along: int, scale: float | None) -> Tensor:
        match self.recipe:
            case "current":
                return at_scale(x_mk, per_tensor(float(x_mk.abs().max()), form), form)
            case "delayed":
                assert scale is not None
                return at_scale(x_mk, scale, form)
            case "blockwise":
                return by_blocks(x_mk, *((1, 128) if along == 1 else (128, 1)), blockwise_scale, form)
            case _:
                return by_blocks(x_mk, *((1, 32) if along == 1 else (32, 1)), mx_scale, form)

    def weight(self, key: int, rank: int, shard: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        if (key, rank) not in self.weights:
            if self.recipe == "blockwise":
                both = by_blocks(shard, 128, 128, blockwise_scale, "e4m3")
                self.weights[key, rank] = (both, both)
            else:
                self.weights[key, rank] = tuple(self.operand(shard, "e4m3", along, scale) for along in (1, 0))  # type: ignore[assignment]
        return self.weights[key, rank]


class _Product(torch.autograd.Function):
    """x [data ranks, m, k or k / tensor per shard], weight shards -> y; what each rank holds is scaled by itself."""

    @staticmethod
    def forward(ctx: Any, x_dmk: Tensor, weight_nk: Tensor, fp8: Fp8Reference, key: int, split: int) -> Tensor:
        shards = weight_nk.chunk(fp8.tensor, dim=split)
        scale = None
        if (key, 0) not in fp8.weights:
            scale = fp8.kept_scale(key, "weight", weight_nk, "e4m3")
        copies = [fp8.weight(key, rank, shard, scale) for rank, shard in enumerate(shards)]
        x_scale = fp8.kept_scale(key, "input", x_dmk, "e4m3")
        ctx.save_for_backward(x_dmk)
        ctx.more = (copies, x_scale, fp8, key, split)
        out = []
        for x_mk in x_dmk:
            parts = x_mk.chunk(fp8.tensor, dim=1) if split == 1 else [x_mk] * fp8.tensor
            y = [fp8.operand(p, "e4m3", 1, x_scale) @ copy[0].t() for p, copy in zip(parts, copies, strict=True)]
            out.append(sum(y[1:], y[0]) if split == 1 else torch.cat(y, dim=1))
        return torch.stack(out)

    @staticmethod
    def backward(ctx: Any, d_y_dmn: Tensor) -> tuple[Tensor | None, ...]:
        (x_dmk,) = ctx.saved_tensors
        copies, x_scale, fp8, key, split = ctx.more
        form = fp8.gradient_form
        scale = fp8.kept_scale(key, "gradient", d_y_dmn, form)
        d_x, d_w = [], []
        for x_mk, d_y_mn in zip(x_dmk, d_y_dmn, strict=True):
            d_ys = [d_y_mn] * fp8.tensor if split == 1 else d_y_mn.chunk(fp8.tensor, dim=1)
            xs = x_mk.chunk(fp8.tensor, dim=1) if split == 1 else [x_mk] * fp8.tensor
            parts = [fp8.operand(d_y, form, 1, scale) @ copy[1] for d_y, copy in zip(d_ys, copies, strict=True)]
            d_x.append(torch.cat(parts, dim=1) if split == 1 else sum(parts[1:], parts[0]))
            products = [
                fp8.operand(d_y, form, 0, scale).t() @ fp8.operand(x, "e4m3", 0, x_scale)
                for d_y, x in zip(d_ys, xs, strict=True)
            ]
            d_w.append(torch.cat(products, dim=split))
        return torch.stack(d_x), sum(d_w[1:], d_w[0]), None, None, None


class _Linears(nn.Module):
    """A product on [b, s, k] as data-parallel ranks would run it, each with its own rows, tokens in order (s, b)."""

    def __init__(self, fp8: Fp8Reference) -> None:
        super().__init__()
        self.fp8 = fp8

    def product(self, x_bsk: Tensor, weight_nk: Tensor, split: int, key: int) -> Tensor:
        (b, s, k), data, context = x_bsk.shape, self.fp8.data, self.fp8.context
        rows, ranks = b // data, data * context
        slices = torch.arange(s).chunk(2 * context)
        order = torch.cat([torch.cat((slices[rank], slices[-1 - rank])) for rank in range(context)])
        x = x_bsk[:, order].view(data, rows, context, s // context, k).permute(0, 2, 3, 1, 4)
        y_dmn = _Product.apply(x.reshape(ranks, -1, k), weight_nk, self.fp8, key, split)
        y = y_dmn.view(data, context, s // context, rows, -1).permute(0, 3, 1, 2, 4).reshape(b, s, -1)
        return y[:, order.argsort()]


class Fp8Attention(_Linears):
    """`Attention` with queries, keys and values in one product, in Megatron's order: by group."""

    def __init__(self, plain: Attention, fp8: Fp8Reference) -> None:
        super().__init__(fp8)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = plain.q_proj, plain.k_proj, plain.v_proj, plain.o_proj
        self.heads, self.kv_heads, self.dim, self.base = plain.heads, plain.kv_heads, plain.dim, plain.base

    def forward(self, x_bsh: Tensor) -> Tensor:
        b, s, h = x_bsh.shape
        groups, dim = self.kv_heads, self.dim
        shared = self.heads // groups
        parts = [m.weight.reshape(groups, -1, h) for m in (self.q_proj, self.k_proj, self.v_proj)]
        y = self.product(x_bsh, torch.cat(parts, dim=1).reshape(-1, h), 0, id(self.q_proj))
        q, k, v = y.view(b, s, groups, -1).split((shared * dim, dim, dim), dim=-1)
        q = q.reshape(b, s, self.heads, dim).transpose(1, 2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, self.base), rotate(k, self.base)
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
        future = torch.ones(s, s, dtype=torch.bool).triu(1)
        out = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1)
        return self.product(out, self.o_proj.weight, 1, id(self.o_proj))


class Fp8SwiGLU(_Linears):
    """`SwiGLU` with gate and up in one product; each rank holds its part of both."""

    def __init__(self, plain: SwiGLU, fp8: Fp8Reference) -> None:
        super().__init__(fp8)
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj

    def forward(self, x_bsh: Tensor) -> Tensor:
        ranks = self.fp8.tensor
        pairs = zip(self.gate_proj.weight.chunk(ranks), self.up_proj.weight.chunk(ranks), strict=True)
        both = self.product(x_bsh, torch.cat([w for pair in pairs for w in pair]), 0, id(self.gate_proj))
        halves = [part.chunk(2, dim=-1) for part in both.chunk(ranks, dim=-1)]
        gate, up = (torch.cat([half[i] for half in halves], dim=-1) for i in (0, 1))
        return self.product(gate * torch.sigmoid(gate) * up, self.down_proj.weight, 1, id(self.down_proj))


def in_fp8(model: ReferenceLoopLM, fp8: Fp8Reference, layers: range) -> None:
    """Replaces the products of `layers`, in place; parameters and their names stay."""
    for index in layers:
        layer: Any = model.model.layers[index]
        layer.self_attn = Fp8Attention(layer.self_attn, fp8)
        layer.mlp = Fp8SwiGLU(layer.mlp, fp8)
