"""A training checkpoint in the published Ouro layout, loadable by transformers, vLLM and others."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch

from ouro_megatron.checkpoint.folder import resolve
from ouro_megatron.checkpoint.huggingface.agreement import Agreement, compare, require_transformers
from ouro_megatron.checkpoint.huggingface.config import CONFIG, is_pretrained, published_config
from ouro_megatron.checkpoint.huggingface.layout import published_shapes, tensor_groups
from ouro_megatron.checkpoint.huggingface.shards import ShardWriter
from ouro_megatron.checkpoint.huggingface.tokenizer_files import write_tokenizer
from ouro_megatron.checkpoint.load import tokenizer_folder
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.checkpoint.stream import TensorReader
from ouro_megatron.checkpoint.verify import check_contents
from ouro_megatron.errors import CheckpointError, RecipeError
from ouro_megatron.recipe.schema import ModelSection, Recipe

Dtype = Literal["bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
_CODE = ("configuration_ouro.py", "modeling_ouro.py")
Progress = Callable[[int, int], None]
"""Called with tensors done and tensors in all."""


@dataclass(frozen=True)
class ExportSettings:
    """What the exported folder should say; the model itself is the checkpoint's."""

    dtype: Dtype = "bf16"
    """bf16 is what the published checkpoints hold; fp32 keeps the training weights bit for bit."""
    shard_bytes: int = 5_000_000_000
    max_positions: int | None = None
    """max_position_embeddings; the stage's sequence length when left out."""
    exit_threshold: float = 1.0
    """early_exit_threshold: 1 reads the last loop."""
    chat_template: Path | None = None
    check: bool = True
    """Load the folder with transformers and compare its logits with ours before it gets its name."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees."""

    folder: Path
    checkpoint: Path
    skipped: list[str]
    """Newer checkpoints that were passed over because they are not complete."""
    files: list[str]
    agreement: Agreement | None


def export(
    source: Path, target: Path, settings: ExportSettings, progress: Progress = lambda done, all: None
) -> Exported:
    """Writes the checkpoint at `source` (or the newest complete one under it) to the new folder `target`.

    One process, at whatever layout the checkpoint was saved; the conversion holds one tensor at a time, the check the
    whole model in fp32. `target` appears whole, checked, or not at all. Raises RecipeError for bad settings,
    CheckpointError when the checkpoint cannot be read, `target` exists or the logits differ, DataError for the
    tokenizer.
    """
    _check_settings(settings)
    if is_pretrained(source):
        raise CheckpointError(f"{source} is in the published layout already")
    found = resolve(source)
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another folder")
    if settings.check:
        require_transformers("to check the exported model (or leave the check out with --no-check)")
    check_contents(found.folder)
    recipe = Recipe.model_validate(read_state(found.folder).recipe)
    reader = TensorReader(found.folder)
    _check_tensors(reader, recipe.model, found.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as partial:
        folder = Path(partial) / target.name
        folder.mkdir()
        try:
            written = _write(reader, recipe, folder, tokenizer_folder(found.folder, recipe), settings, progress)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {error}") from error
        agreement = compare(found.folder, folder, DTYPES[settings.dtype]) if settings.check else None
        if agreement is not None and not agreement.holds:
            raise CheckpointError(
                f"{target} was not written: the exported model's logits differ from the checkpoint's\n"
                + agreement.table()
            )
        folder.replace(target)
    return Exported(target, found.folder, found.skipped, written, agreement)


def _check_settings(settings: ExportSettings) -> None:
    if not 0.0 <= settings.exit_threshold <= 1.0:
        raise RecipeError(f"--exit-threshold {settings.exit_threshold}: a number from 0 to 1")
    if settings.max_positions is not None and settings.max_positions < 1:
        raise RecipeError(f"--max-positions {settings.max_positions}: at least 1")
    if settings.shard_bytes < 1:
        raise RecipeError(f"--shard-size {settings.shard_bytes}: at least 1 byte")


def _check_tensors(reader: TensorReader, model: ModelSection, folder: Path) -> None:
    stored = {
        name.removeprefix("weight."): shape for name, shape in reader.shapes.items() if name.startswith("weight.")
    }
    wanted = {group.ours: group.shape for group in tensor_groups(model)}
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not part of this model" for name in stored if name not in wanted]
    problems += [
        f"{name} has shape {stored[name]}, the model {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{folder} does not hold the model in its recipe: " + "; ".join(problems[:5]))


def _write(
    reader: TensorReader, recipe: Recipe, folder: Path, tokenizer: Path, settings: ExportSettings, progress: Progress
) -> list[str]:
    """All files of an exported folder; returns their names."""
    model = recipe.model
    positions = settings.max_positions or recipe.data.sequence_length
    special = write_tokenizer(
        tokenizer, folder, vocab=model.vocab, max_positions=positions, chat_template=settings.chat_template
    )
    config = published_config(
        model,
        dtype=_NAMES[settings.dtype],
        max_positions=positions,
        exit_threshold=settings.exit_threshold,
        special=special,
    )
    _write_json(folder / CONFIG, config)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    code = files("ouro_megatron.checkpoint.huggingface.remote_code")
    for name in _CODE:
        (folder / name).write_text((code / name).read_text(encoding="utf-8"), encoding="utf-8")
    shapes = published_shapes(model)
    writer = ShardWriter(folder, shapes, DTYPES[settings.dtype], settings.shard_bytes)
    done = 0
    for group in tensor_groups(model):
        for name, tensor in group.split(reader.read(f"weight.{group.ours}")).items():
            writer.write(name, tensor)
            done += 1
            progress(done, len(shapes))
    writer.close()
    return sorted(path.name for path in folder.iterdir())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
