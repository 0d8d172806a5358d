"""What a run left in its folder, and whether that is right."""

import random
from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.checkpoint.folder import problem_with, read_marker, resolve, step_folders, step_of
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord, EventRecord, Record, StepRecord
from tests.faults.cases import STEPS, Case


class Broken(AssertionError):
    """A promise was not kept."""


@dataclass
class Outcome:
    """What a finished run came to: last losses by step, held-out losses by step, hashes of the last checkpoint."""

    losses: dict[int, float]
    held_out: dict[int, float]
    tensors: dict[str, str]
    rollbacks: int
    skipped: int


def records(recipe: Recipe) -> list[Record]:
    path = recipe.run_folder / "metrics.jsonl"
    return read_records(path) if path.exists() else []


def last_step(recipe: Recipe) -> int:
    steps = [record.step for record in records(recipe) if isinstance(record, StepRecord)]
    return steps[-1] if steps else 0


def newest_good(checkpoints: Path) -> int:
    """Step of the newest checkpoint that agrees with its marker, contents included; 0 without one."""
    from ouro_megatron.checkpoint.verify import damage

    good = [folder for folder in step_folders(checkpoints) if problem_with(folder) is None and damage(folder) is None]
    return max((step_of(folder) or 0 for folder in good), default=0)


def spoil(folder: Path, how: str, generator: random.Random) -> None:
    if how.startswith("marker"):
        marker = folder / "complete.json"
        marker.unlink() if how == "marker missing" else marker.write_bytes(generator.randbytes(40))
        return
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "complete.json")
    file = generator.choice(files)
    content = bytearray(file.read_bytes())
    if how == "file missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: generator.randrange(len(content))])
    else:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        file.write_bytes(content)


def outcome_of(recipe: Recipe) -> Outcome:
    found = records(recipe)
    steps = {record.step: record for record in found if isinstance(record, StepRecord)}
    held_out = {record.step: record.loss for record in found if isinstance(record, EvalRecord)}
    folder = resolve(recipe.run_folder).folder
    hashes = read_marker(folder)["hashes"]
    if step_of(folder) != STEPS or sorted(steps) != list(range(1, STEPS + 1)):
        raise Broken(f"ended at {folder.name} with records of steps {sorted(steps)}")
    return Outcome(
        losses={step: record.loss for step, record in steps.items()},
        held_out=held_out,
        tensors={name: value for name, value in hashes.items() if name.endswith(".distcp")},
        rollbacks=steps[STEPS].rollbacks,
        skipped=steps[STEPS].skipped_steps,
    )


def compare(outcome: Outcome, expected: Outcome, case: Case) -> None:
    # repr: NaN equals NaN, and every bit of a float shows.
    for what in ("losses", "held_out", "rollbacks", "skipped", "tensors"):
        found, wanted = getattr(outcome, what), getattr(expected, what)
        if repr(sorted(found.items()) if isinstance(found, dict) else found) != repr(
            sorted(wanted.items()) if isinstance(wanted, dict) else wanted
        ):
            raise Broken(f"{what} differ from the undisturbed run's:\n  {found}\n  {wanted}")
    if case.bad_data == "spike" and not outcome.rollbacks:
        raise Broken("the spike led to no rollback")
    if case.bad_data == "not finite" and not outcome.skipped:
        raise Broken("the steps that were not finite were not skipped")


def check_resumes(recipe: Recipe) -> None:
    """Every start of the run says what it loaded; the last one must not have lost the run."""
    events = [record for record in records(recipe) if isinstance(record, EventRecord)]
    if any("could not" in event.message for event in events if event.name == "warning"):
        raise Broken(f"unexpected warnings: {[event.message for event in events]}")
