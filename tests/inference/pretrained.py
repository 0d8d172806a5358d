"""A tiny model with a chat template in the published layout, written in milliseconds."""

import json
from pathlib import Path

import torch

from ouro_megatron.checkpoint.huggingface.config import published_config
from ouro_megatron.checkpoint.huggingface.layout import published_shapes
from ouro_megatron.checkpoint.huggingface.shards import ShardWriter
from ouro_megatron.recipe.schema import ModelSection
from tests.reference.looplm import ReferenceLoopLM
from tests.reference.mapping import reference_config
from tests.tiny import write_tokenizer

VOCAB = 128
CONTEXT = 256


def section(loops: int = 4) -> ModelSection:
    return ModelSection(layers=2, hidden=32, heads=4, ffn=48, vocab=VOCAB, loops=loops)


def reference_model(seed: int = 0) -> ReferenceLoopLM:
    """Weights large enough that loops, gates and layers all matter."""
    reference = ReferenceLoopLM(reference_config(section()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            around = 1.0 if "norm" in name else 0.0
            scale = 0.6 if "gate.weight" in name else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + around)
        # The largest of 96 other logits is above 0: greedily no end of document comes, and no id without a text.
        reference.lm_head.weight[0] = 0.0
        reference.lm_head.weight[97:] = 0.0
    return reference


def write_pretrained(folder: Path, *, chat: bool = True) -> Path:
    """An exported folder; with `chat`, its tokenizer knows ChatML's tokens."""
    write_tokenizer(folder)
    if chat:
        content = json.loads((folder / "tokenizer.json").read_text())
        for name in ("<|im_start|>", "<|im_end|>"):
            token = {**content["added_tokens"][0], "id": 97 + len(content["added_tokens"]), "content": name}
            content["added_tokens"].append(token)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = published_config(section(), dtype="float32", max_positions=CONTEXT, exit_threshold=1.0, special=special)
    (folder / "config.json").write_text(json.dumps(config))
    writer = ShardWriter(folder, published_shapes(section()), torch.float32, 2**30)
    for name, tensor in reference_model().state_dict().items():
        writer.write(name, tensor)
    writer.close()
    return folder
