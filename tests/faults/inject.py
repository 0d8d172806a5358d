"""Runs in a rank's process, before it begins to train: makes one thing go wrong at one place.

Training has no hooks for this. The places are the phases that `Position` tells anyhow, and functions that are wrapped
here from outside: Megatron's backward step, the checkpoint writer, renames and deletions.
"""

import ctypes
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from megatron.core.pipeline_parallel import schedules

import ouro_megatron.checkpoint.folder as folder_module
import ouro_megatron.checkpoint.writer as writer_module
import ouro_megatron.training.stage as stage_module
from ouro_megatron.parallel.position import Position
from ouro_megatron.recipe.schedule import BatchPoint
from ouro_megatron.training.data_stream import DataStream
from ouro_megatron.training.engine import Engine, Microbatch
from tests.faults.cases import Fault

_PHASES = {
    "reading data": "data",
    "forward and backward": "forward",
    "optimizer step": "optimizer",
    "evaluation": "evaluation",
    "choosing where to start": "start",
}
SLOW_SECONDS = 1.0


@dataclass
class Watch:
    """Counts the way to the fault's place; `pass_by` is called wherever the rank comes along."""

    fault: Fault
    rank: int
    fired: Path
    """Written when the fault happens: a case whose fault never came proves nothing."""
    act: Callable[[], None]
    step: int = 0
    done: bool = False

    def pass_by(self, place: str) -> None:
        if self.done or place != self.fault.place or self.rank != self.fault.rank or self.step < self._from():
            return
        self.done = True
        self.fired.touch()
        self.act()

    def _from(self) -> int:
        return 0 if self.fault.place in ("start", "load") else self.fault.step


def install(fault: Fault | None, fired: Path, data: Path, checkpoints: Path) -> None:
    """Prepares this process. `data`: the .bin file; `checkpoints`: where a full disk can be made."""
    if fault is None:
        return
    watch = Watch(fault, int(os.environ["RANK"]), fired, _action(fault, data, checkpoints))

    class Watched(Position):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "step":
                watch.step = value
            elif name == "phase":
                kind = "save begins" if value.startswith("saving") else "load" if value.startswith("loading") else ""
                watch.pass_by(_PHASES.get(value, kind))

    stage_module.Position = Watched  # type: ignore[misc]
    _wrap_backward(watch)
    _wrap_files(watch)


def _wrap_backward(watch: Watch) -> None:
    backward = schedules.backward_step

    def observed(*args: Any, **kwargs: Any) -> Any:
        watch.pass_by("backward")
        return backward(*args, **kwargs)

    schedules.backward_step = observed


def _wrap_files(watch: Watch) -> None:
    write, hash_of = writer_module.RankFiles._write_file, writer_module.hash_of
    replace, rmtree = Path.replace, shutil.rmtree

    def write_file(self: Any, transforms: list[Any], index: int, bucket: Any) -> list[Any]:
        if watch.fault.place == "half-written file":
            Path(bucket[0]).write_bytes(b"half a file")
            watch.pass_by("half-written file")
        return write(self, transforms, index, bucket)

    def hash_file(path: Path) -> str:
        watch.pass_by("file written")
        return hash_of(path)

    def rename(self: Path, target: Any) -> Path:
        name = Path(target).name
        before = {folder_module.STATE: "before state", folder_module.MARKER: "before marker"}.get(name)
        if before:
            watch.pass_by(before)
        result = replace(self, target)
        if name == folder_module.MARKER:
            watch.pass_by("after marker")
        return result

    def delete(path: Any, *args: Any, **kwargs: Any) -> None:
        if folder_module.step_of(Path(path)) is not None:
            watch.pass_by("deletion of an old checkpoint")
        rmtree(path, *args, **kwargs)

    writer_module.RankFiles._write_file = write_file  # type: ignore[method-assign]
    writer_module.hash_of = hash_file
    Path.replace = rename  # type: ignore[method-assign, assignment]
    folder_module.shutil.rmtree = delete  # type: ignore[assignment]


def _action(fault: Fault, data: Path, checkpoints: Path) -> Callable[[], None]:
    pid = os.getpid()
    actions: dict[str, Callable[[], None]] = {
        "kill": lambda: os.kill(pid, signal.SIGKILL),
        "corrupt checkpoint": lambda: os.kill(pid, signal.SIGKILL),
        "term": lambda: _terminate(fault.detail == "all ranks"),
        "disk full": lambda: _fill(checkpoints),
        "corrupt data": lambda: _overwrite(data),
        "clock": lambda: ctypes.CDLL(None).ouro_move_wall_clock(ctypes.c_long(int(fault.detail))),
        "wandb gone": _kill_wandb,
        "slow rank": lambda: _freeze(SLOW_SECONDS),
        "frozen rank": lambda: _freeze(None),
    }
    return actions[fault.kind]


def _terminate(everyone: bool) -> None:
    """TERM to this rank, or to all ranks as Slurm sends it."""
    here = psutil.Process()
    server = here.parent()  # has forked the ranks and nothing else
    for process in server.children() if everyone and server else [here]:
        process.send_signal(signal.SIGTERM)


def _overwrite(path: Path) -> None:
    """In place: the ranks have it mapped, and its length stays."""
    with path.open("r+b", buffering=0) as file:
        file.write(b"\xff" * path.stat().st_size)


def _fill(folder: Path) -> None:
    """Writes until the file system that holds `folder` is full."""
    block = b"\0" * 65536
    with (folder / "filler").open("wb", buffering=0) as file:
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


def _kill_wandb() -> None:
    for child in psutil.Process().children(recursive=True):
        if "wandb" in " ".join(child.cmdline()):
            child.kill()


def _freeze(seconds: float | None) -> None:
    pid = os.getpid()
    if seconds is not None:
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {pid}"])
    os.kill(pid, signal.SIGSTOP)


def spoil_data(kind: str, bad_sample: int) -> None:
    """Steps that read sample `bad_sample` or one of the 7 after it are "not finite" or have a "spike" in their loss.

    It goes with the data, not with the step: after a rollback that leaves those samples out, it is gone.
    """
    bad = set(range(bad_sample, bad_sample + 8))
    step, accumulate = DataStream.step, Engine.accumulate
    spoiled = [False]

    def observed(self: DataStream, before: BatchPoint) -> list[Microbatch]:
        first = self.position(before.consumed_samples)
        spoiled[0] = bool(bad & set(range(first, first + before.samples)))
        return step(self, before)

    def poisoned(self: Engine, batches: list[Microbatch]) -> Any:
        means = accumulate(self, batches)
        if not spoiled[0]:
            return means
        loss = math.nan if kind == "not finite" else means.loss + 30.0
        return type(means)(loss, *list(vars(means).values())[1:])

    DataStream.step = observed  # type: ignore[method-assign]
    Engine.accumulate = poisoned  # type: ignore[method-assign]
