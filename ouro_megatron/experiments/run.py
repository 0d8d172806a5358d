"""One cell from its recipe to its result: trained by the trainer, measured by the evaluation."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ouro_megatron.errors import STOPPED_EXIT_CODE
from ouro_megatron.experiments.cells import Cell
from ouro_megatron.experiments.measure import measure
from ouro_megatron.experiments.plan import Sweep
from ouro_megatron.planning.flops import parameter_counts
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.validate import check_recipe, ranks_needed
from ouro_megatron.training.launch import is_finished, train
from ouro_megatron.training.signals import StopSignals
from ouro_megatron.training.stage import run_stage


def run_cell(sweep: Sweep, cell: Cell, signals: StopSignals, nproc: int | None = None) -> bool:
    """Trains and measures a cell, going on from its last checkpoint; False when a stop signal came first.

    A cell of one rank trains in this process, so that a sweep of small ones does not import everything for each; one
    of several ranks is launched as `ouro train` does it. Raises an OuroError for what a user can act on.
    """
    corpus, recipe = sweep.prepare(cell), sweep.recipe(cell)
    ranks = nproc or ranks_needed(recipe)
    check_recipe(recipe, ranks)
    started = time.perf_counter()
    if ranks > 1:
        if train(recipe, ranks) == STOPPED_EXIT_CODE:
            return False
    elif not is_finished(recipe):
        with _alone():
            if not run_stage(recipe, signals):
                return False
    with _alone():
        numbers = measure(sweep.settings.measure, recipe, corpus, _device(recipe.training.device))
    plan = BatchPlan(recipe)
    sweep.finish(
        cell,
        {
            "cell": cell.name,
            "group": cell.group,
            "seed": cell.seed,
            "parameters": parameter_counts(recipe.model).total,
            "layer_parameters": parameter_counts(recipe.model).layers,
            "steps": plan.total_steps,
            "tokens": plan.total_tokens,
            "seconds": time.perf_counter() - started,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "metrics": numbers,
        },
    )
    return True


@contextmanager
def _alone() -> Iterator[None]:
    """Hides the variables by which torchrun or Slurm would make this process a rank of a larger job."""
    hidden = {
        name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name in os.environ
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
