"""The sandwich-norm layer and its specs: a norm before and after each sub-layer, inside the residual branch."""

from collections.abc import Container
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from ouro_megatron.errors import RecipeError
from ouro_megatron.model.attention import ScaledDotProductAttention, transformer_engine_core
from ouro_megatron.model.fp8.emulation import (
    EmulatedColumnParallelLinear,
    EmulatedRowParallelLinear,
    Fp8Emulation,
)
from ouro_megatron.model.norm import RMSNorm
from ouro_megatron.model.recompute import not_kept
from ouro_megatron.model.swiglu import SwiGLU
from ouro_megatron.recipe.schema import ModelSection

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Names in Transformer Engine's linears that begin with a norm, and the local block's names for the same."""


@dataclass
class SandwichSubmodules(TransformerLayerSubmodules):
    """Megatron's layer parts plus the two norms that follow the sub-layers."""

    post_attention_norm: ModuleSpec | type = IdentityOp
    post_mlp_norm: ModuleSpec | type = IdentityOp


class RotarySelfAttention(SelfAttention):
    """Megatron's self-attention; on CUDA one kernel cuts queries, keys and values apart and turns them."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h], rotary_pos_emb [s, 1 or b, 1, d] in fp32 -> [s, b, h] and no bias."""
        half = self.hidden_size_per_attention_head // 2
        if rotary_pos_emb is None or not hidden_states.is_cuda or half & (half - 1):
            return super().forward(
                hidden_states,
                attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **others,
            )
        from ouro_megatron.kernels.rotary import SplitRotary

        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed.view(*mixed.shape[:2], self.num_query_groups_per_partition, -1)
        query, key, value = SplitRotary.apply(mixed, rotary_pos_emb, self.hidden_size_per_attention_head)
        context = self.core_attention(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=None,
            packed_seq_params=packed_seq_params,
        )
        output: tuple[Tensor, Tensor | None] = self.linear_proj(context)
        return output


class SandwichLayer(TransformerLayer):
    """x = x + norm_2(attention(norm_1(x))); x = x + norm_4(mlp(norm_3(x))) (Ouro's published checkpoints)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SandwichSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage)
        self.recompute_cheap = False
        """Make the results of pre-norms and of SwiGLU again in backward; switched by `LoopLM.run_layers`."""
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_attention_norm = build_module(submodules.post_attention_norm, **norm)
        self.post_mlp_norm = build_module(submodules.post_mlp_norm, **norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (s / tensor_parallel under sequence parallelism) -> the same shape, and `context`.

        `packed_seq_params`: DocumentBounds, for the attention core. Keeps the argument order of Megatron's layer: full
        recomputation passes these by position.
        """
        normed = self.input_layernorm(hidden_states)
        with self._norm_made_again(normed, self.input_layernorm, hidden_states):
            attention, _ = self.self_attention(
                normed,
                attention_mask=attention_mask,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
            )
        hidden_states = self.post_attention_norm(attention, hidden_states)
        normed = self.pre_mlp_layernorm(hidden_states)
        mlp, _ = self._mlp(normed, hidden_states)
        return self.post_mlp_norm(mlp, hidden_states), context

    def _mlp(self, normed: Tensor, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feed-forward part on `normed`, the norm of `source`."""
        if not self._is_selective:
            return self.mlp(normed)
        with self._norm_made_again(normed, self.pre_mlp_layernorm, source):
            gate_up, _ = self.mlp.linear_fc1(normed)
        activated = self.mlp.activation_func(gate_up)
        kept = gate_up.detach()
        with not_kept(activated, lambda: self.mlp.activation_func(kept)):
            return self.mlp.linear_fc2(activated)

    @property
    def _is_selective(self) -> bool:
        return self.recompute_cheap and self.training and torch.is_grad_enabled()

    def _norm_made_again(self, normed: Tensor, norm: nn.Module, source: Tensor) -> AbstractContextManager[None]:
        if not self._is_selective:
            return nullcontext()
        kept = source.detach()
        return not_kept(normed, lambda: norm(kept))


def _sandwich_layer(
    *,
    column_linear: ModuleSpec | type,
    row_linear: ModuleSpec | type,
    core_attention: type,
    pre_norm: type = RMSNorm,
) -> ModuleSpec:
    """A sandwich layer from one library's parts. Norms after sub-layers are ours: only they add the residual."""
    attention = SelfAttentionSubmodules(linear_qkv=column_linear, core_attention=core_attention, linear_proj=row_linear)
    mlp = MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear, activation_func=SwiGLU)
    return ModuleSpec(
        module=SandwichLayer,
        submodules=SandwichSubmodules(
            input_layernorm=pre_norm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            post_attention_norm=RMSNorm,
            pre_mlp_layernorm=pre_norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            post_mlp_norm=RMSNorm,
            sharded_state_dict_keys_map=FUSED_NORMS if pre_norm is IdentityOp else {},
        ),
    )


def local_block(
    num_layers: int, emulation: Fp8Emulation | None = None, emulated: Container[int] = ()
) -> TransformerBlockSubmodules:
    """A block that runs on CPU and GPU without extra packages.

    With `emulation` the linears of the layers in `emulated`, counted from 0 in this block, round to 8 bits.
    """
    core: Any = {"core_attention": ScaledDotProductAttention}
    exact = _sandwich_layer(column_linear=ColumnParallelLinear, row_linear=RowParallelLinear, **core)
    params = {"emulation": emulation}
    rounded = _sandwich_layer(
        column_linear=ModuleSpec(module=EmulatedColumnParallelLinear, params=params),
        row_linear=ModuleSpec(module=EmulatedRowParallelLinear, params=params),
        **core,
    )
    layers = [rounded if emulation is not None and index in emulated else exact for index in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def transformer_engine_block(num_layers: int) -> TransformerBlockSubmodules:
    """The same block on Transformer Engine's linears and attention; the norms before the sub-layers are part of the
    linears that follow them, so that in FP8 a normed state is rounded as it is made.

    `LoopLM.named_global_parameters` gives all parameters the local block's names. Raises RecipeError when Transformer
    Engine is not installed.
    """
    try:
        from megatron.core.extensions.transformer_engine import (
            HAVE_TE,
            TEDotProductAttention,
            TELayerNormColumnParallelLinear,
            TERowParallelLinear,
        )
    except ImportError as error:
        raise _no_transformer_engine() from error
    if not HAVE_TE:
        raise _no_transformer_engine()
    layer = _sandwich_layer(
        column_linear=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        core_attention=transformer_engine_core(TEDotProductAttention),
        pre_norm=IdentityOp,
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _no_transformer_engine() -> RecipeError:
    return RecipeError(
        "model.implementation: transformer_engine is not installed on this machine; install it beside the CUDA build "
        "of torch (docs/gpu.md; `ouro doctor` shows what is missing) or use model.implementation=local"
    )


def block_spec(
    model: ModelSection, num_layers: int, emulation: Fp8Emulation | None = None, emulated: Container[int] = ()
) -> TransformerBlockSubmodules:
    """The block spec `model.implementation` asks for; see `local_block` for the emulation of FP8."""
    if model.implementation == "transformer_engine":
        return transformer_engine_block(num_layers)
    return local_block(num_layers, emulation, emulated)
