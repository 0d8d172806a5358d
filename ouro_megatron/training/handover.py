"""What a new stage takes over from the checkpoint it starts from, in words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ouro_megatron.checkpoint.state import RunState, tokens_in_all
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.text import big

_COMPARED = (
    "model.loops",
    "model.rope_base",
    "data.sequence_length",
    "batch.global_tokens",
    "objective.kind",
    "objective.beta",
    "optimizer.lr",
)


def handover(state: RunState, recipe: Recipe, folder: Path) -> Iterator[str]:
    """One line for each thing that carries over from `folder`, whose state is `state`, or begins afresh."""
    before, now = state.recipe, recipe.model_dump(mode="json")
    made = {"upcycle": "made by upcycling", "average": "a mean of checkpoints", "import": "imported"}
    came = made.get(state.origin, f"step {state.step} of {before['name']}")
    yield f"weights: carried from {folder} ({came}); {big(tokens_in_all(state))} tokens trained so far"
    if recipe.init.optimizer:
        yield f"optimizer: moments carried, {state.optimizer_steps} updates made"
    else:
        yield "optimizer: afresh (init.optimizer=false)"
    if recipe.init.data_position:
        yield f"data position: goes on at sample {state.next_sample} of the same blend"
    else:
        yield f"data position: first sample, order by training.seed={recipe.training.seed} (init.data_position=false)"
    warmup = recipe.schedule.warmup
    length = f"a warmup of {warmup}" if warmup.tokens or warmup.steps else "no warmup"
    yield f"schedule: afresh, {recipe.schedule.kind} with {length}"
    yield "random numbers: none to carry; order of samples and new weights follow from training.seed"
    kept = []
    for path in _COMPARED:
        old, new = _at(before, path), _at(now, path)
        if old == new:
            kept.append(f"{path}={new}")
        else:
            yield f"{path}: {old} -> {new}"
    for early in recipe.training.early_loops:
        yield f"model.loops: {early.loops} until {early.until} of this stage"
    for point in recipe.batch.ramp:
        yield f"batch.global_tokens: {point.global_tokens} after {point.after} of this stage"
    if kept:
        yield "unchanged: " + ", ".join(kept)


def _at(values: dict[str, Any], path: str) -> Any:
    section, key = path.split(".")
    return values[section].get(key)
