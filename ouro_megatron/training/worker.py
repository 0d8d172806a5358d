"""One rank as a process: `python -m ouro_megatron.training.worker RECIPE`, started by `ouro train`, torchrun or srun.

Nothing heavy is imported before the stop signals are in place: a TERM during start-up must not be lost.
"""

import os
import sys
import warnings
from pathlib import Path

from ouro_megatron.errors import STOPPED_EXIT_CODE, OuroError, TrainingError
from ouro_megatron.parallel.leaving import die_with_parent, leave
from ouro_megatron.training.failure import FAILURE_FOLDER, report
from ouro_megatron.training.signals import StopSignals


def adopt_slurm_environment() -> None:
    """Under srun, sets torch's variables from Slurm's. Raises OuroError when the master is unknown."""
    environment = os.environ
    if "RANK" in environment or "SLURM_PROCID" not in environment or environment.get("SLURM_NTASKS", "1") == "1":
        return
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise OuroError(
            "started by srun with several tasks, but MASTER_ADDR and MASTER_PORT are not set; export them in the batch "
            "script: MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1) MASTER_PORT=29500"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]


def run_worker(recipe_file: Path, signals: StopSignals | None = None) -> int:
    """Trains the stage in `recipe_file` as the rank the environment names; returns the exit code.

    `signals`: those that the caller installed already, early in its own start.
    """
    if signals is None:
        signals = StopSignals()
        signals.install()
    if FAILURE_FOLDER in os.environ:
        die_with_parent()
    try:
        adopt_slurm_environment()
        # Megatron-Core warns once per absent optional package and rank; torch about calls that Megatron makes.
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        # torch prints a C++ stack for each connection that breaks when a rank is gone; who it was is said once.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from ouro_megatron.recipe.load import recipe_from_text
        from ouro_megatron.training.stage import run_stage

        recipe = recipe_from_text(recipe_file.read_text(encoding="utf-8"), str(recipe_file))
        return 0 if run_stage(recipe, signals) else STOPPED_EXIT_CODE
    except Exception as error:
        if not (isinstance(error, TrainingError) and error.reported):
            report(error)
        return error.exit_code if isinstance(error, OuroError) else 1


if __name__ == "__main__":
    leave(run_worker(Path(sys.argv[1])))
