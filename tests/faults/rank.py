"""The main function of a forked rank: the worker of `ouro train`, with a fault built in."""

import os
import sys
import warnings
from pathlib import Path

import torch

import ouro_megatron.training.stage  # noqa: F401  so that the fork server has it
from ouro_megatron.training.worker import run_worker
from tests.faults.cases import Fault
from tests.faults.inject import install, spoil_data


def rank_main(
    environment: dict[str, str],
    log: str,
    recipe_file: str,
    fault: Fault | None,
    fired: str,
    data: str,
    bad_data: str,
    bad_sample: int,
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    install(fault, Path(fired), Path(data), Path(recipe_file).parent / "runs" / "run" / "checkpoints")
    if bad_data:
        spoil_data(bad_data, bad_sample)
    status = run_worker(Path(recipe_file))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
