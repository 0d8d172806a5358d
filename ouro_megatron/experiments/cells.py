"""The cells of a sweep: shape x variant x seed, each with its recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_megatron.errors import RecipeError
from ouro_megatron.experiments.corpus import Corpus
from ouro_megatron.experiments.settings import ExperimentFile, Variant, parse_shape, shown
from ouro_megatron.experiments.tasks.task import Task
from ouro_megatron.planning.flops import flops_per_token
from ouro_megatron.recipe.load import recipe_from_values
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep."""

    shape: str
    """k x L, as "2x6"."""
    variant: Variant | None
    seed: int

    @property
    def group(self) -> str:
        """Cells that differ in the seed alone."""
        return self.shape if self.variant is None else f"{self.shape}/{self.variant.name}"

    @property
    def name(self) -> str:
        """Of its run: a file name."""
        parts = [self.shape, *([self.variant.name] if self.variant else []), f"seed{self.seed}"]
        return "-".join(parts)

    @property
    def label(self) -> str:
        return shown(self.shape) if self.variant is None else f"{shown(self.shape)}, {self.variant.label}"


def cells_of(settings: ExperimentFile, seeds: int | None = None, only: Sequence[str] = ()) -> list[Cell]:
    """All cells, seed by seed, so that a sweep that is cut short has compared all groups at one seed first.

    `only`: groups ("2x6", "2x6/VARIANT"), or shapes in all their variants. Raises RecipeError for an unknown one.
    """
    wanted = [text.replace("⊗", "x") for text in only]
    known = {*settings.groups, *settings.shapes, *(variant.name for variant in settings.variants)}
    for text in wanted:
        if text not in known:
            raise RecipeError(f"--cells {text}: the cells here are {', '.join(settings.groups)}")
    count = settings.seeds if seeds is None else seeds
    cells = []
    for seed in range(1, count + 1):
        for group in settings.groups:
            shape, _, name = group.partition("/")
            if not wanted or {group, shape, name} & set(wanted):
                cells.append(Cell(shape, settings.variant(name), seed))
    return cells


def task_of(settings: ExperimentFile, cell: Cell) -> tuple[dict[str, Any], int] | None:
    """The task's values and the number of training examples of a cell; None where the recipe names a corpus."""
    if settings.task is None:
        return None
    if cell.variant is None:
        return dict(settings.task), settings.examples
    return {**settings.task, **cell.variant.task}, cell.variant.examples or settings.examples


def recipe_of(settings: ExperimentFile, cell: Cell, data: tuple[Corpus, Task] | None, run_dir: Path) -> Recipe:
    """The recipe that trains a cell on a corpus made of a task, or on the data that the file names.

    Raises RecipeError for one that cannot be.
    """
    layers, loops = parse_shape(cell.shape)
    values: dict[str, Any] = _merged(settings.recipe, cell.variant.recipe if cell.variant else {})
    filled: dict[str, Any] = {
        "name": cell.name,
        "run_dir": str(run_dir),
        "model": {"layers": layers, "loops": loops},
        "training": {"seed": cell.seed},
    }
    if data is not None:
        corpus, task = data
        filled["model"]["vocab"] = _rounded(len(task.words), values)
        filled["data"] = {"tokenizer": str(corpus.tokenizer), "train": [{"path": str(corpus.train), "weight": 1}]}
        if task.tests:
            filled["data"]["validation"] = [{"path": str(corpus.test), "weight": 1}]
    if cell.shape in settings.rates:
        filled["optimizer"] = {"lr": settings.rates[cell.shape]}
    values = _merged(values, filled)
    schedule = values.setdefault("schedule", {})
    if schedule.get("kind") == "cosine":
        schedule.setdefault("min_lr", values.get("optimizer", {}).get("lr", 0.0) * 0.1)
    return recipe_from_values(values, f"cell {cell.name}")


def _rounded(vocab: int, values: dict[str, Any]) -> int:
    """Rows of the embedding: so many that tensor-parallel ranks can share them."""
    tensor = int(values.get("parallel", {}).get("tensor", 1))
    wanted = int(values.get("model", {}).get("vocab", 0))
    return max(wanted, -(-vocab // tensor) * tensor)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings key by key; everything else of `over` replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def cost(recipe: Recipe) -> float:
    """Training FLOPs of a cell."""
    return BatchPlan(recipe).total_tokens * flops_per_token(recipe.model, recipe.data.sequence_length)
