"""Reads run folders back: what the report needs to know about each stage."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ouro_megatron.errors import MetricsError, OuroError
from ouro_megatron.recipe.load import recipe_from_text
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import METRICS_NAME, read_records
from ouro_megatron.telemetry.records import EvalRecord, EventRecord, StepRecord


@dataclass(frozen=True)
class Stage:
    """One run folder."""

    folder: Path
    name: str
    recipe: Recipe | None
    """None when the folder has no readable recipe.yaml."""
    recipe_text: str
    steps: list[StepRecord]
    evaluations: list[EvalRecord]
    events: list[EventRecord]
    started: float
    """When its metrics file was begun, for the order of stages."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    unigram_entropy: float | None = None
    """Of the validation blend, nats a token."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """Stages before this one, first to last, as its checkpoints hold them."""

    @property
    def parent(self) -> str | None:
        """Name of the stage that this one goes on from; None for a first one."""
        trained = [record["name"] for record in self.lineage if record.get("kind") == "training"]
        return trained[-1] if trained else None

    @property
    def tokens_before(self) -> int:
        """Tokens that its model was trained on before this stage."""
        return sum(int(record["tokens"]) for record in self.lineage if record.get("kind") == "training")

    @property
    def tokens(self) -> int:
        return self.steps[-1].tokens if self.steps else 0

    @property
    def restarts(self) -> int:
        return sum(event.name == "resume" for event in self.events)

    @property
    def loops(self) -> int:
        if self.steps:
            return len(self.steps[-1].loops.ce)
        return len(self.evaluations[-1].loops.ce) if self.evaluations else 1

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def read_stages(folder: Path) -> list[Stage]:
    """The stage in `folder`, or all stages in its sub-folders in the order of the tokens before them.

    Raises MetricsError when there is none.
    """
    folders = [folder] if (folder / METRICS_NAME).is_file() else []
    if not folders and folder.is_dir():
        folders = [child for child in sorted(folder.iterdir()) if (child / METRICS_NAME).is_file()]
    if not folders:
        raise MetricsError(
            f"{folder}: no {METRICS_NAME} there or one folder below; name a run folder (run_dir/name) or the folder "
            "of several"
        )
    stages = [_read(child) for child in folders]
    return sorted(stages, key=lambda stage: (stage.tokens_before, stage.started, stage.name))


def _read(folder: Path) -> Stage:
    records = read_records(folder / METRICS_NAME)
    text = _text(folder / "recipe.yaml")
    try:
        recipe = recipe_from_text(text, str(folder / "recipe.yaml")) if text else None
    except OuroError:  # of another version; the curves are still worth showing
        recipe = None
    lineage = _json(folder / "lineage.json", list)
    samples, facts = _json(folder / "samples.json", list), _json(folder / "data.json", dict)
    return Stage(
        folder=folder,
        name=recipe.name if recipe else folder.name,
        recipe=recipe,
        recipe_text=text,
        steps=_without_undone([record for record in records if isinstance(record, StepRecord)]),
        evaluations=_without_undone([record for record in records if isinstance(record, EvalRecord)]),
        events=[record for record in records if isinstance(record, EventRecord)],
        started=_started(folder),
        samples=samples or [],
        unigram_entropy=(facts or {}).get("unigram_entropy"),
        lineage=[record for record in lineage or [] if isinstance(record, dict) and "name" in record],
    )


R = TypeVar("R", StepRecord, EvalRecord)


def _without_undone(records: list[R]) -> list[R]:
    """Records in the order of their steps: where a rollback went back, what was written before it does not count."""
    kept: list[R] = []
    for record in records:
        while kept and kept[-1].step >= record.step:
            kept.pop()
        kept.append(record)
    return kept


def _started(folder: Path) -> float:
    """The first save is the earliest lasting trace of a stage; its metrics file is rewritten at each resume."""
    marks = [folder / "recipe.yaml", folder / METRICS_NAME, folder / "log"]
    return min(mark.stat().st_ctime for mark in marks if mark.exists())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _json(path: Path, kind: type) -> Any:
    """The file's content when it is there and of that kind; reports do without it otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, kind) else None
