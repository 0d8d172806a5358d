"""The small part of a checkpoint: everything that is not a tensor, as JSON a person can read."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ouro_megatron.checkpoint.folder import STATE, write_json
from ouro_megatron.data.skipping import position, windows_of
from ouro_megatron.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class StageRecord:
    """One entry of a model's history: a finished stage, or an upcycling or averaging in between."""

    name: str
    kind: str
    """"training", "upcycle", "average" or "import"."""
    steps: int
    tokens: int
    detail: str
    """For people: layers, loops, sequence length, or how layers were copied."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of a training stage: what its recipe said of loops, RoPE base, batch, rate, objective and blend, and what it took
    over. Empty in histories written before this was recorded."""
    checkpoint: str | None = None
    """Where the next one took over from."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands. Nothing in training draws random numbers after initialisation, so counters are enough."""

    step: int
    """Steps done in this stage, skipped updates included."""
    tokens: int
    """Tokens consumed in this stage."""
    samples: int
    """Samples consumed in this stage: the data position."""
    optimizer_steps: int
    """Updates Adam has made: its bias correction depends on it."""
    skipped_steps: int
    seconds: float
    """Wall time spent in this stage's steps."""
    world: str
    """Layout it was saved at, for people."""
    recipe: dict[str, Any]
    """The resolved recipe as plain values."""
    fingerprint: dict[str, Any]
    """Of the data blend; see data/fingerprint.py."""
    first_sample: int = 0
    """Where in the blend this stage began; `next_sample` is where it goes on."""
    history: list[StageRecord] = field(default_factory=list)
    """Stages before this one, first to last."""
    health: dict[str, Any] = field(default_factory=dict)
    """Skipped updates in a row, the window that outliers are judged by, and rollbacks; see training/progress.py."""
    pending_evaluation: bool = False
    """A stop interrupted the evaluation that was due at this step: it is made up for when the run goes on."""
    origin: Literal["training", "upcycle", "average", "import"] = "training"
    """Others than `training`: made from another model or several; its counters are those of a stage not begun."""
    format: int = FORMAT

    @property
    def next_sample(self) -> int:
        """The blend's sample that comes next, those that rollbacks left out not counted as consumed."""
        windows = windows_of((entry["start"], entry["end"]) for entry in self.health.get("rollbacks", []))
        return position(windows, self.first_sample + self.samples)


def write_state(folder: Path, state: RunState) -> None:
    write_json(folder / STATE, asdict(state))


def read_state(folder: Path) -> RunState:
    """Raises CheckpointError when the file is missing, not JSON, or of a format this version does not know."""
    path = folder / STATE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {fields['format']}; this version reads format {FORMAT}")
        fields["history"] = [StageRecord(**record) for record in fields["history"]]
        return RunState(**fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def history_with(state: RunState, folder: Path | None = None) -> list[StageRecord]:
    """The history a stage begins with when it starts from this checkpoint at `folder`: all before it, and its own
    stage."""
    if state.origin != "training":  # its history ends with how it was made already
        return list(state.history)
    return [*state.history, record_of(state, folder)]


def record_of(state: RunState, folder: Path | None = None) -> StageRecord:
    """The stage a checkpoint is of, as an entry of the history."""
    model, data = state.recipe["model"], state.recipe["data"]
    detail = f"{model['layers']} layers x {model['loops']} loops, sequence {data['sequence_length']}"
    if state.skipped_steps:
        detail += f", {state.skipped_steps} updates skipped"
    rollbacks = len(state.health.get("rollbacks", []))
    if rollbacks:
        detail += f", {rollbacks} rollback{'s' if rollbacks > 1 else ''}"
    where = None if folder is None else str(folder)
    return StageRecord(
        state.recipe["name"], "training", state.step, state.tokens, detail, stage_facts(state.recipe), where
    )


def stage_facts(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a lineage tells of a stage, from its recipe as plain values."""
    model, training, batch, init = recipe["model"], recipe["training"], recipe["batch"], recipe.get("init", {})
    early = [early["loops"] for early in training.get("early_loops", [])]
    return {
        "layers": model["layers"],
        "loops": [*early, model["loops"]],
        "rope_base": model["rope_base"],
        "sequence_length": recipe["data"]["sequence_length"],
        "global_tokens": [batch["global_tokens"], *(point["global_tokens"] for point in batch.get("ramp", []))],
        "lr": recipe["optimizer"]["lr"],
        "min_lr": recipe["schedule"]["min_lr"],
        "schedule": recipe["schedule"]["kind"],
        "objective": recipe["objective"]["kind"],
        "beta": recipe["objective"]["beta"],
        "started_from": init.get("stage") or init.get("checkpoint"),
        "optimizer_carried": bool(init.get("optimizer")),
        "data_position_carried": bool(init.get("data_position")),
        "blend": {entry.get("name") or Path(entry["path"]).name: entry["weight"] for entry in recipe["data"]["train"]},
    }


def tokens_in_all(state: RunState) -> int:
    """Tokens of all stages up to this checkpoint."""
    return state.tokens + sum(record.tokens for record in state.history)


def check_same_model(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Compares the model sections of a checkpoint and a recipe.

    Loops, RoPE base, norm epsilon and the layer implementation do not shape the weights and may differ.
    Raises CheckpointError listing each field that does not fit.
    """
    free = {"rope_base", "norm_eps", "init_std", "post_norm_init", "gate_bias_init", "implementation", "loops"}
    old, new = saved["model"], wanted["model"]
    defaults = {"kv_heads": "heads", "head_dim": None}
    problems = []
    for key in sorted(set(old) | set(new)):
        if key in free:
            continue
        before, after = old.get(key), new.get(key)
        if before is None and key in defaults:
            before = _implied(old, key)
        if after is None and key in defaults:
            after = _implied(new, key)
        if before != after:
            problems.append(f"  model.{key}: the checkpoint has {before}, the recipe {after}")
    if problems:
        hint = ""
        if any("model.layers" in line for line in problems):
            hint = "\nTo make a deeper model from it: ouro upcycle"
        raise CheckpointError(f"{folder} holds another model:\n" + "\n".join(problems) + hint)


def _implied(model: dict[str, Any], key: str) -> Any:
    return model["heads"] if key == "kv_heads" else model["hidden"] // model["heads"]
