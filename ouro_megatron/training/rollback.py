"""Going back to the last good checkpoint and leaving out the data that led away from it.

Each rollback is one entry of rollbacks.json in the run folder, written before anything else changes, and of every later
checkpoint. A run that is killed at any moment of a rollback finds the entry when it starts again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ouro_megatron.checkpoint.folder import problem_with, remove, set_aside, step_folders, step_of, write_json
from ouro_megatron.checkpoint.state import RunState, read_state
from ouro_megatron.checkpoint.verify import damage
from ouro_megatron.data.ranks import from_rank_zero, on_rank_zero
from ouro_megatron.data.skipping import Window, windows_of
from ouro_megatron.errors import CheckpointError, TrainingError
from ouro_megatron.parallel.context import ParallelContext

LEDGER = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier checkpoint."""

    from_step: int
    """Steps done when it was decided."""
    to_step: int
    """The checkpoint's."""
    start: int
    end: int
    """Samples [start, end) of the blend are left out from then on."""
    reason: str


def left_out(rollbacks: Sequence[Rollback]) -> tuple[Window, ...]:
    """The samples that a run with these rollbacks leaves out."""
    return windows_of((entry.start, entry.end) for entry in rollbacks)


def from_values(values: Sequence[dict[str, Any]]) -> list[Rollback]:
    return [Rollback(**value) for value in values]


def read_ledger(run_folder: Path) -> list[Rollback]:
    """The entries of rollbacks.json; none without the file. Raises CheckpointError when it cannot be read."""
    path = run_folder / LEDGER
    if not path.exists():
        return []
    try:
        return from_values(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; which data to leave out is not known") from error


def forget_ledger(run_folder: Path) -> None:
    """Rank 0: a run that begins anew leaves nothing out; the old file is kept as rollbacks.previous.json."""
    path = run_folder / LEDGER
    if path.exists():
        path.replace(path.with_name("rollbacks.previous.json"))


def known_rollbacks(run_folder: Path, state: RunState) -> list[Rollback]:
    """Rank 0: all rollbacks of this run, when it goes on from a checkpoint with `state`.

    The file may hold one that the checkpoint, being older, does not know; a copied checkpoint comes without the file.
    """
    ledger, saved = read_ledger(run_folder), from_values(state.health.get("rollbacks", []))
    return ledger if len(ledger) > len(saved) else saved


def drop_abandoned(run_folder: Path) -> list[Path]:
    """Rank 0: deletes checkpoints of steps that were rolled back later; returns them."""
    ledger = read_ledger(run_folder)
    dropped = []
    for folder in step_folders(run_folder / "checkpoints") if ledger else []:
        step = step_of(folder)
        assert step is not None
        if problem_with(folder) is not None:
            continue
        known = len(read_state(folder).health.get("rollbacks", []))
        if any(entry.to_step < step for entry in ledger[known:]):
            remove(folder)
            dropped.append(folder)
    return dropped


def last_good(root: Path, step: int, context: ParallelContext) -> Path:
    """The newest undamaged checkpoint of `step` or before. All ranks call it together.

    Damaged ones on the way are set aside. Raises TrainingError when there is none.
    """
    while True:
        folder = from_rank_zero(lambda: _newest_until(root, step))
        if folder is None:
            raise TrainingError(f"there is no checkpoint of step {step} or before under {root} to go back to")
        if damage(folder, context.rank, context.world_size) is None:
            return folder
        on_rank_zero(lambda folder=folder: set_aside(folder))  # type: ignore[misc]


def _newest_until(root: Path, step: int) -> Path | None:
    usable = [folder for folder in step_folders(root) if (step_of(folder) or 0) <= step]
    return next((folder for folder in reversed(usable) if problem_with(folder) is None), None)


@dataclass
class Rollbacks:
    """Carries rollbacks out. `load` fills the engine from a checkpoint and returns its state."""

    run_folder: Path
    load: Callable[[Path], RunState]
    entries: list[Rollback]

    def values(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]

    def go_back(
        self, context: ParallelContext, *, from_step: int, until: int, data_position: Callable[[int], int], reason: str
    ) -> RunState:
        """Loads the last good checkpoint of step `until` or before and notes which samples to leave out.

        `data_position`: the blend's sample that follows a step. Returns the checkpoint's state. All ranks call it
        together. Raises TrainingError when there is no checkpoint to go back to.
        """
        folder = last_good(self.run_folder / "checkpoints", until, context)
        to_step = step_of(folder)
        assert to_step is not None
        entry = Rollback(from_step, to_step, data_position(to_step), data_position(from_step), reason)
        self.entries.append(entry)
        on_rank_zero(self._commit)
        return self.load(folder)

    def _commit(self) -> None:
        write_json(self.run_folder / LEDGER, self.values())
        drop_abandoned(self.run_folder)
