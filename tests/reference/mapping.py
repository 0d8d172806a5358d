"""Whole Megatron-layout tensors <-> the reference's published names."""

import torch
from torch import Tensor

from ouro_megatron.recipe.schema import ModelSection
from tests.reference.looplm import ReferenceConfig

_LAYER = {
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "input_layernorm_2.weight": "post_attention_norm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "post_attention_layernorm_2.weight": "post_mlp_norm.weight",
}
_TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "model.early_exit_gate.weight": "exit_gate.weight",
    "model.early_exit_gate.bias": "exit_gate.bias",
    "lm_head.weight": "output_layer.weight",
}


def reference_config(model: ModelSection) -> ReferenceConfig:
    return ReferenceConfig(
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        ffn=model.ffn,
        vocab=model.vocab,
        loops=model.loops,
        rope_base=model.rope_base,
        norm_eps=model.norm_eps,
    )


def to_megatron(reference: dict[str, Tensor], config: ReferenceConfig) -> dict[str, Tensor]:
    """Reference tensors (weights or gradients) under this project's global names and layouts."""
    whole = {ours: reference[theirs] for theirs, ours in _TOP.items() if theirs in reference}
    groups = config.kv_heads or config.heads
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}.", f"decoder.layers.{i}."
        if f"{theirs}self_attn.q_proj.weight" not in reference:
            continue
        for name, target in _LAYER.items():
            whole[ours + target] = reference[theirs + name]
        q, k, v = (reference[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        hidden = q.shape[1]
        parts = [x.reshape(groups, -1, hidden) for x in (q, k, v)]
        whole[f"{ours}self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).reshape(-1, hidden)
        whole[f"{ours}mlp.linear_fc1.weight"] = torch.cat(
            (reference[f"{theirs}mlp.gate_proj.weight"], reference[f"{theirs}mlp.up_proj.weight"])
        )
    return whole
