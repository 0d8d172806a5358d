"""A random model in the published layout, written by other code than this project's: the reference and safetensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.distributed.parity import fill_reference
from tests.reference.looplm import ReferenceConfig, ReferenceLoopLM
from tests.tiny import VOCAB, write_tokenizer

CONFIG = ReferenceConfig(
    layers=3, hidden=32, heads=4, kv_heads=2, head_dim=16, ffn=48, vocab=VOCAB, loops=4, rope_base=20_000.0
)


def reference(config: ReferenceConfig = CONFIG) -> ReferenceLoopLM:
    model = ReferenceLoopLM(config)
    fill_reference(model)
    with torch.no_grad():
        model.model.early_exit_gate.weight.mul_(6)  # so that tokens leave at different loops
    return model


def config_json(config: ReferenceConfig) -> dict[str, Any]:
    """As the published checkpoints have it, rope_theta and all, without this project's additions."""
    return {
        "architectures": ["OuroForCausalLM"],
        "early_exit_threshold": 1.0,
        "head_dim": config.head_dim or config.hidden // config.heads,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "max_position_embeddings": 256,
        "model_type": "ouro",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads or config.heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_base,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "total_ut_steps": config.loops,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }


def write_published(
    folder: Path, tensors: dict[str, Tensor], config: ReferenceConfig = CONFIG, *, shards: int = 1
) -> Path:
    """config.json, a tokenizer and `shards` safetensors files with an index."""
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
