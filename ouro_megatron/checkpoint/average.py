"""The mean of several checkpoints of one run: the last k of a stage, usually better than its last alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.folder import problem_with, resolve, step_folders
from ouro_megatron.checkpoint.save import describe
from ouro_megatron.checkpoint.state import RunState, StageRecord, check_same_model, history_with, read_state
from ouro_megatron.checkpoint.write import write_plain
from ouro_megatron.errors import CheckpointError


def last_checkpoints(run: Path, last: int) -> list[Path]:
    """The newest `last` complete checkpoints of a run folder, oldest first. Raises CheckpointError when it has fewer."""
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
    states = [read_state(folder) for folder in chosen]
    for folder, state in zip(chosen[1:], states[1:], strict=True):
        check_same_model(state.recipe, states[0].recipe, folder)
    write_plain(_mean(chosen), _new_state(states, chosen), target)
    return chosen


def _mean(folders: Sequence[Path]) -> dict[str, Tensor]:
    total: dict[str, np.ndarray] = {}
    for folder in folders:
        try:
            tensors = dist_checkpointing.load_plain_tensors(str(folder))
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{folder} cannot be read: {describe(error)}") from error
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
        if total and set(total) != set(weights):
            raise CheckpointError(f"{folder} holds other tensors than {folders[0]}")
        for name, tensor in weights.items():
            wide = tensor.numpy().astype(np.float64)
            total[name] = wide if name not in total else total[name] + wide
    return {name: torch.from_numpy((value / len(folders)).astype(np.float32)) for name, value in total.items()}


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
        first_sample=last.first_sample + last.samples,
        optimizer_steps=0,
        skipped_steps=0,
        seconds=0.0,
        history=[*history_with(last, folders[-1]), record],
        origin="average",
    )
