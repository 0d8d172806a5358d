"""Runs a case: real ranks under the real launcher, one fault an attempt, then what is left must be right.

The ranks are forked from a server that has imported everything already; from there on they are processes like any
other, with process ids, signals and files of their own.
"""

import multiprocessing as mp
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ouro_megatron.checkpoint.folder import problem_with, read_marker, resolve, step_folders, step_of
from ouro_megatron.errors import STOPPED_EXIT_CODE, OuroError
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord, EventRecord, Record, StepRecord
from ouro_megatron.training.launch import RankProcess, Ranks
from tests.faults.cases import EVALUATE, EVERY, RANKS, STEPS, Case, Fault
from tests.faults.rank import rank_main
from tests.tiny import tiny_recipe

OURO = Path(sys.executable).with_name("ouro")
ATTEMPT_SECONDS = 240.0
"""Longer than any attempt takes on a busy machine: what is still there then hangs."""
EXPECTED = {
    "kill": {5},
    "term": {STOPPED_EXIT_CODE, 0},
    "disk full": {4},
    "corrupt checkpoint": {5},
    "corrupt data": {3},
    "clock": {0},
    "wandb gone": {0},
    "slow rank": {0},
    "frozen rank": {5},
    "kill command": {5, -9},
}
"""Exit codes of an attempt with that fault."""


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


@dataclass
class Report:
    """How a case went."""

    case: Case
    seconds: float = 0.0
    attempts: int = 0
    lost_steps: list[int] = field(default_factory=list)
    """Of each restart: steps that had been recorded and were done again."""
    problem: str = ""


class ForkedRank:
    """A rank of the fork server, with the face of a subprocess.Popen."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.returncode: int | Any = None

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        self._process.join()
        self.returncode = self._process.exitcode
        return int(self.returncode)


class ForkedRanks(Ranks):
    """The launcher, with forked ranks that have a fault built in; ends what hangs."""

    def __init__(self, *launch: Any, arguments: tuple[Any, ...]) -> None:
        super().__init__(*launch)
        self._arguments = arguments
        self.timed_out = False

    def _spawn(self, rank: int, environment: dict[str, str], log: Path) -> RankProcess:
        process = mp.get_context("forkserver").Process(
            target=rank_main, args=(environment, str(log), str(self._file), *self._arguments)
        )
        process.start()
        return ForkedRank(process)

    def give_up(self) -> None:
        self.timed_out = True
        for process in self._processes:
            process.kill()


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
                _compare(outcome, expected, case)
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
            code, message = _attempt(recipe, place, plain, None)
            if code != 0:
                raise Broken(f"the undisturbed run failed with {code}: {message}")
            self._undisturbed[key] = _outcome(recipe)
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
            before, good = _newest_good(checkpoints), 0
            code, message = _attempt(recipe, place, case, fault)
            report.attempts += 1
            if fault is None:
                if code != 0:
                    raise Broken(f"an attempt without a fault ended with {code}: {message}")
            else:
                if code not in EXPECTED[fault.kind]:
                    raise Broken(f"{fault.kind}: exit code {code}, expected {EXPECTED[fault.kind]}: {message}")
                if fault.kind != "kill command" and not (place / f"fired-{fault.kind}-{fault.step}").exists():
                    raise Broken(f"{fault} never happened")
                _check_message(fault, message)
            if code == 0:
                break
            spoiled = self._repair(place, recipe, fault, case)
            good = _newest_good(checkpoints)
            lost = _last_step(recipe) - good
            report.lost_steps.append(lost)
            allowed = EVERY * (1 + int(case.asynchronous) + int(spoiled))
            if not case.bad_data and lost > allowed:
                raise Broken(f"{lost} steps would be lost, at most {allowed} may be")
            if good < before - EVERY * int(spoiled):
                raise Broken(f"the newest good checkpoint went from step {before} back to {good}")
        _check_resumes(recipe)
        return _outcome(recipe)

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
            _damage(resolve(checkpoints).folder, fault.detail, random.Random(case.seed))
            return True
        return False


def _attempt(recipe: Recipe, place: Path, case: Case, fault: Fault | None) -> tuple[int, str]:
    """One launch: exit code and the error's message."""
    if fault is not None and fault.kind == "kill command":
        return _command(recipe, place, fault)
    file = place / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    failures = place / "failures"
    shutil.rmtree(failures, ignore_errors=True)
    failures.mkdir()
    fired = place / (f"fired-{fault.kind}-{fault.step}" if fault else "fired")
    arguments = (fault, str(fired), str(place / "train.bin"), case.bad_data, case.bad_sample)
    ranks = ForkedRanks(recipe, file, RANKS, failures, arguments=arguments)
    over = threading.Event()
    threading.Thread(target=_watch, args=(over, ranks.give_up), daemon=True).start()
    try:
        code, message = ranks.run(), ""
    except OuroError as error:
        code, message = error.exit_code, str(error)
    finally:
        over.set()
    if ranks.timed_out:
        raise Broken(f"hung for {ATTEMPT_SECONDS:.0f} seconds with {fault}")
    return code, message


