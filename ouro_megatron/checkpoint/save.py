"""Saves a run so that an interruption at any moment leaves either a whole checkpoint or none."""

from pathlib import Path

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.folder import mark_complete, remove, step_folder
from ouro_megatron.checkpoint.state import RunState, write_state
from ouro_megatron.checkpoint.tensors import to_save
from ouro_megatron.errors import CheckpointError
from ouro_megatron.parallel.platform import write_checkpoints_without_helpers
from ouro_megatron.training.engine import Engine


def save(engine: Engine, root: Path, state: RunState) -> Path:
    """Writes root/step-N and returns it. All ranks call it together.

    A rank that cannot write raises CheckpointError naming the folder; its process must then end, as the others wait for
    it. What it leaves has no marker and is removed by the next start.
    """
    context = engine.context
    folder = step_folder(root, state.step)
    engine.position.phase = f"saving {folder.name}"
    tensors = to_save(engine)
    write_checkpoints_without_helpers()
    try:
        if context.rank == 0:
            if folder.exists():
                remove(folder)
            folder.mkdir(parents=True)
        context.barrier()
        dist_checkpointing.save(tensors, str(folder))
        if context.rank == 0:
            write_state(folder, state)
            mark_complete(folder)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"{context.describe_rank()} could not save {folder}: {describe(error)}. "
            "Earlier checkpoints are untouched; remove the cause (a full disk?) and start the run again"
        ) from error
    context.barrier()
    return folder


def describe(error: BaseException) -> str:
    """The innermost cause in one line: torch wraps what went wrong in layers of its own."""
    if isinstance(error, CheckpointException):  # no Exception, and its causes are kept by rank
        failures = [f"rank {rank}: {describe(wrapped[0])}" for rank, wrapped in error.failures.items()]
        return failures[0] if failures else "another rank failed"
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
