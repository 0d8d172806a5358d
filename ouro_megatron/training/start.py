"""Where a stage begins: its own newest checkpoint, another stage's, or new weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ouro_megatron.checkpoint.folder import Resolved, problem_with, remove_incomplete, resolve, set_aside, step_folders
from ouro_megatron.checkpoint.state import RunState, read_state
from ouro_megatron.checkpoint.verify import damage
from ouro_megatron.data.ranks import from_rank_zero
from ouro_megatron.errors import CheckpointError, RecipeError
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.recipe.fp8 import fp8_warning
from ouro_megatron.recipe.load import difference
from ouro_megatron.recipe.schedule import BatchPlan, LoopPlan
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.training.handover import handover
from ouro_megatron.training.rollback import drop_abandoned


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


def verified_start(recipe: Recipe, plan: BatchPlan, context: ParallelContext) -> Start:
    """Where to start, every file read against its hash (`checkpoint.verify`). All ranks call it together.

    A damaged checkpoint of this run is set aside and the one before it taken; of another run's, the one before it is
    taken. Raises CheckpointError when no good one is left.
    """
    damaged: dict[Path, str] = {}
    notes: tuple[str, ...] = ()
    while True:
        start = from_rank_zero(lambda: find_start(recipe, plan, damaged))
        notes += start.notes
        start = replace(start, notes=tuple(dict.fromkeys(notes)))
        if start.folder is None or not recipe.checkpoint.verify:
            return start
        problem = damage(start.folder, context.rank, context.world_size)
        if problem is None:
            return start
        damaged[start.folder] = problem


def find_start(recipe: Recipe, plan: BatchPlan, damaged: Mapping[Path, str] | None = None) -> Start:
    """Rank 0: cleans up after interrupted saves and rollbacks and picks the checkpoint to load.

    `damaged`: checkpoints whose contents turned out to be wrong, and why.
    """
    root = recipe.run_folder / "checkpoints"
    notes = [f"removed {folder}, left by an interrupted save" for folder in remove_incomplete(root)]
    notes += [f"removed {folder}, which a rollback had left behind" for folder in drop_abandoned(recipe.run_folder)]
    warning = fp8_warning(recipe)
    notes += [warning] if warning else []
    own, lost = _own(root, damaged or {})
    notes += lost
    if own is not None:
        state = read_state(own)
        _check_same_data_position(recipe, plan, state, own)
        before = Recipe.model_validate(state.recipe)
        _check_same_loops(recipe, before, plan, state, own)
        for path, old, new in difference(before, recipe):
            notes.append(f"recipe changed since step {state.step}: {path}: {old} -> {new}")
        return Start(own, True, tuple(notes), first_sample=state.first_sample)
    source = recipe.init_path
    if source is None:
        return Start(None, False, tuple(notes))
    field = "init.stage" if recipe.init.stage is not None else "init.checkpoint"
    try:
        found = resolve(source, damaged)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error
    state = read_state(found.folder)
    if recipe.init.stage is not None:
        _check_finished(state, found)
    first = state.next_sample if recipe.init.data_position else 0
    lines = tuple(handover(state, recipe, found.folder))
    return Start(found.folder, False, tuple(notes + found.skipped), first, lines)


def _check_finished(state: RunState, found: Resolved) -> None:
    if state.origin != "training":
        return
    total = BatchPlan(Recipe.model_validate(state.recipe)).total_steps
    if state.step < total:
        raise CheckpointError(
            f"init.stage={state.recipe['name']} is not finished: {found.folder} is step {state.step} of {total}. "
            "Train it to its end, or name the checkpoint itself (init.checkpoint) to start from there"
            + "".join(f"\n  {line}" for line in found.skipped)
        )


def _own(root: Path, damaged: Mapping[Path, str]) -> tuple[Path | None, list[str]]:
    """This run's newest good checkpoint; sets newer ones that are damaged aside and says so.

    Raises CheckpointError when there are some and all are damaged: beginning anew would lose a run silently.
    """
    folders = step_folders(root)
    problems = {folder: problem_with(folder) or damaged.get(folder) for folder in folders}
    good = next((folder for folder in reversed(folders) if problems[folder] is None), None)
    if good is None and folders:
        reasons = "".join(f"\n  {folder}: {problems[folder]}" for folder in folders)
        raise CheckpointError(
            f"none of the checkpoints under {root} can be used:{reasons}\n"
            "Restore one of them, or move the folder away to begin the stage anew"
        )
    notes = []
    for folder in reversed(folders):
        if folder == good:
            break
        notes.append(f"{folder} is damaged: {problems[folder]}; it is now {set_aside(folder).name}")
    return good, notes


def _check_same_loops(recipe: Recipe, before: Recipe, plan: BatchPlan, state: RunState, folder: Path) -> None:
    """T is what a stage trains: it changes inside one only as the stage's own `training.early_loops` says."""
    old, new = LoopPlan(before, BatchPlan(before)).at(state.step), LoopPlan(recipe, plan).at(state.step)
    if (before.model.loops, old) != (recipe.model.loops, new):
        raise RecipeError(
            f"model.loops={recipe.model.loops}, {new} of them from step {state.step} on, but {folder} was trained for "
            f"model.loops={before.model.loops}, {old} of them there. Restore model.loops and training.early_loops, or "
            f"start a new stage with other loops (another name, init.checkpoint={folder})"
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
