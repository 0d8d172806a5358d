"""config.json of the published layout <-> a recipe's model section."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ouro_megatron.errors import CheckpointError
from ouro_megatron.model.config import head_dim
from ouro_megatron.recipe.schema import ModelSection

CONFIG = "config.json"
_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "loops": "total_ut_steps",
}
_OPTIONAL = {"kv_heads": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps"}
"""Field of ours -> of config.json. Those of _FIELDS must be there."""


def is_pretrained(folder: Path) -> bool:
    """Whether `folder` holds a model in the published layout rather than a training checkpoint."""
    return (folder / CONFIG).is_file()


def published_config(
    model: ModelSection, *, dtype: str, max_positions: int, exit_threshold: float, special: dict[str, Any]
) -> dict[str, Any]:
    """config.json as a mapping. `special`: bos_token_id, eos_token_id and pad_token_id."""
    return {
        "architectures": ["OuroForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ouro.OuroConfig",
            "AutoModel": "modeling_ouro.OuroModel",
            "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
        },
        "attention_dropout": 0.0,
        **special,
        "dtype": dtype,
        "early_exit_threshold": exit_threshold,
        "head_dim": head_dim(model),
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn,
        "layer_types": ["full_attention"] * model.layers,
        "max_position_embeddings": max_positions,
        "max_window_layers": model.layers,
        "model_type": "ouro",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads or model.heads,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "rope_scaling": None,
        "rope_theta": model.rope_base,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "total_ut_steps": model.loops,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": model.vocab,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises CheckpointError when it is missing, unreadable or not Ouro's."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {CONFIG} there; name a folder in Hugging Face's layout") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "ouro":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path}: model_type is {kind!r}; only 'ouro' can be read")
    return config


def model_section(config: dict[str, Any], path: Path) -> ModelSection:
    """The model that `config` (config.json of `path`) describes.

    Raises CheckpointError for missing fields and for what these models do not have: scaled RoPE, sliding windows, tied
    embeddings, another activation.
    """
    problems = [f"{theirs} is missing" for theirs in _FIELDS.values() if config.get(theirs) is None]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "unreadable"
    if kind != "default":
        problems.append(f"RoPE type {kind!r}: only 'default' can be used")
    for key, wanted in {"use_sliding_window": False, "tie_word_embeddings": False, "hidden_act": "silu"}.items():
        if config.get(key, wanted) != wanted:
            problems.append(f"{key} is {config[key]!r}: only {wanted!r} can be used")
    if problems:
        raise CheckpointError(f"{path / CONFIG}: " + "; ".join(problems))
    values = {ours: config[theirs] for ours, theirs in _FIELDS.items()}
    values |= {ours: config[theirs] for ours, theirs in _OPTIONAL.items() if config.get(theirs) is not None}
    values["rope_base"] = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    values["init_std"] = config.get("initializer_range") or 0.02
    try:
        return ModelSection.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path / CONFIG}: {first['loc'][0]}: {first['msg']}") from error
