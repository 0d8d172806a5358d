"""Published Ouro weights, read into a training checkpoint or straight into a model."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ouro_megatron.checkpoint.folder import TOKENIZER_FOLDER, mark_complete
from ouro_megatron.checkpoint.huggingface.config import model_section, read_config
from ouro_megatron.checkpoint.huggingface.layout import TensorGroup, published_shapes, tensor_groups
from ouro_megatron.checkpoint.huggingface.shards import ShardReader
from ouro_megatron.checkpoint.huggingface.tokenizer_files import copy_tokenizer
from ouro_megatron.checkpoint.state import RunState, StageRecord, write_state
from ouro_megatron.checkpoint.stream import write_tensors
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import CheckpointError
from ouro_megatron.recipe.schema import ModelSection, Recipe

Progress = Callable[[int, int], None]
_POSITIONS = 4096
"""max_position_embeddings where config.json names none."""


class Pretrained:
    """A folder in the published layout, checked: config.json, all tensors with the right shapes, a tokenizer that fits.

    Raises CheckpointError and DataError, before anything is read but headers.
    """

    def __init__(self, folder: Path, tokenizer: Path | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.model: ModelSection = model_section(self.config, folder)
        self.tokenizer = tokenizer or folder
        self._reader = ShardReader(folder)
        _check_shapes(self._reader, self.model, folder)
        load_tokenizer(self.tokenizer, model_vocab=self.model.vocab)

    def tensor(self, group: TensorGroup) -> Tensor:
        """One tensor of ours, whole, contiguous fp32 on the CPU. Exact: bf16 and fp16 are subsets of fp32."""
        parts = {name: self._reader.read(name) for name in group.published}
        return group.join(parts).to(torch.float32).contiguous()

    @property
    def max_positions(self) -> int:
        return int(self.config.get("max_position_embeddings") or _POSITIONS)

    def recipe(self, name: str, tokenizer: Path) -> Recipe:
        """The recipe of a stage that has not begun: the model, its tokenizer, and no data of its own."""
        return Recipe.model_validate(
            {
                "name": re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "imported",
                "model": self.model.model_dump(),
                "data": {
                    "sequence_length": self.max_positions,
                    "tokenizer": str(tokenizer),
                    # A recipe must name data; none was used.
                    "train": [{"path": "none", "weight": 1.0, "name": "none"}],
                },
                "optimizer": {"lr": 1e-5},
                "batch": {"global_tokens": self.max_positions},
                "budget": {"total": "0 steps"},
            }
        )

    def state(self, recipe: Recipe) -> RunState:
        """Counters of a stage that has not begun, with where the weights come from in its history."""
        model = self.model
        detail = f"from {self.folder.resolve().name}: {model.layers} layers x {model.loops} loops"
        values: dict[str, Any] = recipe.model_dump(mode="json")
        return RunState(
            step=0,
            tokens=0,
            samples=0,
            optimizer_steps=0,
            skipped_steps=0,
            seconds=0.0,
            world="imported",
            recipe=values,
            fingerprint={},
            history=[StageRecord(self.folder.resolve().name, "import", 0, 0, detail)],
            origin="import",
        )


def _check_shapes(reader: ShardReader, model: ModelSection, folder: Path) -> None:
    wanted = published_shapes(model)
    problems = [f"{name} is missing" for name in wanted if name not in reader.shapes]
    problems += [f"{name} is not part of Ouro's layout" for name in sorted(reader.shapes) if name not in wanted]
    problems += [
        f"{name} has shape {reader.shapes[name]}, config.json asks for {shape}"
        for name, shape in wanted.items()
        if name in reader.shapes and reader.shapes[name] != shape
    ]
    problems += [
        f"{name} is {dtype}; BF16, F16 and F32 can be read"
        for name, dtype in sorted(reader.dtypes.items())
        if dtype not in ("BF16", "F16", "F32")
    ]
    if problems:
        more = f" (and {len(problems) - 5} more problems)" if len(problems) > 5 else ""
        raise CheckpointError(f"{folder} does not hold the model in its config.json: " + "; ".join(problems[:5]) + more)


def import_pretrained(
    source: Path, target: Path, progress: Progress = lambda done, total: None, *, tokenizer: Path | None = None
) -> ModelSection:
    """Writes the published weights in `source` as the new checkpoint folder `target`; returns its model.

    One process, one tensor in memory at a time. The checkpoint holds weights in fp32 and the tokenizer, no optimizer
    state; any layout reads it. `target` appears whole or not at all. Raises CheckpointError for a folder that is not
    Ouro's, or `target` existing, DataError for a tokenizer that is missing or does not fit.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another folder")
    pretrained = Pretrained(source, tokenizer)
    groups = {f"weight.{group.ours}": group for group in tensor_groups(pretrained.model)}
    done = 0

    def make(name: str) -> Tensor:
        nonlocal done
        tensor = pretrained.tensor(groups[name])
        done += 1
        progress(done, len(groups))
        return tensor

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as partial:
        folder = Path(partial) / target.name
        folder.mkdir()
        try:
            write_tensors(folder, {name: group.shape for name, group in groups.items()}, make)
            copy_tokenizer(pretrained.tokenizer, folder / TOKENIZER_FOLDER)
            recipe = pretrained.recipe(source.resolve().name, target.resolve() / TOKENIZER_FOLDER)
            write_state(folder, pretrained.state(recipe))
            mark_complete(folder)
            folder.replace(target)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {error}") from error
    return pretrained.model
