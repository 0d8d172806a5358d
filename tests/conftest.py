"""Fixtures that tests in several folders share."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.slurm.cluster import SlurmCluster, missing_programs

if not torch.cuda.is_available():
    # Triton's own functions are made when it is imported, for the interpreter or for a GPU, whoever imports it first.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end no worker is idle while another works them off."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm of two nodes with eight fake GPUs each, started once for all tests that ask for it.

    Submit with `slurm.submit(...)`, run other commands with `slurm.run(...)` or with `slurm.environment`.
    Tests that use it are skipped where Slurm is not installed (tests/slurm/install.sh).
    """
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing): run tests/slurm/install.sh as root")
    cluster = SlurmCluster()
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()
