"""The ranks' view of the world: who am I, which groups do I talk in. Passed explicitly, never a global of ours."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from ouro_megatron.errors import RecipeError
from ouro_megatron.parallel.platform import Platform, choose_platform, make_deterministic
from ouro_megatron.parallel.sequence_slices import own_positions, own_tokens
from ouro_megatron.recipe.schema import ParallelSection, Recipe


@dataclass(frozen=True)
class ParallelContext:
    """Sizes, this rank's coordinates and Megatron-Core's process groups for one job."""

    platform: Platform
    groups: ProcessGroupCollection
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    """Among the ranks that read different samples; context-parallel ranks share theirs."""
    data_size: int
    sequence_parallel: bool
    context_rank: int = 0
    context_size: int = 1
    """Ranks that a sequence is cut over."""

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def device(self) -> torch.device:
        return self.platform.device

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights and add up their gradients: data- and context-parallel ones."""
        return self.data_size * self.context_size

    def own_positions(self, length: int) -> torch.Tensor:
        """int64 [length / context_size] on the CPU: which tokens of a sequence are this rank's."""
        return own_positions(length, self.context_rank, self.context_size)

    def own_tokens(self, whole_bs: torch.Tensor) -> torch.Tensor:
        """This context-parallel rank's part of [b, s] as [b, s / context_size]."""
        return own_tokens(whole_bs, self.context_rank, self.context_size)

    def describe(self) -> str:
        """For example "4 cpu ranks: TP 2 x PP 2 x DP 1"."""
        ranks = f"{self.world_size} {self.device.type} rank{'s' if self.world_size > 1 else ''}"
        sequence = " + SP" if self.sequence_parallel else ""
        context = f" x CP {self.context_size}" if self.context_size > 1 else ""
        return f"{ranks}: TP {self.tensor_size}{sequence}{context} x PP {self.pipeline_size} x DP {self.data_size}"

    def describe_rank(self) -> str:
        """For error messages: "rank 3 (tensor 1, pipeline 1, data 0)"."""
        context = f"context {self.context_rank}, " if self.context_size > 1 else ""
        return (
            f"rank {self.rank} (tensor {self.tensor_rank}, {context}pipeline {self.pipeline_rank}, "
            f"data {self.data_rank})"
        )

    def from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrites `tensor` on every pipeline rank with the last rank's and returns it. All ranks call it."""
        if self.pipeline_size > 1:
            source = dist.get_global_rank(self.groups.pp, self.pipeline_size - 1)
            dist.broadcast(tensor, src=source, group=self.groups.pp)
        return tensor

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduces `tensor` in place over all ranks that see other tokens and returns it. All ranks call it."""
        if self.replicas > 1:
            dist.all_reduce(tensor, group=self.groups.dp_cp)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """True on every rank when it is true on one. All ranks call it."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def agree(self, value: int) -> int:
        """The largest `value` any rank has. All ranks call it."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], device=self.device, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def from_rank_zero(self, values: Sequence[float]) -> list[float]:
        """Rank 0's `values` (fp64) on every rank. All ranks call it."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, device=self.device, dtype=torch.float64)
        dist.broadcast(tensor, src=0)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the groups: the last distributed call of a rank."""
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def create_context(parallel: ParallelSection, device: str = "auto", seed: int = 1234) -> ParallelContext:
    """Joins the job that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    A process started alone becomes a job of one rank. The recipe must have passed `check_recipe` for this world size.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    platform = choose_platform(device, int(os.environ.get("LOCAL_RANK", "0")))  # type: ignore[arg-type]
    timeout = timedelta(seconds=parallel.timeout_seconds)
    if not dist.is_initialized():
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(platform.backend, rank=rank, world_size=world_size, timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(platform.backend, store=store, rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout_seconds / 60,
    )
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return ParallelContext(
        platform=platform,
        groups=groups,
        rank=rank,
        world_size=world_size,
        tensor_rank=groups.tp.rank(),
        tensor_size=groups.tp.size(),
        pipeline_rank=groups.pp.rank(),
        pipeline_size=groups.pp.size(),
        data_rank=groups.dp.rank(),
        data_size=groups.dp.size(),
        sequence_parallel=parallel.sequence,
        context_rank=groups.cp.rank(),
        context_size=groups.cp.size(),
    )


def context_for(recipe: Recipe) -> ParallelContext:
    """`create_context` with the recipe's layout, device and seed; deterministic when the recipe asks for it.

    Raises RecipeError on every rank when the recipe needs CUDA and there is none.
    """
    if recipe.training.cuda_graphs and not torch.cuda.is_available():
        raise RecipeError(
            "training.cuda_graphs=true needs CUDA, and torch sees no GPU on this machine; set it to false"
        )
    if recipe.training.deterministic:
        make_deterministic()
    return create_context(recipe.parallel, recipe.training.device, recipe.training.seed)
