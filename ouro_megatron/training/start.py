"""Where a stage begins: its own newest checkpoint, another stage's, or new weights."""

from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.checkpoint.folder import newest, remove_incomplete, resolve
from ouro_megatron.checkpoint.state import RunState, read_state
from ouro_megatron.errors import CheckpointError, RecipeError
from ouro_megatron.recipe.load import difference
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class Start:
    """Where the weights of this process come from; decided on rank 0."""

    folder: Path | None
    """A checkpoint to load; None to draw new weights."""
    resumed: bool
    """The checkpoint is this run's own."""
    notes: tuple[str, ...] = ()


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
        return Start(own.folder, True, tuple(notes))
    if recipe.init.checkpoint is not None:
        try:
            found = resolve(recipe.init.checkpoint)
        except CheckpointError as error:
            raise CheckpointError(f"init.checkpoint: {error}") from error
        return Start(found.folder, False, tuple(notes + found.skipped))
    return Start(None, False, tuple(notes))


def _check_same_data_position(recipe: Recipe, plan: BatchPlan, state: RunState, folder: Path) -> None:
    if plan.at(state.step).consumed_samples != state.samples:
        raise RecipeError(
            f"batch: at step {state.step} this recipe has read {plan.at(state.step).consumed_samples} samples, but "
            f"{folder} has read {state.samples}. Restore batch and data.sequence_length, "
            "or start a new stage (another name, init.checkpoint)"
        )
    if state.step > plan.total_steps:
        raise RecipeError(f"budget.total ends at step {plan.total_steps}, but {folder} is at step {state.step} already")
