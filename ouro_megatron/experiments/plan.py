"""A sweep on disk: what it consists of, what is done, and which of it a process may take.

OUT/experiment.yaml       settings, resolved
OUT/data/                 corpora
OUT/cells/NAME/           the cell's run folder; recipe.yaml, metrics.jsonl, checkpoints/ are the trainer's
OUT/cells/NAME/result.json    written last: the cell is done
OUT/cells/NAME/failed.json    why the last attempt failed
OUT/log/                  output of the workers
OUT/summary.md, .html, .json, *.png
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.errors import DataError, RecipeError
from ouro_megatron.experiments.cells import Cell, cells_of, cost, recipe_of, task_of
from ouro_megatron.experiments.corpus import Corpus, corpus_folder, make_corpus
from ouro_megatron.experiments.settings import ExperimentFile
from ouro_megatron.experiments.tasks.registry import make_task
from ouro_megatron.recipe.schema import Recipe

PLAN = "experiment.yaml"
RESULT, FAILED = "result.json", "failed.json"


_FREE = ("seeds", "claims", "note", "title", "beside", "hours")
"""Settings that change nothing about a cell."""
_FREE_SECTIONS = ("checkpoint", "logging")
"""Sections of the recipe that do not, either."""


def _counted(value: Any) -> Any:
    """A setting without the sections of a recipe that change nothing about the result."""
    if not isinstance(value, dict):
        return value
    return {key: inner for key, inner in value.items() if key not in _FREE_SECTIONS}


@dataclass(frozen=True)
class Sweep:
    """An experiment in a folder of its own."""

    name: str
    scale: str
    settings: ExperimentFile
    out: Path

    @property
    def cells_folder(self) -> Path:
        return self.out / "cells"

    def run_folder(self, cell: Cell) -> Path:
        return self.cells_folder / cell.name

    def corpus(self, cell: Cell) -> Corpus | None:
        """Where the cell's data is, or will be; None where the recipe names its own."""
        made_of = task_of(self.settings, cell)
        if made_of is None:
            return None
        return Corpus(corpus_folder(self.out / "data", *made_of, self.settings.test_examples))

    def prepare(self, cell: Cell) -> Corpus | None:
        """The cell's data, generated when it is not there."""
        made_of = task_of(self.settings, cell)
        return None if made_of is None else make_corpus(self.out / "data", *made_of, self.settings.test_examples)

    def recipe(self, cell: Cell) -> Recipe:
        """Raises RecipeError when the settings do not make a recipe."""
        made_of, corpus = task_of(self.settings, cell), self.corpus(cell)
        data = None if made_of is None or corpus is None else (corpus, make_task(made_of[0], cell.name))
        return recipe_of(self.settings, cell, data, self.cells_folder)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What was measured; None while the cell is not done. Raises DataError for a file that cannot be read."""
        path = self.run_folder(cell) / RESULT
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete it to measure the cell again") from error

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.run_folder(cell) / FAILED).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def finish(self, cell: Cell, values: dict[str, Any]) -> None:
        write_json(self.run_folder(cell) / RESULT, values)
        (self.run_folder(cell) / FAILED).unlink(missing_ok=True)

    def fail(self, cell: Cell, attempt: str, message: str) -> None:
        self.run_folder(cell).mkdir(parents=True, exist_ok=True)
        write_json(self.run_folder(cell) / FAILED, {"attempt": attempt, "message": message})

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Whether this process got the cell; no other has it inside the block. The kernel gives it back."""
        folder = self.run_folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".claim", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)


def by_cost(sweep: Sweep, cells: list[Cell]) -> list[Cell]:
    """Seed by seed, the longest first: the last ones to finish are short then."""
    return sorted(cells, key=lambda cell: (cell.seed, -cost(sweep.recipe(cell))))


def save_plan(sweep: Sweep) -> None:
    """Writes experiment.yaml. Raises RecipeError when the folder holds another experiment: its cells would be mixed."""
    path = sweep.out / PLAN
    values = {"experiment": sweep.name, "scale": sweep.scale, **sweep.settings.model_dump(mode="json")}
    if path.exists():
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = [key for key in values if key not in _FREE and _counted(old.get(key)) != _counted(values[key])]
        if changed:
            raise RecipeError(
                f"{sweep.out} holds another experiment: {', '.join(changed)} differ from {path}. "
                "Choose another --out, or delete the folder to begin anew"
            )
    sweep.out.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def load_plan(out: Path) -> Sweep:
    """The experiment that lies in `out`. Raises RecipeError when there is none."""
    path = out / PLAN
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{out}: no experiment there ({error}); `ouro experiment` makes one") from error
    name, scale = values.pop("experiment"), values.pop("scale")
    return Sweep(name, scale, ExperimentFile.model_validate(values), out)


def all_cells(sweep: Sweep) -> list[Cell]:
    """The cells of the settings, and those of more seeds that were run with `--seeds`."""
    names = [folder.parent.name for folder in sweep.cells_folder.glob(f"*/{RESULT}")]
    seeds = [int(name.rpartition("-seed")[2]) for name in names]
    cells = cells_of(sweep.settings, max([sweep.settings.seeds, *seeds]))
    return [cell for cell in cells if cell.seed <= sweep.settings.seeds or cell.name in names]


def chosen_cells(sweep: Sweep, seeds: int | None, only: list[str]) -> list[Cell]:
    return by_cost(sweep, cells_of(sweep.settings, seeds, only))
