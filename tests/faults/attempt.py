"""One launch of a run, with at most one fault, watched so that it cannot hang."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ouro_megatron.errors import STOPPED_EXIT_CODE, OuroError
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schema import Recipe
from tests.faults.cases import RANKS, Case, Fault
from tests.faults.forked import ForkedRanks
from tests.faults.outcome import Broken, last_step

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


def attempt(recipe: Recipe, place: Path, case: Case, fault: Fault | None) -> tuple[int, str]:
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
        while last_step(recipe) < fault.step and process.poll() is None:
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


def check_message(fault: Fault, message: str) -> None:
    wanted = {
        "kill": f"rank {fault.rank} was ended by SIGKILL",
        "corrupt checkpoint": f"rank {fault.rank} was ended by SIGKILL",
        "disk full": "No space left on device",
        "corrupt data": "has been damaged",
        "frozen rank": "",
    }.get(fault.kind, "")
    if wanted not in message:
        raise Broken(f"{fault.kind}: the message does not say {wanted!r}: {message}")
