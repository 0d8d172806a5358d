"""The mean of several checkpoints of one run: the last k of a stage, usually better than its last alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.folder import problem_with, resolve, step_folders
from ouro_megatron.checkpoint.save import describe
from ouro_megatron.checkpoint.state import RunState, StageRecord, check_same_model, history_with, read_state
from ouro_megatron.checkpoint.verify import check_contents
from ouro_megatron.checkpoint.write import write_plain
from ouro_megatron.errors import CheckpointError
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ParallelSection


def last_checkpoints(run: Path, last: int) -> list[Path]:
    """The newest `last` complete checkpoints of a run folder, oldest first. Raises CheckpointError for fewer."""
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    complete = [folder for folder in step_folders(root) if problem_with(folder) is None]
    if len(complete) < last:
        raise CheckpointError(
            f"{root} holds {len(complete)} complete checkpoints, {last} are to be averaged; checkpoint.keep_last says "
            "how many a run keeps"
        )
    return complete[-last:]


def average(source: Path | Sequence[Path], target: Path, last: int | None = None) -> list[Path]:
    """Writes the mean of the weights of several checkpoints to `target`; returns the checkpoints.

    `source`: a run folder, of which the newest `last` are taken, or checkpoints by name. The mean is formed in fp64 and
    rounded to fp32 once; besides it one tensor of the model is in memory. Optimizer state is not averaged: a stage that
    starts from the result starts its optimizer afresh. One process. Raises CheckpointError when the checkpoints are not
    of the same model, too few, or `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another --out")
    if isinstance(source, Path):
        chosen = last_checkpoints(source, last or 2)
    else:
        chosen = [resolve(path).folder for path in source]
    if len(chosen) < 2:
        raise CheckpointError("averaging takes at least two checkpoints: name a run folder with --last, or several")
    for folder in chosen:
        check_contents(folder)
    states = [read_state(folder) for folder in chosen]
    for folder, state in zip(chosen[1:], states[1:], strict=True):
        check_same_model(state.recipe, states[0].recipe, folder)
    write_plain(_mean(chosen), _new_state(states, chosen), target)
    return chosen


def _mean(folders: Sequence[Path]) -> dict[str, Tensor]:
    """One tensor at a time."""
    stored = [_weights_of(folder) for folder in folders]
    for folder, found in zip(folders[1:], stored[1:], strict=True):
        if set(found) != set(stored[0]):
            raise CheckpointError(f"{folder} holds other tensors than {folders[0]}")
    result = {}
    for name in stored[0]:
        total: np.ndarray | float = 0.0
        for folder, found in zip(folders, stored, strict=True):
            total = total + _read(folder, name, found[name]).numpy().astype(np.float64)
        result[name] = torch.from_numpy((total / len(folders)).astype(np.float32))  # type: ignore[union-attr]
    return result


def _weights_of(folder: Path) -> dict[str, Any]:
    """Where each weight lies in the checkpoint."""
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder} cannot be read: {describe(error)}") from error
    return {name: where for name, where in stored.items() if name.startswith("weight.")}


def _read(folder: Path, name: str, where: Any) -> Tensor:
    try:
        # A copy: loading keeps the tensor in what it is given.
        return dist_checkpointing.load({name: replace(where)}, str(folder), validate_access_integrity=False)[name]
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder}: {name} cannot be read: {describe(error)}") from error


def _new_state(states: Sequence[RunState], folders: Sequence[Path]) -> RunState:
    last = states[-1]
    steps = ", ".join(str(state.step) for state in states)
    record = StageRecord(
        f"mean of {len(states)} checkpoints", "average", 0, 0, f"steps {steps} of {last.recipe['name']}, weights only"
    )
    return replace(
        last,
        step=0,
        tokens=0,
        samples=0,
        first_sample=last.next_sample,
        optimizer_steps=0,
        skipped_steps=0,
        seconds=0.0,
        health={},
        pending_evaluation=False,
        history=[*history_with(last, folders[-1]), record],
        origin="average",
    )


def average_files(sources: Sequence[Path], target: Path, last: int | None) -> list[Path]:
    """`average` in a context of its own: one run folder with `last`, or several checkpoints. Raises CheckpointError."""
    if len(sources) == 1 and last is None:
        raise CheckpointError(f"{sources[0]} is one folder: say how many of its checkpoints to average with --last")
    if len(sources) > 1 and last is not None:
        raise CheckpointError("--last is for one run folder; several checkpoints are averaged as they are named")
    context = create_context(ParallelSection(), "cpu")
    try:
        return average(sources[0] if len(sources) == 1 else sources, target, last)
    finally:
        context.close()
