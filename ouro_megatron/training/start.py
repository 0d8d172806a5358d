"""Where a stage begins: its own newest checkpoint, another stage's, or new weights."""

from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.checkpoint.folder import newest, remove_incomplete, resolve
from ouro_megatron.checkpoint.state import RunState, read_state
from ouro_megatron.errors import CheckpointError, RecipeError
from ouro_megatron.recipe.load import difference
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.training.handover import handover


@dataclass(frozen=True)
class Start:
    """Where the weights of this process come from; decided on rank 0."""

    folder: Path | None
    """A checkpoint to load; None to draw new weights."""
    resumed: bool
    """The checkpoint is this run's own."""
    notes: tuple[str, ...] = ()
    """Warnings for people."""
    first_sample: int = 0
    """Where in the blend this stage begins."""
    handover: tuple[str, ...] = ()
    """What a new stage takes over from the checkpoint and what begins afresh, for people."""


def find_start(recipe: Recipe, plan: BatchPlan) -> Start:
    """Rank 0: cleans up after interrupted saves and picks the checkpoint to load."""
    root = recipe.run_folder / "checkpoints"
    own = newest(root)
    notes = [f"removed {folder}, left by an interrupted save" for folder in remove_incomplete(root)]
    if own is not None:
        notes += own.skipped
        state = read_state(own.folder)
        _check_same_data_position(recipe, plan, state, own.folder)
        before = Recipe.model_validate(state.recipe)
        for path, old, new in difference(before, recipe):
            notes.append(f"recipe changed since step {state.step}: {path}: {old} -> {new}")
        return Start(own.folder, True, tuple(notes), first_sample=state.first_sample)
    source = recipe.init_path
    if source is None:
        return Start(None, False, tuple(notes))
    field = "init.stage" if recipe.init.stage is not None else "init.checkpoint"
    try:
        found = resolve(source)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error
    state = read_state(found.folder)
    if recipe.init.stage is not None:
        _check_finished(state, found.folder)
    first = state.first_sample + state.samples if recipe.init.data_position else 0
    lines = tuple(handover(state, recipe, found.folder))
    return Start(found.folder, False, tuple(notes + found.skipped), first, lines)


def _check_finished(state: RunState, folder: Path) -> None:
    if state.origin != "training":
        return
    total = BatchPlan(Recipe.model_validate(state.recipe)).total_steps
    if state.step < total:
        raise CheckpointError(
            f"init.stage={state.recipe['name']} is not finished: {folder} is step {state.step} of {total}. Train it to "
            "its end, or name the checkpoint itself (init.checkpoint) to start from there"
        )


def _check_same_data_position(recipe: Recipe, plan: BatchPlan, state: RunState, folder: Path) -> None:
    if plan.at(state.step).consumed_samples != state.samples:
        raise RecipeError(
            f"batch: at step {state.step} this recipe has read {plan.at(state.step).consumed_samples} samples, but "
            f"{folder} has read {state.samples}. Restore batch and data.sequence_length, "
            "or start a new stage (another name, init.checkpoint)"
        )
    if state.step > plan.total_steps:
        raise RecipeError(f"budget.total ends at step {plan.total_steps}, but {folder} is at step {state.step} already")
