"""Names and shapes of the published layout, against a list written out by hand."""

from pathlib import Path

import torch
import yaml

from ouro_megatron.checkpoint.huggingface.config import published_config
from ouro_megatron.checkpoint.huggingface.layout import published_shapes, tensor_groups
from ouro_megatron.recipe.schema import ModelSection
from tests.checkpoint.huggingface.published import reference

PER_LAYER = {
    "self_attn.q_proj.weight": (2048, 2048),
    "self_attn.k_proj.weight": (2048, 2048),
    "self_attn.v_proj.weight": (2048, 2048),
    "self_attn.o_proj.weight": (2048, 2048),
    "mlp.gate_proj.weight": (5632, 2048),
    "mlp.up_proj.weight": (5632, 2048),
    "mlp.down_proj.weight": (2048, 5632),
    "input_layernorm.weight": (2048,),
    "input_layernorm_2.weight": (2048,),
    "post_attention_layernorm.weight": (2048,),
    "post_attention_layernorm_2.weight": (2048,),
}
OUTSIDE = {
    "model.embed_tokens.weight": (49152, 2048),
    "model.norm.weight": (2048,),
    "model.early_exit_gate.weight": (1, 2048),
    "model.early_exit_gate.bias": (1,),
    "lm_head.weight": (49152, 2048),
}
# What vLLM's Ouro model calls its parameters, and which published names it stacks into which of them.
VLLM_STACKS = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
VLLM_STACKS["up_proj"] = "gate_up_proj"
VLLM_LAYER = {
    "self_attn.qkv_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "input_layernorm_2.weight",
    "post_attention_layernorm.weight",
    "post_attention_layernorm_2.weight",
}


def ouro(layers: int) -> ModelSection:
    return ModelSection(layers=layers, hidden=2048, heads=16, ffn=5632, vocab=49152, loops=4)


def test_published_names_and_shapes() -> None:
    for layers, parameters in ((24, 1.434e9), (48, 2.667e9)):
        wanted = dict(OUTSIDE)
        for layer in range(layers):
            wanted |= {f"model.layers.{layer}.{name}": shape for name, shape in PER_LAYER.items()}
        shapes = published_shapes(ouro(layers))
        assert shapes == wanted
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert abs(total / parameters - 1) < 1e-3


def test_the_references_names_are_the_same() -> None:
    model = reference()
    config = model.config
    section = ModelSection(
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        ffn=config.ffn,
        vocab=config.vocab,
        loops=config.loops,
    )
    assert published_shapes(section) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_vllm_finds_a_parameter_for_every_tensor() -> None:
    loaded = set()
    for name in published_shapes(ouro(2)):
        for part, stacked in VLLM_STACKS.items():
            if f".{part}." in name:
                name = name.replace(part, stacked)
                break
        loaded.add(name)
    wanted = set(OUTSIDE) | {f"model.layers.{layer}.{name}" for layer in range(2) for name in VLLM_LAYER}
    assert loaded == wanted


def test_config_has_what_vllm_reads() -> None:
    """Fields that its Ouro model takes from config.json, by the values of the published 1.4B model."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    section = ouro(24).model_copy(update={"rope_base": 1_000_000.0})
    config = published_config(section, dtype="bfloat16", max_positions=65_536, exit_threshold=1.0, special=special)
    read = {
        "architectures": ["OuroForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 65_536,
        "max_window_layers": 24,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "total_ut_steps": 4,
        "vocab_size": 49_152,
    }
    assert {name: config[name] for name in read} == read
    # It takes no head dimension of its own.
    assert config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]


def test_groups_take_apart_and_put_together() -> None:
    section = ModelSection(layers=1, hidden=8, heads=4, kv_heads=2, head_dim=6, ffn=10, vocab=12, loops=2)
    for group in tensor_groups(section):
        tensor = torch.randn(group.shape)
        parts = group.split(tensor)
        assert {name: tuple(part.shape) for name, part in parts.items()} == group.published
        assert torch.equal(group.join(parts), tensor), group.ours


def test_shipped_model_recipes_have_the_published_shapes() -> None:
    models = Path(__file__).resolve().parents[3] / "stages" / "model"
    section = yaml.safe_load((models / "ouro-1.4b.yaml").read_text())["model"]
    deeper = section | yaml.safe_load((models / "ouro-2.6b.yaml").read_text())["model"]
    for values, layers in ((section, 24), (deeper, 48)):
        assert published_shapes(ModelSection.model_validate(values)) == published_shapes(ouro(layers))
