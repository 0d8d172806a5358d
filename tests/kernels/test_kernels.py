"""The Triton kernels against plain torch: on a GPU where there is one, else in Triton's interpreter (conftest.py)."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed (it comes with the dev extra on Linux)")
from ouro_megatron.kernels import cross_entropy, rms_norm, rotary, swiglu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - wanted.double()).norm() / wanted.double().norm()
    assert error < (1e-6 if dtype == torch.float32 else 8e-3), f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 64), (7, 1, 200), (2, 1, 1100)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], with_residual: bool) -> None:
    torch.manual_seed(0)
    x, d_y = drawn(*shape, dtype=dtype, scale=3.0), drawn(*shape, dtype=dtype)
    weight = drawn(shape[-1], dtype=dtype)
    residual = drawn(*shape, dtype=dtype) if with_residual else None
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + 1e-6) * exact_weight
    if residual is not None:
        wanted = wanted + residual.double()
    wanted.backward(d_y.double())
    y, scale = rms_norm.forward(x, weight, 1e-6, residual)
    d_x, d_weight = rms_norm.backward(d_y, x, weight, scale)
    assert exact_x.grad is not None and exact_weight.grad is not None
    close(y, wanted.detach(), dtype)
    close(d_x, exact_x.grad, dtype)
    close(d_weight, exact_weight.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 176, 1500])
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    gate_up, d_out = drawn(4, 3, 2 * width, dtype=dtype, scale=2.0), drawn(4, 3, width, dtype=dtype)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    wanted.backward(d_out.double())
    assert exact.grad is not None
    close(swiglu.forward(gate_up), wanted.detach(), dtype)
    close(swiglu.backward(d_out, gate_up), exact.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 3), (3, 1)])
@pytest.mark.parametrize("own_positions", [False, True])
def test_split_rotary(dtype: torch.dtype, heads: int, groups: int, own_positions: bool) -> None:
    torch.manual_seed(0)
    s, b, dim = 5, 2, 16
    mixed = drawn(s, b, groups, (heads // groups + 2) * dim, dtype=dtype).requires_grad_()
    positions = torch.randint(0, 60_000, (s, b if own_positions else 1))
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    half = positions[..., None].float() / 10_000.0**exponent
    angles = torch.cat((half, half), dim=-1)[:, :, None].to(DEVICE)

    exact = mixed.detach().double().requires_grad_()
    query, key, value = exact.split((heads // groups * dim, dim, dim), dim=3)
    query = query.reshape(s, b, heads, dim)

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * angles.double().cos() + torch.cat((-high, low), dim=-1) * angles.double().sin()

    wanted = (turned(query), turned(key), value)
    found = rotary.SplitRotary.apply(mixed, angles, dim)
    d_parts = [drawn(*part.shape, dtype=dtype) for part in wanted]
    torch.autograd.backward(wanted, [part.double() for part in d_parts])
    torch.autograd.backward(found, d_parts)
    assert exact.grad is not None and mixed.grad is not None
    for one, other in zip(found, wanted, strict=True):
        close(one.detach(), other.detach(), dtype)
    close(mixed.grad, exact.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "ranks"), [(100, 1), (96, 3), (9000, 2)])
def test_cross_entropy(dtype: torch.dtype, vocab: int, ranks: int) -> None:
    """Statistics of the ranks' columns, put together as the ranks do it, and each rank's gradient."""
    torch.manual_seed(0)
    rows, share = 6, vocab // ranks
    logits = drawn(rows, vocab, dtype=dtype, scale=4.0)
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    labels[0], labels[1] = 0, vocab - 1
    coefficient = torch.rand(rows, device=DEVICE)
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, labels, reduction="none")
    (coefficient.double() * wanted).sum().backward()
    assert exact.grad is not None
    shards = [logits[:, share * rank : share * (rank + 1)].clone() for rank in range(ranks)]
    parts = [cross_entropy.statistics(shard, labels, share * rank) for rank, shard in enumerate(shards)]
    maximum = torch.stack([part[0] for part in parts]).amax(0)
    total = sum(part[1] * torch.exp(part[0] - maximum) for part in parts)
    target = sum(part[2] for part in parts)
    assert isinstance(total, torch.Tensor)
    log_total = total.log() + maximum
    torch.testing.assert_close(log_total - target, wanted.detach().float(), rtol=1e-5, atol=1e-5)
    for rank, shard in enumerate(shards):
        found = cross_entropy.gradient_in_place(shard, labels, coefficient, log_total, share * rank)
        close(found, exact.grad[:, share * rank : share * (rank + 1)], dtype)
