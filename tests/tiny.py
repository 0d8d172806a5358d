"""A small data set, tokenizer and recipe that train in seconds."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ouro_megatron.recipe.load import recipe_from_text
from ouro_megatron.recipe.schema import Recipe

VOCAB = 128


def write_tokenizer(folder: Path) -> Path:
    """Byte-level tokenizer without merges over ASCII words; id 0 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {"<|endoftext|>": 0, **{letter: index for index, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def write_corpus(prefix: Path, documents: int = 60, seed: int = 0) -> Path:
    """Documents in which each token mostly follows from the one before: learnable, not trivial."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = random.Random(seed)
    follow = {token: random.Random(token).choices(range(1, 97), k=3) for token in range(0, 97)}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(prefix) + ".bin", dtype=np.uint16)
    for _ in range(documents):
        tokens = [generator.randrange(1, 97)]
        for _ in range(generator.randrange(100, 300)):
            tokens.append(generator.choice(follow[tokens[-1]]))
        tokens.append(0)
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(str(prefix) + ".idx")
    return prefix


def tiny_recipe(folder: Path, **sections: Any) -> Recipe:
    """A stage of 20 steps on data below `folder` (made when absent); keyword sections are merged in."""
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
        write_corpus(folder / "train", seed=1)
        write_corpus(folder / "held-out", documents=20, seed=2)
    values: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(folder / "runs"),
        "model": {"layers": 4, "hidden": 32, "heads": 4, "ffn": 48, "vocab": VOCAB, "loops": 3},
        "data": {
            "sequence_length": 32,
            "tokenizer": str(folder / "tokenizer"),
            "train": [{"path": str(folder / "train"), "weight": 1}],
            "validation": [{"path": str(folder / "held-out"), "weight": 1}],
        },
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup": "4 steps"},
        "batch": {"global_tokens": 256, "microbatch": 1},
        "budget": {"total": "20 steps"},
        "precision": {"compute": "fp32"},
        "training": {"device": "cpu"},
        "checkpoint": {"every": "10 steps"},
        "evaluation": {"batches": 2},
        "parallel": {"timeout_seconds": 60},
        "logging": {"wandb": {"mode": "disabled"}},
    }
    for name, section in sections.items():
        if isinstance(section, dict):
            values[name] = {**values.get(name, {}), **section}
        else:
            values[name] = section
    return recipe_from_text(yaml.safe_dump(values), "tiny")
