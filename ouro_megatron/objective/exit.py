"""The exit distribution in log space (arXiv 2510.25741, section 3).

    S_0 = 1;  p_t = lambda_t S_{t-1};  S_t = S_{t-1} (1 - lambda_t)  for t < T;  p_T = S_{T-1}

All functions take gate logits z_t (lambda_t = sigmoid(z_t)), compute in fp32 (fp64 for fp64 input) and stay finite,
values and gradients, for gates that are shut or open as far as bf16 goes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exit_step(gate_logit_n: Tensor, log_survival_n: Tensor, *, last: bool) -> tuple[Tensor, Tensor]:
    """One loop of the recursion: (log p_t, log S_t), both [n], from z_t and log S_{t-1}.

    With `last` the gate is not used: all that survived leaves, log p_T = log S_{T-1}.
    """
    if last:
        return log_survival_n, torch.full_like(log_survival_n, -torch.inf)
    z = _wide(gate_logit_n)
    return F.logsigmoid(z) + log_survival_n, F.logsigmoid(-z) + log_survival_n


def exit_log_probs(gate_logits_tn: Tensor) -> Tensor:
    """log p_t as [t, n] from gate logits [t, n]; the last row of the logits has no say."""
    z_tn = _wide(gate_logits_tn)
    log_survival_n = torch.zeros_like(z_tn[0])
    rows = []
    for t in range(z_tn.shape[0]):
        log_p_n, log_survival_n = exit_step(z_tn[t], log_survival_n, last=t == z_tn.shape[0] - 1)
        rows.append(log_p_n)
    return torch.stack(rows)


def log_prior(
    loops: int,
    kind: Literal["uniform", "geometric"],
    eta: float = 0.5,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """log of the prior over exits, [t]: uniform, or p_t ~ eta (1 - eta)^(t-1), cut at T and normalised."""
    if kind == "uniform":
        return torch.full((loops,), -float(torch.tensor(float(loops), dtype=torch.float64).log()), dtype=dtype).to(
            device
        )
    steps = torch.arange(loops, dtype=torch.float64)
    raw = steps * torch.log1p(torch.tensor(-eta, dtype=torch.float64))
    return (raw - raw.logsumexp(0)).to(dtype=dtype, device=device)


def _plogp(log_p_tn: Tensor, log_q_tn: Tensor) -> Tensor:
    """sum_t p_t log_q_t, where p_t = 0 contributes nothing even if log_q_t is -inf."""
    p_tn = log_p_tn.exp()
    return torch.where(p_tn > 0, p_tn * log_q_tn.clamp(min=torch.finfo(log_q_tn.dtype).min), 0.0).sum(0)


def entropy(log_p_tn: Tensor) -> Tensor:
    """H(p) in nats, [n]."""
    return -_plogp(log_p_tn, log_p_tn)


def kl_to_prior(log_p_tn: Tensor, log_prior_t: Tensor) -> Tensor:
    """KL(p || prior) in nats, [n]."""
    return _plogp(log_p_tn, log_p_tn - log_prior_t[:, None])


def expected_depth(log_p_tn: Tensor) -> Tensor:
    """sum_t t p_t, [n], between 1 and T."""
    steps_t = torch.arange(1, log_p_tn.shape[0] + 1, dtype=log_p_tn.dtype, device=log_p_tn.device)
    return (log_p_tn.exp() * steps_t[:, None]).sum(0)
