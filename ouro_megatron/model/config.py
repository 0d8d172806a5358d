"""From a recipe's model section to Megatron-Core's TransformerConfig."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from ouro_megatron.model.fused import fuses_weight_gradients
from ouro_megatron.recipe.schema import Fp8Section, ModelSection, ParallelSection


def head_dim(model: ModelSection) -> int:
    return model.head_dim or model.hidden // model.heads


def transformer_config(
    model: ModelSection,
    parallel: ParallelSection,
    *,
    dtype: torch.dtype,
    device: torch.device,
    layers_by_rank: Sequence[int] | None = None,
    fp8: Fp8Section | None = None,
) -> TransformerConfig:
    """Config of one pipeline rank's layers. Megatron sees L layers over `pipeline` ranks and knows nothing of loops.

    `layers_by_rank` says how many each pipeline rank holds, evenly many when absent.
    Weights are made empty (`perform_initialization=False`): `model.init` or a checkpoint fills them.
    Losses are summed over tokens and divided by the global count once (`calculate_per_token_loss`).
    """
    on_cpu = device.type == "cpu"
    # Emulated FP8 products hand their gradients to autograd.
    emulated = fp8 is not None and fp8.emulate
    fused = fuses_weight_gradients(model.implementation, device) is not None and not emulated
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads or model.heads,
        kv_channels=head_dim(model),
        ffn_hidden_size=model.ffn,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_layout=_pipeline_layout(layers_by_rank),
        sequence_parallel=parallel.sequence,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fused,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        # Megatron's name for an activation that the layer spec brings: ours (model/swiglu.py).
        use_te_activation_func=True,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        # `LoopLM.run_layers` switches the granularity from loop to loop.
        recompute_method="uniform",
        recompute_num_layers=1,
        # The batched path pairs sends and receives wrongly when the previous and next rank are the same (PP=2).
        overlap_p2p_comm=parallel.pipeline > 1,
        batch_p2p_comm=parallel.pipeline <= 1,
        **_fp8_arguments(fp8),
    )


def _fp8_arguments(fp8: Fp8Section | None) -> dict[str, Any]:
    """Megatron's words for FP8 by Transformer Engine; the emulation is no business of Megatron's.

    E4M3 forward and E5M2 for gradients where a tensor has one scale; E4M3 throughout where blocks have their own.
    """
    if fp8 is None or fp8.emulate:
        return {}
    blocks = fp8.recipe in ("blockwise", "mxfp8")
    return {
        "fp8": "e4m3" if blocks else "hybrid",
        "fp8_recipe": "tensorwise" if fp8.recipe == "current" else fp8.recipe,
        "fp8_param": fp8.parameters,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }


def _pipeline_layout(layers_by_rank: Sequence[int] | None) -> list[list[str]] | None:
    """Megatron's description of an uneven pipeline: what each rank holds, in order."""
    if layers_by_rank is None or len(layers_by_rank) == 1:
        return None
    layout = [["decoder"] * count for count in layers_by_rank]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]
