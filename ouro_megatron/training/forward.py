"""One rank's forward pass of a microbatch: layers, and on the last pipeline rank the losses of the loops."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.objective.head import HeadGroup
from ouro_megatron.objective.loop_loss import LoopLoss, LossParts
from ouro_megatron.objective.losses import LoopSums
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.parallel.loop_pipeline import JoinLoopGradient, LoopView
from ouro_megatron.parallel.position import Position
from ouro_megatron.recipe.schema import ObjectiveSection
from ouro_megatron.training.microbatch import OwnTokens


class LoopedForward:
    """The forward step the schedule calls for each (view, microbatch)."""

    def __init__(
        self,
        lm: LoopLM,
        context: ParallelContext,
        objective: ObjectiveSection,
        head_weight: Callable[[], Tensor],
        position: Position,
        *,
        loops: int,
        training: bool,
    ) -> None:
        """`head_weight` gives the loss head's weight, ready to be used; `position` is told where the pass is."""
        self._lm = lm
        self._context = context
        self._objective = objective
        self._head_weight = head_weight
        self._position = position
        self._loops = loops
        self._training = training
        self._losses: dict[int, LoopLoss] = {}
        self._rotary: Tensor | None = None

    def __call__(self, batches: Iterator[tuple[int, OwnTokens]], view: LoopView) -> tuple[Tensor, Any]:
        index, batch = next(batches)
        context, position = self._context, self._position
        position.microbatch = index + 1
        if view.loops.start == 0 and context.is_first_stage:
            h_sbh = self._lm.embed(batch.tokens_bs)
        else:
            assert view.received is not None
            h_sbh = view.received
        rotary, documents = self._angles(batch), batch.documents
        for loop in view.loops:
            position.loop = loop + 1
            h_sbh = self._lm.run_layers(h_sbh, rotary, loop=loop, documents=documents)
            if context.is_last_stage:
                h_sbh = self._add_loss(index, batch, h_sbh, leaves=loop == view.loops[-1] and loop + 1 < self._loops)
        if not context.is_last_stage or view.loops[-1] + 1 < self._loops:
            return h_sbh, None
        # The gate objective runs without a graph through the model: its own short one ends here.
        gate_only = self._training and self._objective.kind == "gate"
        with torch.set_grad_enabled(gate_only or torch.is_grad_enabled()):
            loss, tokens, sums = self._losses.pop(index).finish()
            if gate_only:
                loss.backward()
        return loss, partial(_hand_out, tokens=tokens, sums=sums)

    def _angles(self, batch: OwnTokens) -> Tensor:
        """RoPE's: those of plain rows are kept for the step, packed documents have their own in each microbatch."""
        if batch.packed:
            return self._lm.rotary_of(batch.length, batch.documents)
        if self._rotary is None:
            self._rotary = self._lm.rotary_of(batch.length, None)
        return self._rotary

    def _add_loss(self, index: int, batch: OwnTokens, h_sbh: Tensor, *, leaves: bool) -> Tensor:
        """Adds this loop's loss. `leaves`: the state goes on to another rank, beyond autograd's reach."""
        if index not in self._losses:
            self._losses[index] = self._new_loss(batch)
        if not (leaves and h_sbh.requires_grad):
            self._losses[index].add_loop(h_sbh)
            return h_sbh
        leaf_sbh = h_sbh.detach().requires_grad_()
        self._losses[index].add_loop(leaf_sbh)
        return JoinLoopGradient.apply(h_sbh, leaf_sbh)

    def _new_loss(self, batch: OwnTokens) -> LoopLoss:
        lm, context = self._lm, self._context
        assert lm.output_layer is not None
        head = HeadGroup(context.groups.tp, context.tensor_rank, context.tensor_size, context.sequence_parallel)
        return LoopLoss(
            LossParts(lm.gate_logits, self._head_weight(), head),
            self._objective,
            self._loops,
            batch.labels_bs,
            batch.mask_bs,
            training=self._training,
        )


def _hand_out(loss: Tensor, *, tokens: Tensor, sums: LoopSums) -> tuple[Tensor, Tensor, LoopSums]:
    return loss, tokens, sums
