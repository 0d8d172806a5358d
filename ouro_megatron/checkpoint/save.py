"""Saves a run so that an interruption at any moment leaves either a whole checkpoint or none."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.folder import mark_complete, remove, step_folder
from ouro_megatron.checkpoint.state import RunState, write_state
from ouro_megatron.checkpoint.tensors import to_save
from ouro_megatron.checkpoint.writer import RankFiles
from ouro_megatron.data.ranks import on_rank_zero
from ouro_megatron.errors import CheckpointError
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.parallel.platform import write_checkpoints_without_helpers
from ouro_megatron.parallel.position import Position
from ouro_megatron.training.engine import Engine

_FULL = 2**20
"""Bytes: a file system with less than this is what made a write fail."""


def save(engine: Engine, root: Path, state: RunState) -> Path:
    """Writes root/step-N and returns it. All ranks call it together.

    Raises CheckpointError naming the file on every rank when one could not write. What is left has no marker and is
    removed by the next start.
    """
    return begin_save(engine, root, state, background=False).commit()


class PendingSave:
    """A checkpoint whose tensors are copied and whose files are being written; it counts once `commit` has returned."""

    def __init__(
        self,
        context: ParallelContext,
        position: Position,
        folder: Path,
        state: RunState,
        files: RankFiles,
        *,
        in_background: bool,
    ) -> None:
        self.folder = folder
        self.in_background = in_background
        self.step = state.step
        self._context = context
        self._position = position
        self._state = state
        self._files = files
        self._began = time.perf_counter()

    def is_ready(self) -> bool:
        """Whether `commit` would not wait: every rank has written its files, or one has failed. All ranks call it."""
        pending, failed = int(not self._files.is_written), 2 * int(self._files.has_failed)
        return self._context.agree(max(pending, failed)) != 1

    @property
    def seconds(self) -> float:
        """Since the copy to host memory was made."""
        return time.perf_counter() - self._began

    def commit(self) -> Path:
        """Waits for the files, then makes them count: index, state, hashes, marker last. All ranks call it together."""
        self._position.phase = f"saving {self.folder.name}"
        with _naming(self._context, self.folder):
            self._files.wait()
            self._files.finish()
            hashes = self._gather_hashes()
            on_rank_zero(lambda: self._mark(hashes))
        return self.folder

    def _gather_hashes(self) -> dict[str, str]:
        """All ranks' hashes on rank 0."""
        if self._context.world_size == 1:
            return self._files.hashes
        found: list[dict[str, str]] = [{}] * self._context.world_size
        dist.all_gather_object(found, self._files.hashes)
        return {name: value for part in found for name, value in part.items()}

    def _mark(self, hashes: dict[str, str]) -> None:
        try:
            write_state(self.folder, self._state)
            mark_complete(self.folder, hashes)
        except OSError as error:
            raise CheckpointError(_message("rank 0", self.folder, _with_space(str(error), self.folder))) from error


def begin_save(engine: Engine, root: Path, state: RunState, *, background: bool) -> PendingSave:
    """Copies the run's tensors to host memory and starts to write root/step-N. All ranks call it together.

    With `background` the files are written by a thread while training goes on; until then the host holds a copy of this
    rank's fp32 weights and both moments. Raises CheckpointError as `save` does.
    """
    context, folder = engine.context, step_folder(root, state.step)
    engine.position.phase = f"saving {folder.name}"
    tensors = to_save(engine)
    write_checkpoints_without_helpers()
    with _naming(context, folder):
        on_rank_zero(lambda: _make_room(folder))
        files = RankFiles(_plan(tensors, folder))
        pending = PendingSave(context, engine.position, folder, state, files, in_background=background)
        if background:
            files.write_in_background()
        else:
            files.write()
    return pending


def _make_room(folder: Path) -> None:
    try:
        if folder.exists():
            remove(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(_message("rank 0", folder, _with_space(str(error), folder))) from error


def _plan(tensors: ShardedStateDict, folder: Path) -> dist_checkpointing.serialization.AsyncRequest:
    request = dist_checkpointing.save(tensors, str(folder), async_sharded_save=True)
    assert request is not None
    return request


@contextmanager
def _naming(context: ParallelContext, folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            _message(context.describe_rank(), folder, _with_space(describe(error), folder))
        ) from error


def _with_space(why: str, folder: Path) -> str:
    """torch's own writer says "iostream error" when the disk is full."""
    try:
        free = shutil.disk_usage(folder.parent).free
    except OSError:
        return why
    return why if free > _FULL or "No space left" in why else f"{why} (No space left on device: {free} bytes are free)"


def _message(who: str, folder: Path, why: str) -> str:
    return (
        f"{who} could not save {folder}: {why}. "
        "Earlier checkpoints are untouched; remove the cause (a full disk?) and start the run again"
    )


def describe(error: BaseException) -> str:
    """The innermost cause in one line: torch wraps what went wrong in layers of its own."""
    if isinstance(error, CheckpointException):  # no Exception, and its causes are kept by rank
        failures = [f"rank {rank}: {describe(wrapped[0])}" for rank, wrapped in error.failures.items()]
        return failures[0] if failures else "another rank failed"
    while True:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        # An OSError that names its file is worth more than the bare one inside it.
        if cause is None or (isinstance(error, OSError) and error.errno is None and error.args):
            break
        error = cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
