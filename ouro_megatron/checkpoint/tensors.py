"""Weights and Adam's moments as Megatron-Core sharded tensors that do not depend on the parallel layout.

Every tensor is stored in fp32 under the model's global parameter name: `weight.*` (the optimizer's fp32 copy when the
model runs in bf16), `exp_avg.*` and `exp_avg_sq.*`. Any layout and either precision can read any checkpoint. Delayed
FP8 scaling adds its histories (`amax.*`).

Megatron's own distributed-optimizer format is not used: it needs a parameter on every data-parallel rank (the gate
stage has 33 numbers in all for a tiny model), and keeps main and model weights twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedPart:
    """The flat range of a parameter that this data-parallel rank optimizes, with its fp32 copy and Adam state."""

    start: int
    end: int
    main: Tensor
    state: dict[str, Any]


def model_shards(lm: LoopLM) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Global name -> how Megatron cuts the parameter. Extra states of layers (Transformer Engine) are left out."""
    by_data = {id(parameter): name for name, parameter in lm.named_global_parameters()}
    found = {}
    for entry in lm.sharded_state_dict().values():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and id(entry.data) in by_data:
            found[by_data[id(entry.data)]] = entry
    missing = set(by_data.values()) - set(found)
    assert not missing, f"no sharded tensor for {sorted(missing)}"
    return found


def _distributed_optimizers(engine: Engine) -> list[Any]:
    return list(getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]))


def owned_parts(engine: Engine) -> dict[nn.Parameter, OwnedPart]:
    """This rank's share of the distributed optimizer. Adam's moments are made (zero) when no step has run yet."""
    parts = {}
    for distributed in _distributed_optimizers(engine):
        if not hasattr(distributed, "model_param_gbuf_map"):
            continue
        for parameter in distributed.model_param_gbuf_map:
            where = distributed._get_model_param_range_map(parameter)["param"]
            group, order = distributed.model_param_group_index_map[parameter]
            main = distributed.optimizer.param_groups[group]["params"][order]
            state = distributed.optimizer.state[main]
            for key in MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(main)
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
            parts[parameter] = OwnedPart(where.start, where.end, main, state)
    return parts


def _gather(engine: Engine, parameter: nn.Parameter, part: Tensor | None, start: int, end: int) -> Tensor:
    """The whole (tensor-parallel local) fp32 tensor on the CPU, from the data-parallel ranks' ranges."""
    flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if part is not None:
        flat[start:end] = part
    if engine.context.replicas > 1:
        dist.all_reduce(flat, group=engine.context.groups.dp_cp)
    return flat.view(parameter.shape).cpu()


def _trained(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in engine.lm.named_global_parameters():
        if parameter.requires_grad:
            yield name, parameter


@torch.no_grad()
def to_save(engine: Engine) -> ShardedStateDict:
    """All tensors of a checkpoint. All ranks call it together."""
    shards, owned = model_shards(engine.lm), owned_parts(engine)
    tensors: ShardedStateDict = {}
    for name, parameter in engine.lm.named_global_parameters():
        part = owned.get(parameter)
        if not parameter.requires_grad:
            values = {"weight": parameter.detach().float().cpu()}
        else:
            start, end = (part.start, part.end) if part else (0, 0)
            values = {"weight": _gather(engine, parameter, part.main if part else None, start, end)}
            for key in MOMENTS:
                values[key] = _gather(engine, parameter, part.state[key] if part else None, start, end)
        for key, value in values.items():
            tensors[f"{key}.{name}"] = make_sharded_optimizer_tensor(shards[name], value, key)
    return tensors | amax_template(engine.lm)


def amax_template(lm: LoopLM) -> ShardedStateDict:
    """Histories of delayed FP8 scaling, `amax.<visits>.<layer and tensor>` fp32 [visits], the same on all ranks that
    hold a layer. Empty for other recipes."""
    context = lm.context
    replica = (0, context.tensor_rank, context.data_rank * context.context_size + context.context_rank)
    found: ShardedStateDict = {}
    for name, history in lm.named_amax_histories():
        key = f"amax.{len(history.amax_v)}.{name}"
        found[key] = ShardedTensor.from_rank_offsets(key, history.amax_v.cpu().clone(), replica_id=replica)
    return found


@torch.no_grad()
def put_amax(lm: LoopLM, tensors: dict[str, Tensor]) -> None:
    """Fills histories from a checkpoint; those that it does not have begin anew."""
    for name, history in lm.named_amax_histories():
        stored = tensors.get(f"amax.{len(history.amax_v)}.{name}")
        history.amax_v.zero_() if stored is None else history.amax_v.copy_(stored)


@torch.no_grad()
def weight_template(lm: LoopLM) -> ShardedStateDict:
    """What to ask of a checkpoint for the weights alone."""
    shards = model_shards(lm)
    return {
        f"weight.{name}": make_sharded_optimizer_tensor(shards[name], torch.empty(p.shape), "weight")
        for name, p in lm.named_global_parameters()
    }


def moment_template(engine: Engine) -> ShardedStateDict:
    """What to ask of a checkpoint for the optimizer. Empty where nothing is trained on this rank."""
    shards = model_shards(engine.lm)
    return {
        f"{key}.{name}": make_sharded_optimizer_tensor(shards[name], torch.empty(parameter.shape), key)
        for name, parameter in _trained(engine)
        for key in MOMENTS
    }


@torch.no_grad()
def put_weights(lm: LoopLM, tensors: dict[str, Tensor]) -> None:
    for name, parameter in lm.named_global_parameters():
        parameter.copy_(tensors[f"weight.{name}"])
    lm.weights_changed()


@torch.no_grad()
def put_optimizer(engine: Engine, tensors: dict[str, Tensor], *, moments: bool, optimizer_steps: int) -> None:
    """Fills the fp32 copies from the loaded weights and, with `moments`, Adam's state and step count."""
    owned = owned_parts(engine)
    for name, parameter in _trained(engine):
        part = owned.get(parameter)
        if part is None:
            continue
        part.main.copy_(tensors[f"weight.{name}"].flatten()[part.start : part.end])
        if moments:
            for key in MOMENTS:
                part.state[key].copy_(tensors[f"{key}.{name}"].flatten()[part.start : part.end])
            _set_steps(part.state, optimizer_steps)
    if moments:
        for distributed in _distributed_optimizers(engine):
            for group in getattr(distributed, "param_groups", []):
                if "step" in group:  # fused Adam counts per group
                    group["step"] = optimizer_steps


def _set_steps(state: dict[str, Any], steps: int) -> None:
    if isinstance(state["step"], Tensor):
        state["step"].fill_(steps)
    else:
        state["step"] = steps
