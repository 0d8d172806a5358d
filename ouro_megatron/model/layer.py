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
from ouro_megatron.model.attention import ScaledDotProductAttention
from ouro_megatron.model.documents import documents_through
from ouro_megatron.model.fp8.emulation import (
    EmulatedColumnParallelLinear,
    EmulatedRowParallelLinear,
    Fp8Emulation,
)
from ouro_megatron.model.norm import RMSNorm
from ouro_megatron.model.recompute import not_kept
from ouro_megatron.model.swiglu import SwiGLU
from ouro_megatron.recipe.schema import ModelSection


@dataclass
class SandwichSubmodules(TransformerLayerSubmodules):
    """Megatron's layer parts plus the two norms that follow the sub-layers."""

    post_attention_norm: ModuleSpec | type = IdentityOp
    post_mlp_norm: ModuleSpec | type = IdentityOp


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
    *, norm: type, column_linear: ModuleSpec | type, row_linear: ModuleSpec | type, core_attention: type
) -> ModuleSpec:
    """A sandwich layer from one library's parts."""
    attention = SelfAttentionSubmodules(linear_qkv=column_linear, core_attention=core_attention, linear_proj=row_linear)
    mlp = MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear, activation_func=SwiGLU)
    return ModuleSpec(
        module=SandwichLayer,
        submodules=SandwichSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            post_attention_norm=norm,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            post_mlp_norm=norm,
        ),
    )


def local_block(
    num_layers: int, emulation: Fp8Emulation | None = None, emulated: Container[int] = ()
) -> TransformerBlockSubmodules:
    """A block that runs on CPU and GPU without extra packages.

    With `emulation` the linears of the layers in `emulated`, counted from 0 in this block, round to 8 bits.
    """
    local = {"norm": RMSNorm, "core_attention": ScaledDotProductAttention}
    exact = _sandwich_layer(column_linear=ColumnParallelLinear, row_linear=RowParallelLinear, **local)
    params = {"emulation": emulation}
    rounded = _sandwich_layer(
        column_linear=ModuleSpec(module=EmulatedColumnParallelLinear, params=params),
        row_linear=ModuleSpec(module=EmulatedRowParallelLinear, params=params),
        **local,
    )
    layers = [rounded if emulation is not None and index in emulated else exact for index in range(num_layers)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def transformer_engine_block(num_layers: int) -> TransformerBlockSubmodules:
    """The same block on Transformer Engine's linears, norms and attention. Parameter names equal the local block's.

    Raises RecipeError when Transformer Engine is not installed.
    """
    try:
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TENorm,
            TERowParallelLinear,
        )
    except ImportError as error:
        raise RecipeError(
            "model.implementation: transformer_engine is not installed on this machine; install it beside the CUDA "
            "build of torch (pip install 'transformer-engine[pytorch]') or use model.implementation=local"
        ) from error
    layer = _sandwich_layer(
        norm=TENorm,
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        core_attention=documents_through(TEDotProductAttention),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def block_spec(
    model: ModelSection, num_layers: int, emulation: Fp8Emulation | None = None, emulated: Container[int] = ()
) -> TransformerBlockSubmodules:
    """The block spec `model.implementation` asks for; see `local_block` for the emulation of FP8."""
    if model.implementation == "transformer_engine":
        return transformer_engine_block(num_layers)
    return local_block(num_layers, emulation, emulated)
