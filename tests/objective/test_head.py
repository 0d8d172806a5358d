"""The one-pass loss head against autograd over full logits; memory stays in chunks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ouro_megatron.objective.head import HeadGroup, token_cross_entropy
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ParallelSection
from tests.distributed.ranks import run_ranks

S, B, H, V = 10, 3, 16, 40


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    h_sbh = torch.randn(S, B, H, dtype=torch.float64, generator=generator).to(dtype)
    weight_vh = torch.randn(V, H, dtype=torch.float64, generator=generator).to(dtype)
    labels_n = torch.randint(0, V, (S * B,), generator=generator)
    coefficient_n = torch.rand(S * B, dtype=torch.float64, generator=generator)
    return h_sbh, weight_vh, labels_n, coefficient_n


def wanted(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CE, d hidden, d weight from autograd in fp64 on the same (rounded) inputs."""
    h_sbh, weight_vh, labels_n, coefficient_n = example(dtype)
    h = h_sbh.double().requires_grad_()
    w = weight_vh.double().requires_grad_()
    ce_n = F.cross_entropy(h.flatten(0, 1) @ w.t(), labels_n, reduction="none")
    d_h, d_w = torch.autograd.grad((ce_n * coefficient_n).sum(), (h, w))
    return ce_n.detach(), d_h, d_w


def one_pass(size: int, sequence_parallel: bool, chunk: int, dtype: torch.dtype) -> float:
    """Largest difference from `wanted` on this rank, relative to the largest entry."""
    context = create_context(ParallelSection(tensor=size))
    h_sbh, weight_vh, labels_n, coefficient_n = example(dtype)
    rank = context.tensor_rank
    head = HeadGroup(context.groups.tp, rank, size, sequence_parallel)
    mine_sbh = h_sbh.chunk(size)[rank] if sequence_parallel else h_sbh
    mine_vh = weight_vh.chunk(size)[rank].contiguous()
    ce_n, gradients = token_cross_entropy(mine_sbh, mine_vh, labels_n, coefficient_n, head, chunk)
    assert gradients is not None and gradients.weight_vh is not None
    true_ce, true_h, true_w = wanted(dtype)
    true_h = true_h.chunk(size)[rank] if sequence_parallel else true_h
    pairs = [(ce_n, true_ce), (gradients.hidden_sbh, true_h), (gradients.weight_vh, true_w.chunk(size)[rank])]
    worst = max(float((got.double() - want).abs().max() / want.abs().max()) for got, want in pairs)
    context.close()
    return worst


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
def test_exact_in_fp64(chunk: int) -> None:
    assert max(run_ranks(one_pass, 1, 1, False, chunk, torch.float64)) < 1e-12


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_vocabulary_over_two_ranks(sequence_parallel: bool) -> None:
    assert max(run_ranks(one_pass, 2, 2, sequence_parallel, 7, torch.float64)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_low_precision(dtype: torch.dtype, tolerance: float) -> None:
    assert max(run_ranks(one_pass, 1, 1, False, 8, dtype)) < tolerance


def test_huge_logits_stay_finite() -> None:
    head = HeadGroup(dist.group.WORLD, 0, 1, False)  # type: ignore[arg-type]
    h_sbh, weight_vh, labels_n, coefficient_n = example(torch.float32)
    ce_n, gradients = token_cross_entropy(h_sbh * 1e4, weight_vh * 1e3, labels_n, coefficient_n, head, 4)
    assert gradients is not None and gradients.weight_vh is not None
    assert torch.isfinite(ce_n).all() and torch.isfinite(gradients.weight_vh).all()
