"""The looped pipeline: Megatron-Core's interleaved schedule over T visits of the same layers.

Each rank holds its layers once. Megatron's schedule is handed T light views, one a loop, which own no parameters:
to it they look like T model chunks, so activations travel 0 -> 1 -> .. -> p-1 -> 0 -> .. and the bubble shrinks to
(p-1)/(T m) of the ideal time. Without pipelining one view runs all loops; with one loop the plain 1F1B order serves.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.parallel.schedule_clock import ScheduleClock

ForwardStep = Callable[[Iterator[Any], "LoopView"], tuple[Tensor, Callable[[Tensor], tuple[Any, ...]] | None]]


class LoopView(torch.nn.Module):
    """What the schedule sees as a model chunk: the loops it runs and the tensor the previous rank sent."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, loops: range, vp_stage: int | None) -> None:
        super().__init__()
        self.config = config
        self.loops = loops
        self.vp_stage = vp_stage
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Called by the schedule before each forward step."""
        self.received = tensors[0]


class LoopPipeline:
    """Runs microbatches through the loops, forward and backward, for one loop count.

    Gradients stay where backward left them, summed over microbatches; the caller reduces them once.
    """

    def __init__(
        self,
        config: TransformerConfig,
        context: ParallelContext,
        loops: int,
        no_sync: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """`no_sync`, of Megatron's DDP, holds back a gradient reduction that overlaps with backward. The schedule lifts
        it for each view's last microbatch: a layer's reduction starts after the last of its T backward visits.
        """
        self._context = context
        self._views_config = copy.copy(config)
        self._views_config.no_sync_func = no_sync
        interleaved = context.pipeline_size > 1 and loops > 1
        if interleaved:
            # A plain attribute, not a constructor argument: the layers were built with L/p a rank, not L/(p T).
            self._views_config.virtual_pipeline_model_parallel_size = loops
            self._views_config.microbatch_group_size_per_vp_stage = context.pipeline_size
            self.views = [LoopView(self._views_config, range(t, t + 1), t) for t in range(loops)]
            self._schedule = schedules.forward_backward_pipelining_with_interleaving
        else:
            self._views_config.overlap_p2p_comm = False
            self.views = [LoopView(self._views_config, range(loops), None)]
            self._schedule = (
                schedules.forward_backward_pipelining_without_interleaving
                if context.pipeline_size > 1
                else schedules.forward_backward_no_pipelining
            )
        self._interleaved = interleaved

    def run(
        self,
        step: ForwardStep,
        batches: list[Any],
        *,
        sequence_length: int,
        microbatch_size: int,
        forward_only: bool = False,
        clock: ScheduleClock | None = None,
    ) -> list[Any]:
        """One pass over `batches`, this data-parallel rank's microbatches. Every rank of the job calls it together.

        Returns what the loss function handed out per microbatch, on the last pipeline rank; an empty list elsewhere.
        Each view gets its own iterator of (index, microbatch) pairs. `clock` records when each task ran.
        """
        self._views_config.timers = clock
        if clock is not None:
            clock.follow(self._backward_place)
        iterators = [iter(list(enumerate(batches))) for _ in self.views]
        arguments: dict[str, Any] = {}
        if self._context.pipeline_size > 1:
            arguments["p2p_communicator"] = P2PCommunicator(pp_group=self._context.groups.pp, config=self._views_config)
        return self._schedule(
            forward_step_func=step,
            data_iterator=iterators if self._interleaved else iterators[0],
            model=list(self.views) if self._interleaved else self.views[0],
            num_microbatches=len(batches),
            seq_length=sequence_length,
            micro_batch_size=microbatch_size,
            forward_only=forward_only,
            pg_collection=self._context.groups,
            **arguments,
        )

    def _backward_place(self, index: int) -> tuple[int, int]:
        """Loop and microbatch, from 1, of a rank's `index`-th backward: groups of p microbatches, last loop first."""
        if not self._interleaved:
            return int(len(self.views[0].loops) == 1), index + 1
        pipeline, loops = self._context.pipeline_size, len(self.views)
        group, within = divmod(index, pipeline * loops)
        return loops - within // pipeline, group * pipeline + within % pipeline + 1


class JoinLoopGradient(torch.autograd.Function):
    """Passes a loop's state on to the next loop; its backward adds the gradient of that loop's own loss.

    The state leaves for another rank, so autograd cannot join the two uses by itself. `leaf` is the detached copy the
    loss was computed on; the last loop's backward, the first of a microbatch, fills its gradient.
    """

    @staticmethod
    def forward(ctx: Any, h_sbh: Tensor, leaf_sbh: Tensor) -> Tensor:
        ctx.leaf_sbh = leaf_sbh
        return h_sbh.view_as(h_sbh)

    @staticmethod
    def backward(ctx: Any, d_next_sbh: Tensor) -> tuple[Tensor, None]:
        own = ctx.leaf_sbh.grad
        ctx.leaf_sbh.grad = None
        return (d_next_sbh if own is None else d_next_sbh + own), None
