"""Model, gradients and optimizer of one rank: one training step, one evaluation pass."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.objective.losses import LoopMeans, LoopSums
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.parallel.loop_pipeline import LoopPipeline
from ouro_megatron.parallel.position import Position
from ouro_megatron.parallel.schedule_clock import ScheduleClock, TaskTime
from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection
from ouro_megatron.training.forward import LoopedForward
from ouro_megatron.training.microbatch import Microbatch, OwnTokens, context_part
from ouro_megatron.training.optimizer import build_optimizer


@dataclass(frozen=True)
class StepResult:
    """Global means of one step, the same on every rank."""

    means: LoopMeans
    grad_norm: float
    skip_reason: str = ""
    """Why the weights were left alone; empty when they were updated."""

    @property
    def skipped(self) -> bool:
        return bool(self.skip_reason)


Judge = Callable[[LoopMeans, float], str | None]
"""Told a step's means and gradient norm; says why its update should be left out, or None. All ranks call it."""


class Engine:
    """Everything that runs on the device for one recipe. Knows nothing of files, schedules or logs."""

    def __init__(
        self,
        lm: LoopLM,
        context: ParallelContext,
        objective: ObjectiveSection,
        optimizer: OptimizerSection | None,
        *,
        loops: int,
        position: Position | None = None,
        overlap: bool = False,
        cuda_graphs: bool = False,
        bucket_parameters: int | None = None,
    ) -> None:
        """`optimizer` None leaves the engine without one: it can make gradients, not apply them (a dry run).

        `cuda_graphs`: training steps from the second on replay recorded visits of the layers; what that asks for is
        checked with the recipe (`recipe/validate.py`).
        """
        self.lm = lm
        self.context = context
        self.objective = objective
        self.loops = loops
        self.position = position or Position()
        self.clip = optimizer.clip if optimizer else 0.0
        self.keep_whole_gradients = False
        """Leave every data-parallel rank with all reduced gradients, not only its optimizer shard: to inspect them."""
        # Nothing to hide in the gate stage, whose backward runs inside forward, nor with one loop, which uses no gate.
        # With `last_loop` no gate is used and the head is used once: Megatron would wait for gradients that never come.
        self.overlap = overlap and objective.kind == "expected_loss" and loops > 1 and context.replicas > 1
        if objective.kind != "expected_loss":
            for name, parameter in lm.named_parameters():
                parameter.requires_grad_(name.startswith("exit_gate.") == (objective.kind == "gate"))
        with context.platform.megatron_calls():
            self.ddp = DistributedDataParallel(
                config=lm.config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=self.overlap,
                    overlap_param_gather=self.overlap,
                    bucket_size=bucket_parameters,
                    fp8_param_gather=lm.config.fp8_param,
                ),
                module=lm,
                pg_collection=context.groups,
            )
            self.optimizer: Any = build_optimizer(optimizer, self.ddp, context, lm) if optimizer else None
        # The gate stage runs the layers without gradients, which graphs are not for.
        self.cuda_graphs = cuda_graphs and objective.kind != "gate"
        self._kernels_are_made = False
        self.pipeline = self._new_pipeline(loops)
        self._clock = ScheduleClock(context.device)

    def _new_pipeline(self, loops: int) -> LoopPipeline:
        return LoopPipeline(self.lm.config, self.context, loops, self.ddp.no_sync if self.overlap else None)

    def head_weight(self) -> Tensor:
        """The loss head's weight, ready to be used. Last pipeline rank only.

        It is used without its module and gets its gradient in forward, so with overlap neither of Megatron's hooks sees
        it: the gather of new weights is awaited here, and the reduction is told through `gradient_is_in`.
        """
        assert self.lm.output_layer is not None
        weight = self.lm.output_layer.weight
        if not self.overlap:
            return weight
        group = self.ddp.param_to_bucket_group[weight]
        group.finish_param_sync()
        alias = weight.detach()
        alias.main_grad = weight.main_grad
        alias.gradient_is_in = lambda: group.register_grad_ready(weight, self.ddp.force_all_reduce)
        return alias

    def set_loops(self, loops: int) -> None:
        """Changes T between two steps; weights, gradient buffers and optimizer stay. All ranks call it together.

        The pipeline's views are made anew. Megatron's gradient reduction counts how often each parameter is used in
        its first step and reduces after that many uses: it must count again, as each layer is now used another number
        of times.
        """
        if loops == self.loops:
            return
        self.loops = loops
        self.lm.graphs = None
        self.pipeline = self._new_pipeline(loops)
        for group in [*self.ddp.bucket_groups, *self.ddp.expert_parallel_bucket_groups]:
            group.is_first_batch = True
            group.golden_per_param_grad_ready_counts = {}
            group.per_param_grad_ready_counts = {}

    def adopt_weights(self) -> None:
        """Makes the optimizer's fp32 copies follow weights that were filled after this engine was built."""
        with self.context.platform.megatron_calls():
            self.optimizer.reload_model_params()
        self.lm.weights_changed()

    def train_step(self, batches: list[Microbatch], lr: float, judge: Judge | None = None) -> StepResult:
        """One optimizer step over this rank's microbatches. All ranks call it together.

        Python's cyclic garbage collector waits for its end: it would walk millions of objects while a GPU has nothing
        to do, and on each rank at another moment.
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            return self.update(self.accumulate(batches), lr, judge)
        finally:
            if collects:
                gc.enable()

    def accumulate(self, batches: list[Microbatch]) -> LoopMeans:
        """Fresh reduced gradients in each parameter's `main_grad`; returns the global means. All ranks call it.

        Gradients are of the objective summed over tokens, divided once by the global number of counted tokens.
        """
        self.position.enter("forward and backward")
        self.ddp.train()
        self._clear_gradients()
        if self.cuda_graphs:
            self._record_graphs(batches[0])
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self._clock = ScheduleClock(self.context.device, self.position)
        means = self._run(batches, training=True, clock=self._clock).means()
        self._reduce_gradients(means.tokens)
        return means

    def trace(self, batches: list[Microbatch]) -> None:
        """Forward, backward and gradient reduction without looking at any number: for dry runs on the meta device."""
        first = batches[0].tokens_bs
        self.pipeline.run(
            self._forward(self.loops, training=True),
            self._own_tokens(batches),
            sequence_length=first.shape[1],
            microbatch_size=first.shape[0],
            forward_only=self.objective.kind == "gate",
        )
        finalize_model_grads([self.ddp], None, pg_collection=self.context.groups)

    @property
    def busy_seconds(self) -> float:
        """Seconds this rank spent in the last step's forward and backward tasks, not waiting for other pipeline or
        data-parallel ranks. After `update`, which waits for the GPU in any case.
        """
        return self._clock.busy_seconds()

    def tasks(self) -> list[TaskTime]:
        """When this rank's forward and backward tasks of the last step ran, in order. Waits for the GPU."""
        return self._clock.times()

    def update(self, means: LoopMeans, lr: float, judge: Judge | None = None) -> StepResult:
        """Clips and applies the gradients that `accumulate` left. All ranks call it.

        Not when something is not finite, or when `judge` has a reason against it.
        """
        self.position.enter("optimizer step")
        with self.context.platform.megatron_calls():
            return self._update(means, lr, judge)

    def evaluate(self, batches: list[Microbatch], loops: int | None = None) -> LoopSums:
        """Sums over all ranks' microbatches without gradients, the same on every rank. All ranks call it together."""
        self.position.enter("evaluation")
        self.ddp.eval()
        pipeline = self.pipeline if loops in (None, self.loops) else None
        if pipeline is None:
            pipeline = self._new_pipeline(loops or self.loops)
        return self._run(batches, training=False, pipeline=pipeline, loops=loops or self.loops)

    def _run(
        self,
        batches: list[Microbatch],
        *,
        training: bool,
        pipeline: LoopPipeline | None = None,
        loops: int | None = None,
        clock: ScheduleClock | None = None,
    ) -> LoopSums:
        loops = loops or self.loops
        forward = self._forward(loops, training=training)
        frozen = self.objective.kind == "gate"
        first = batches[0].tokens_bs
        with torch.set_grad_enabled(training and not frozen):
            collected = (pipeline or self.pipeline).run(
                forward,
                self._own_tokens(batches),
                sequence_length=first.shape[1],
                microbatch_size=first.shape[0],
                forward_only=frozen or not training,
                clock=clock or ScheduleClock(self.context.device, self.position),
            )
        sums = LoopSums.zeros(loops, self.context.device)
        for part in collected:
            sums = sums + part
        vector = self.context.from_last_stage(self.context.sum_over_data(sums.to_tensor()))
        return LoopSums.from_tensor(vector, loops)

    def _forward(self, loops: int, *, training: bool) -> LoopedForward:
        return LoopedForward(
            self.lm,
            self.context,
            self.objective,
            self.head_weight,
            self.position,
            loops=loops,
            training=training,
        )

    def _own_tokens(self, batches: list[Microbatch]) -> list[OwnTokens]:
        """This rank's tokens of whole sequences. Every microbatch of a step has the same shape."""
        context, rows_part = self.context, None
        if context.context_size > 1 and self.lm.model.implementation == "local":
            rows, length = batches[0].tokens_bs.shape
            rows_part = context_part([length] * rows, rows, length, context)
        return [batch.part(context, rows_part) for batch in batches]

    def _record_graphs(self, batch: Microbatch) -> None:
        """Before the first step of a shape or number of loops, but the run's very first, which makes the kernels."""
        rows, length = batch.tokens_bs.shape
        graphs, ready = self.lm.graphs, self._kernels_are_made
        self._kernels_are_made = True
        if not ready or (graphs is not None and graphs.shape[:2] == (length, rows) and graphs.loops == self.loops):
            return
        self.position.enter("recording CUDA graphs")
        self.lm.record_graphs(rows, length, self.loops)
        self._clear_gradients()
        self.position.enter("forward and backward")

    def _clear_gradients(self) -> None:
        self.ddp.zero_grad_buffer()
        self._spare_placeholders()

    def _spare_placeholders(self) -> None:
        """Linears that add to `main_grad` themselves hand autograd a placeholder of the weight's size for Megatron's
        hook, unless the parameter lacks this mark. Autograd would add the placeholders of all visits up; the hook is
        only needed where gradients are reduced while backward runs.
        """
        if self.overlap or not self.lm.config.gradient_accumulation_fusion:
            return
        for parameter in self.lm.decoder.parameters():
            if parameter.dim() == 2:
                del parameter.grad_added_to_main_grad

    def _reduce_gradients(self, tokens: float) -> None:
        """One gradient reduction for the whole step, then division by the global token count."""
        self.position.enter("reducing gradients")
        finalize_model_grads(
            [self.ddp], None, pg_collection=self.context.groups, force_all_reduce=self.keep_whole_gradients
        )
        if tokens > 0:
            self.ddp.scale_gradients(1.0 / tokens)

    @torch.no_grad()
    def _update(self, means: LoopMeans, lr: float, judge: Judge | None) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(means.loss) and math.isfinite(norm)):
            return StepResult(means, norm, f"not finite: loss {means.loss:g}, gradient norm {norm:g}")
        reason = judge(means, norm) if judge is not None else None
        if reason is not None:
            return StepResult(means, norm, reason)
        if self.clip > 0.0:
            scale = self.clip / (norm + 1.0e-6)
            if scale < 1.0:
                for parameter in self.optimizer.get_parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
        self.optimizer.step_with_ready_grads()
        self.lm.weights_changed()
        return StepResult(means, norm)
