"""Runs a case: real ranks under the real launcher, one fault an attempt, then what is left must be right."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ouro_megatron.checkpoint.folder import resolve
from ouro_megatron.recipe.schema import Recipe
from tests.faults.attempt import EXPECTED, attempt, check_message
from tests.faults.cases import EVALUATE, EVERY, RANKS, STEPS, Case, Fault
from tests.faults.outcome import Broken, Outcome, check_resumes, compare, last_step, newest_good, outcome_of, spoil
from tests.tiny import tiny_recipe


@dataclass
class Report:
    """How a case went."""

    case: Case
    seconds: float = 0.0
    attempts: int = 0
    lost_steps: list[int] = field(default_factory=list)
    """Of each restart: steps that had been recorded and were done again."""
    problem: str = ""


class Suite:
    """A folder with data, and the undisturbed runs that others are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._undisturbed: dict[tuple[str, str, int], Outcome] = {}
        self.can_mount = _can_mount(folder)
        tiny_recipe(folder / "data")  # writes corpus and tokenizer

    def run(self, case: Case) -> Report:
        """Runs a case and checks it; never raises for a broken promise, which is told in the report."""
        report, began = Report(case), time.monotonic()
        try:
            expected = self.undisturbed(case)
            place = self.folder / f"seed-{case.seed}"
            shutil.rmtree(place, ignore_errors=True)
            with self._mounted(place, case):
                outcome = self._disturbed(place, case, report)
                compare(outcome, expected, case)
            shutil.rmtree(place, ignore_errors=True)
        except Broken as error:
            report.problem = str(error)
        report.seconds = time.monotonic() - began
        return report

    def undisturbed(self, case: Case) -> Outcome:
        """The same run without faults (bad data included), written synchronously; made once."""
        key = (case.layout, case.bad_data, case.bad_sample)
        if key not in self._undisturbed:
            place = self.folder / f"undisturbed-{'-'.join(map(str, key)).replace(' ', '-')}"
            shutil.rmtree(place, ignore_errors=True)
            plain = Case(-1, case.layout, False, [], case.bad_data, case.bad_sample)
            recipe = self._recipe(place, plain)
            code, message = attempt(recipe, place, plain, None)
            if code != 0:
                raise Broken(f"the undisturbed run failed with {code}: {message}")
            self._undisturbed[key] = outcome_of(recipe)
        return self._undisturbed[key]

    def _recipe(self, place: Path, case: Case) -> Recipe:
        if not place.exists():
            place.mkdir()
            for file in (self.folder / "data").iterdir():
                if file.is_dir():
                    shutil.copytree(file, place / file.name)
                else:
                    shutil.copy(file, place)
        kinds = {fault.kind for fault in case.faults}
        health: dict[str, Any] = {}
        if case.bad_data == "spike":
            health = {"skip_spikes": True, "window": 16, "min_steps": 4, "rollback_after": 2}
        return tiny_recipe(
            place,
            name="run",
            model={"layers": 2, "hidden": 16, "heads": 2, "ffn": 24, "loops": 2},
            data={"sequence_length": 16},
            batch={"global_tokens": 64},
            budget={"total": f"{STEPS} steps"},
            checkpoint={"every": f"{EVERY} steps", "keep_last": 2, "asynchronous": case.asynchronous},
            evaluation={"every": f"{EVALUATE} steps", "batches": 3},
            parallel={case.layout: RANKS, "timeout_seconds": 12 if "frozen rank" in kinds else 90},
            health=health,
            logging={"wandb": {"mode": "offline" if "wandb gone" in kinds else "disabled"}},
        )

    @contextmanager
    def _mounted(self, place: Path, case: Case) -> Iterator[None]:
        """For a full disk: the run's checkpoints lie on a small file system of their own."""
        if all(fault.kind != "disk full" for fault in case.faults):
            yield
            return
        if not self.can_mount:
            raise Broken("a full disk needs the right to mount a small tmpfs; run this seed as root")
        self._recipe(place, case)
        target = place / "runs" / "run" / "checkpoints"
        target.mkdir(parents=True)
        _mount(target)
        try:
            yield
        finally:
            subprocess.run(["umount", str(target)], check=True)

    def _disturbed(self, place: Path, case: Case, report: Report) -> Outcome:
        recipe = self._recipe(place, case)
        checkpoints = recipe.run_folder / "checkpoints"
        for fault in [*case.faults, None, None]:
            before, good = newest_good(checkpoints), 0
            code, message = attempt(recipe, place, case, fault)
            report.attempts += 1
            if fault is None:
                if code != 0:
                    raise Broken(f"an attempt without a fault ended with {code}: {message}")
            else:
                if code not in EXPECTED[fault.kind]:
                    raise Broken(f"{fault.kind}: exit code {code}, expected {EXPECTED[fault.kind]}: {message}")
                if fault.kind != "kill command" and not (place / f"fired-{fault.kind}-{fault.step}").exists():
                    raise Broken(f"{fault} never happened")
                check_message(fault, message)
            if code == 0:
                break
            spoiled = self._repair(place, recipe, fault, case)
            good = newest_good(checkpoints)
            lost = last_step(recipe) - good
            report.lost_steps.append(lost)
            allowed = EVERY * (1 + int(case.asynchronous) + int(spoiled))
            if not case.bad_data and lost > allowed:
                raise Broken(f"{lost} steps would be lost, at most {allowed} may be")
            if good < before - EVERY * int(spoiled):
                raise Broken(f"the newest good checkpoint went from step {before} back to {good}")
        check_resumes(recipe)
        return outcome_of(recipe)

    def _repair(self, place: Path, recipe: Recipe, fault: Fault | None, case: Case) -> bool:
        """What an operator does before starting again, or what the disk does behind his back.

        Returns whether the newest checkpoint was damaged on purpose.
        """
        checkpoints = recipe.run_folder / "checkpoints"
        if fault is None:
            return False
        if fault.kind == "disk full":
            (checkpoints / "filler").unlink()
        if fault.kind == "corrupt data":
            shutil.copy(self.folder / "data" / "train.bin", place / "train.bin")
        if fault.kind == "corrupt checkpoint":
            spoil(resolve(checkpoints).folder, fault.detail, random.Random(case.seed))
            return True
        return False


def _can_mount(folder: Path) -> bool:
    probe = folder / "probe"
    probe.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return False
    try:
        _mount(probe)
    except subprocess.CalledProcessError:
        return False
    subprocess.run(["umount", str(probe)], check=True)
    return True


def _mount(target: Path) -> None:
    """A file system of 4 MB: a handful of this model's checkpoints."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(target)], check=True, capture_output=True)
