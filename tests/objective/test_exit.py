"""The exit distribution against the plain product formula in fp64, and at the edges of bf16."""

import pytest
import torch

from ouro_megatron.objective.exit import entropy, exit_log_probs, expected_depth, kl_to_prior, log_prior


def naive(z_tn: torch.Tensor) -> torch.Tensor:
    """p_t = lambda_t prod (1 - lambda), in probability space."""
    rate = torch.sigmoid(z_tn.double())
    survival, rows = torch.ones_like(rate[0]), []
    for t in range(rate.shape[0] - 1):
        rows.append(rate[t] * survival)
        survival = survival * (1 - rate[t])
    return torch.stack([*rows, survival])


@pytest.mark.parametrize("loops", [1, 2, 4, 9])
def test_equals_product_formula(loops: int) -> None:
    z_tn = torch.randn(loops, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(loops)) * 3
    p_tn = exit_log_probs(z_tn).exp()
    torch.testing.assert_close(p_tn, naive(z_tn), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(p_tn.sum(0), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-12)


def test_entropy_depth_and_kl() -> None:
    z_tn = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p_tn, log_p_tn = naive(z_tn), exit_log_probs(z_tn)
    torch.testing.assert_close(entropy(log_p_tn), -(p_tn * p_tn.log()).sum(0))
    steps = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(expected_depth(log_p_tn), (steps * p_tn).sum(0))
    prior = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    prior = prior / prior.sum()
    torch.testing.assert_close(log_prior(4, "geometric", 0.5, dtype=torch.float64).exp(), prior)
    torch.testing.assert_close(kl_to_prior(log_p_tn, prior.log()), (p_tn * (p_tn / prior[:, None]).log()).sum(0))


def test_uniform_prior_is_entropy_up_to_a_constant() -> None:
    log_p_tn = exit_log_probs(torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    uniform = log_prior(4, "uniform", dtype=torch.float64)
    torch.testing.assert_close(
        kl_to_prior(log_p_tn, uniform), torch.log(torch.tensor(4.0, dtype=torch.float64)) - entropy(log_p_tn)
    )


@pytest.mark.parametrize("extreme", [300.0, -300.0, 3e4, -3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shut_and_open_gates_stay_finite(extreme: float, dtype: torch.dtype) -> None:
    z_tn = torch.full((4, 3), extreme, dtype=dtype, requires_grad=True)
    log_p_tn = exit_log_probs(z_tn)
    value = entropy(log_p_tn).sum() + kl_to_prior(log_p_tn, log_prior(4, "geometric", 0.5)).sum()
    value = value + expected_depth(log_p_tn).sum()
    value.backward()
    assert torch.isfinite(value)
    assert z_tn.grad is not None and torch.isfinite(z_tn.grad).all()
    leaves_at = 1 if extreme > 0 else 4
    torch.testing.assert_close(expected_depth(log_p_tn), torch.full((3,), float(leaves_at)))
