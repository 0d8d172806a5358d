"""The two objectives as sums over tokens, and the sums that the log is made of. Pure functions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_megatron.objective.exit import entropy, exit_log_probs, expected_depth, kl_to_prior


def expected_loss(
    gate_logits_tn: Tensor, ce_tn: Tensor, mask_n: Tensor, *, beta: float, prior_log_t: Tensor | None = None
) -> Tensor:
    """Stage I: sum over tokens of mask * (sum_t p_t CE_t - beta H(p)), or + beta KL(p || prior) with a prior.

    gate_logits_tn, ce_tn: [t, n]; mask_n: [n]. For the uniform prior the two forms differ by beta log T, a constant.
    Differentiable in the gate logits and in the cross-entropies (arXiv 2510.25741, eq. 4).
    """
    log_p_tn = exit_log_probs(gate_logits_tn)
    per_token = (log_p_tn.exp() * ce_tn).sum(0)
    if beta:
        regulariser = -entropy(log_p_tn) if prior_log_t is None else kl_to_prior(log_p_tn, prior_log_t)
        per_token = per_token + beta * regulariser
    return (per_token * mask_n).sum()


def gate_loss(gate_logits_tn: Tensor, ce_tn: Tensor, mask_n: Tensor, *, slope: float, threshold: float) -> Tensor:
    """Stage II: sum over tokens of (1/T) sum_{t=2..T} BCE(w_t, 1 - lambda_t) with the language model frozen.

    w_t = sigmoid(slope (I_t - threshold)) says whether loop t was worth it, I_t = max(0, CE_{t-1} - CE_t)
    (arXiv 2510.25741, eq. 5 and 6). Cross-entropies are taken as constants. Raises ValueError for fewer than two loops.
    """
    loops = ce_tn.shape[0]
    if loops < 2:
        raise ValueError("the gate objective compares loops: it needs at least two")
    z_tn = gate_logits_tn.to(torch.promote_types(gate_logits_tn.dtype, torch.float32))
    ce_tn = ce_tn.detach()
    improvement = (ce_tn[:-1] - ce_tn[1:]).clamp(min=0.0)
    keep_going = torch.sigmoid(slope * (improvement - threshold)).to(z_tn.dtype)
    per_token = F.binary_cross_entropy_with_logits(-z_tn[1:], keep_going, reduction="none").sum(0) / loops
    return (per_token * mask_n).sum()


@dataclass(frozen=True)
class LoopMeans:
    """Means over the counted tokens."""

    loss: float
    ce: list[float]
    exit_probability: list[float]
    entropy: float
    expected_depth: float
    tokens: int


@dataclass(frozen=True)
class LoopSums:
    """Sums over counted tokens of everything the log reports; adds up over microbatches and ranks. fp64 tensors."""

    ce_t: Tensor
    exit_probability_t: Tensor
    entropy: Tensor
    depth: Tensor
    objective: Tensor
    tokens: Tensor

    def to_tensor(self) -> Tensor:
        """All sums in one fp64 vector of 2 T + 4 entries, for a single all-reduce."""
        scalars = torch.stack((self.entropy, self.depth, self.objective, self.tokens))
        return torch.cat((self.ce_t, self.exit_probability_t, scalars))

    @classmethod
    def from_tensor(cls, vector: Tensor, loops: int) -> "LoopSums":
        """The inverse of `to_tensor`."""
        return cls(vector[:loops], vector[loops : 2 * loops], *vector[2 * loops :].unbind())

    @classmethod
    def zeros(cls, loops: int, device: torch.device) -> "LoopSums":
        return cls.from_tensor(torch.zeros(2 * loops + 4, dtype=torch.float64, device=device), loops)

    def __add__(self, other: "LoopSums") -> "LoopSums":
        return LoopSums.from_tensor(self.to_tensor() + other.to_tensor(), len(self.ce_t))

    def means(self) -> LoopMeans:
        """Divides by the number of counted tokens (by one where there are none)."""
        count = int(self.tokens.item())
        vector = (self.to_tensor() / max(count, 1)).tolist()
        loops = len(self.ce_t)
        entropy_mean, depth, loss, _ = vector[2 * loops :]
        return LoopMeans(loss, vector[:loops], vector[loops : 2 * loops], entropy_mean, depth, count)


@torch.no_grad()
def loop_sums(gate_logits_tn: Tensor, ce_tn: Tensor, mask_n: Tensor, objective: Tensor) -> LoopSums:
    """The sums of one microbatch: gate logits and CE [t, n], mask [n], and the objective already summed."""
    log_p_tn = exit_log_probs(gate_logits_tn)
    mask = mask_n.double()
    return LoopSums(
        ce_t=(ce_tn.double() * mask).sum(1),
        exit_probability_t=(log_p_tn.exp().double() * mask).sum(1),
        entropy=(entropy(log_p_tn).double() * mask).sum(),
        depth=(expected_depth(log_p_tn).double() * mask).sum(),
        objective=objective.double(),
        tokens=mask.sum(),
    )