def _watch(over: threading.Event, give_up: Callable[[], None]) -> None:
    """Gives up after ATTEMPT_SECONDS in ticks of a second: while the whole suite is stopped, none passes."""
    for _ in range(round(ATTEMPT_SECONDS)):
        if over.wait(1.0):
            return
    give_up()


def _command(recipe: Recipe, place: Path, fault: Fault) -> tuple[int, str]:
    """`ouro train` in a process of its own; a rank, or the launcher itself, is killed at a step from outside."""
    file = place / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    with (place / "command.log").open("wb") as log:
        process = subprocess.Popen([OURO, "train", str(file)], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + ATTEMPT_SECONDS
        while _last_step(recipe) < fault.step and process.poll() is None:
            if time.monotonic() > deadline:
                raise Broken("`ouro train` made no steps")
            time.sleep(0.005)
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        ranks = [child for child in children if "ouro_megatron.training.worker" in " ".join(child.cmdline())]
        victim = psutil.Process(process.pid) if fault.detail == "the launcher" else ranks[fault.rank]
        victim.kill()
        code = process.wait(timeout=ATTEMPT_SECONDS)
        if psutil.wait_procs(ranks, timeout=30)[1]:
            raise Broken("ranks outlived their launcher")
    except (psutil.Error, IndexError, subprocess.TimeoutExpired) as error:
        raise Broken(f"{fault}: {error!r}") from error
    finally:
        process.kill()
        process.wait()
    return code, (place / "command.log").read_text(encoding="utf-8", errors="replace")


def _check_message(fault: Fault, message: str) -> None:
    wanted = {
        "kill": f"rank {fault.rank} was ended by SIGKILL",
        "corrupt checkpoint": f"rank {fault.rank} was ended by SIGKILL",
        "disk full": "No space left on device",
        "corrupt data": "has been damaged",
        "frozen rank": "",
    }.get(fault.kind, "")
    if wanted not in message:
        raise Broken(f"{fault.kind}: the message does not say {wanted!r}: {message}")


def _records(recipe: Recipe) -> list[Record]:
    path = recipe.run_folder / "metrics.jsonl"
    return read_records(path) if path.exists() else []


def _last_step(recipe: Recipe) -> int:
    steps = [record.step for record in _records(recipe) if isinstance(record, StepRecord)]
    return steps[-1] if steps else 0


def _newest_good(checkpoints: Path) -> int:
    """Step of the newest checkpoint that agrees with its marker, contents included; 0 without one."""
    from ouro_megatron.checkpoint.verify import damage

    good = [folder for folder in step_folders(checkpoints) if problem_with(folder) is None and damage(folder) is None]
    return max((step_of(folder) or 0 for folder in good), default=0)


def _damage(folder: Path, how: str, generator: random.Random) -> None:
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


def _outcome(recipe: Recipe) -> Outcome:
    records = _records(recipe)
    steps = {record.step: record for record in records if isinstance(record, StepRecord)}
    held_out = {record.step: record.loss for record in records if isinstance(record, EvalRecord)}
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


def _compare(outcome: Outcome, expected: Outcome, case: Case) -> None:
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


def _check_resumes(recipe: Recipe) -> None:
    """Every start of the run says what it loaded; the last one must not have lost the run."""
    events = [record for record in _records(recipe) if isinstance(record, EventRecord)]
    if any("could not" in event.message for event in events if event.name == "warning"):
        raise Broken(f"unexpected warnings: {[event.message for event in events]}")


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


def start_fork_server(folder: Path) -> None:
    """Starts the server that ranks are forked from, with the movable wall clock. Call it once, before the first run."""
    library = folder / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.rank", "megatron.core.datasets.gpt_dataset"])
    before = dict(os.environ)
    os.environ["LD_PRELOAD"] = " ".join([str(library), *before.get("LD_PRELOAD", "").split()])
    os.environ["PYTHONWARNINGS"] = "ignore"  # Megatron-Core names every optional package it does not find
    try:
        process = context.Process(target=_nothing)
        process.start()
        process.join()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _nothing() -> None:
    """The first process makes the server start."""
