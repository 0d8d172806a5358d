"""The loss of one microbatch, gathered loop by loop on the rank that holds head and gate."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_megatron.objective.exit import exit_step, log_prior
from ouro_megatron.objective.head import HeadGroup, WeightedCrossEntropy, token_cross_entropy
from ouro_megatron.objective.losses import LoopSums, expected_loss, gate_loss, loop_sums
from ouro_megatron.recipe.schema import ObjectiveSection

NEVER = -1e4
"""Logit of a gate that is shut: exp of it is 0 in fp32 and in fp64."""


@dataclass(frozen=True)
class LossParts:
    """What the loss needs of the model's last part."""

    gate: Callable[[Tensor], Tensor]
    """[s, b, h] -> gate logits [s, b]."""
    head_weight: Tensor
    """This rank's rows of the head, [v / tensor_parallel, h]."""
    head: HeadGroup


class LoopLoss:
    """Takes h_1 .. h_T in order, then gives the objective summed over the counted tokens.

    Stage I: the cross-entropy of loop t enters with p_t held fixed, which gives the right gradient for the model;
    the gates' gradient comes from the objective as a function of the gate logits, with the cross-entropies held fixed.
    The sum of both is the gradient of sum_t p_t CE_t + beta KL(p || prior). Stage II: only the gates learn.
    `last_loop`: CE_T alone; no gate is asked, and all tokens count as leaving at the last loop.
    """

    def __init__(
        self,
        parts: LossParts,
        objective: ObjectiveSection,
        loops: int,
        labels_bs: Tensor,
        mask_bs: Tensor,
        *,
        training: bool,
    ) -> None:
        self._parts = parts
        self._objective = objective
        self._loops = loops
        self._labels_n = labels_bs.t().reshape(-1)
        self._mask_n = mask_bs.t().reshape(-1).float()
        self._training = training
        self._log_survival_n: Tensor | None = None
        self._gate_logits: list[Tensor] = []
        self._ce: list[Tensor] = []
        self._terms: list[Tensor] = []

    def add_loop(self, h_sbh: Tensor) -> None:
        """Takes the normed state after the next loop. While training stage I, gradients flow into `h_sbh`."""
        last = len(self._ce) + 1 == self._loops
        gate_logit_n = self._gate_logit(h_sbh)
        self._gate_logits.append(gate_logit_n)
        survival = self._log_survival_n
        if survival is None:
            survival = torch.zeros_like(gate_logit_n, requires_grad=False)
        log_p_n, self._log_survival_n = exit_step(gate_logit_n.detach(), survival.detach(), last=last)
        parts, chunk = self._parts, self._objective.chunk_tokens
        kind = self._objective.kind
        if self._training and (kind == "expected_loss" or (kind == "last_loop" and last)):
            coefficient_n = log_p_n.exp() * self._mask_n
            term, ce_n = WeightedCrossEntropy.apply(
                h_sbh, parts.head_weight, self._labels_n, coefficient_n, parts.head, chunk
            )
            self._terms.append(term)
        else:
            ce_n, _ = token_cross_entropy(h_sbh, parts.head_weight, self._labels_n, None, parts.head, chunk)
        self._ce.append(ce_n.detach())

    def _gate_logit(self, h_sbh: Tensor) -> Tensor:
        """[s * b] on every tensor-parallel rank."""
        if self._objective.kind == "last_loop":
            return torch.full_like(self._mask_n, NEVER)
        if self._training and self._objective.kind == "gate":
            with torch.enable_grad():
                return self._parts.gate(h_sbh.detach()).reshape(-1)
        return self._parts.gate(h_sbh).reshape(-1)

    def finish(self) -> tuple[Tensor, Tensor, LoopSums]:
        """After the last loop: (objective summed over counted tokens, their number as int32, sums for the log)."""
        assert len(self._ce) == self._loops, f"{len(self._ce)} of {self._loops} loops were added"
        gates_tn, ce_tn = torch.stack(self._gate_logits), torch.stack(self._ce)
        settings = self._objective
        if settings.kind == "gate":
            loss = gate_loss(
                gates_tn, ce_tn, self._mask_n, slope=settings.gate_slope, threshold=settings.gate_threshold
            )
        elif settings.kind == "last_loop":
            loss = (ce_tn[-1] * self._mask_n).sum()
        else:
            prior = None
            if settings.prior == "geometric":
                prior = log_prior(self._loops, "geometric", settings.eta, dtype=gates_tn.dtype, device=gates_tn.device)
            loss = expected_loss(gates_tn, ce_tn, self._mask_n, beta=settings.beta, prior_log_t=prior)
        sums = loop_sums(gates_tn.detach(), ce_tn, self._mask_n, loss.detach())
        for term in self._terms:
            # Value unchanged, gradient added: `loss` already holds the terms' values.
            loss = loss + (term - term.detach())
        return loss, self._mask_n.sum().to(torch.int32), sums
