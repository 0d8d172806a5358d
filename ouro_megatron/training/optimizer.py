"""Megatron's distributed Adam over the buffers of one rank."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.recipe.schema import OptimizerSection


def build_optimizer(
    settings: OptimizerSection, ddp: DistributedDataParallel, context: ParallelContext, lm: LoopLM
) -> Any:
    """Adam on fp32 copies of the weights, on each rank of its shard; no weight decay of norms and biases."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip,
        bf16=lm.dtype == torch.bfloat16,
        params_dtype=lm.dtype,
        use_distributed_optimizer=True,
        fp8_recipe=lm.config.fp8_recipe if lm.config.fp8_param else None,
    )
    built = get_megatron_optimizer(
        config,
        [ddp],
        config_overrides=get_standard_config_overrides(config),
        use_gloo_process_groups=False,
        pg_collection=context.groups,
    )
    for group in built.param_groups:
        # Megatron marks norms and biases with wd_mult 0 and leaves it to its own LR scheduler, not used here, to apply.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    return built
