"""Both objectives and their gradients against autograd on the naive formulas in fp64."""

import pytest
import torch

from ouro_megatron.objective.exit import exit_log_probs, log_prior
from ouro_megatron.objective.losses import LoopSums, expected_loss, gate_loss, loop_sums
from tests.objective.test_exit import naive


def inputs(loops: int = 4, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(loops)
    z_tn = torch.randn(loops, tokens, dtype=torch.float64, generator=generator).requires_grad_()
    ce_tn = (torch.rand(loops, tokens, dtype=torch.float64, generator=generator) * 5).requires_grad_()
    mask_n = (torch.rand(tokens, generator=generator) > 0.3).double()
    return z_tn, ce_tn, mask_n


@pytest.mark.parametrize("prior", ["uniform", "geometric"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_expected_loss(prior: str, beta: float) -> None:
    z_tn, ce_tn, mask_n = inputs()
    q_t = log_prior(4, "geometric", 0.3, dtype=torch.float64)
    loss = expected_loss(z_tn, ce_tn, mask_n, beta=beta, prior_log_t=q_t if prior == "geometric" else None)
    gradients = torch.autograd.grad(loss, (z_tn, ce_tn))
    p_tn = naive(z_tn)
    term = (p_tn * p_tn.log()).sum(0) if prior == "uniform" else (p_tn * (p_tn.log() - q_t[:, None])).sum(0)
    wanted = (((p_tn * ce_tn).sum(0) + beta * term) * mask_n).sum()
    torch.testing.assert_close(loss, wanted)
    for got, want in zip(gradients, torch.autograd.grad(wanted, (z_tn, ce_tn)), strict=True):
        torch.testing.assert_close(got, want)


def test_gate_loss() -> None:
    z_tn, ce_tn, mask_n = inputs()
    loss = gate_loss(z_tn, ce_tn, mask_n, slope=50.0, threshold=0.005)
    (gradient,) = torch.autograd.grad(loss, (z_tn,))
    keep = torch.sigmoid(50.0 * ((ce_tn[:-1] - ce_tn[1:]).clamp(min=0) - 0.005)).detach()
    rate = torch.sigmoid(z_tn)[1:]
    bce = -(keep * (1 - rate).log() + (1 - keep) * rate.log())
    wanted = (bce.sum(0) / 4 * mask_n).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, (z_tn,))[0])
    assert gradient[0].abs().max() == 0, "the first gate has no label"


def test_gate_loss_needs_two_loops() -> None:
    with pytest.raises(ValueError, match="at least two"):
        gate_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(3), slope=50.0, threshold=0.005)


def test_sums_add_up_over_microbatches() -> None:
    z_tn, ce_tn, mask_n = (tensor.detach() for tensor in inputs(tokens=60))
    parts = [
        loop_sums(z, ce, m, expected_loss(z, ce, m, beta=0.1))
        for z, ce, m in zip(z_tn.split(20, 1), ce_tn.split(20, 1), mask_n.split(20), strict=True)
    ]
    total = parts[0] + parts[1] + parts[2]
    means = LoopSums.from_tensor(total.to_tensor(), 4).means()
    count = float(mask_n.sum())
    assert means.tokens == count
    assert means.loss == pytest.approx(float(expected_loss(z_tn, ce_tn, mask_n, beta=0.1)) / count)
    assert means.ce == pytest.approx(((ce_tn * mask_n).sum(1) / count).tolist())
    assert sum(means.exit_probability) == pytest.approx(1.0)
    assert means.exit_probability == pytest.approx(((exit_log_probs(z_tn).exp() * mask_n).sum(1) / count).tolist())


def test_no_counted_token_gives_zeros() -> None:
    means = LoopSums.zeros(3, torch.device("cpu")).means()
    assert means.tokens == 0 and means.loss == 0.0 and means.ce == [0.0, 0.0, 0.0]
