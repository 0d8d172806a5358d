"""`ouro train` as users and clusters run it: real processes and signals, exit codes, torchrun, srun's variables."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ouro_megatron.checkpoint.folder import resolve
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import StepRecord
from tests.distributed.ranks import free_port
from tests.tiny import tiny_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
OURO = Path(sys.executable).with_name("ouro")
ENDLESS: dict[str, Any] = {"budget": {"total": "5000 steps"}, "checkpoint": {"every": "1000 steps"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch") / "with space"


def recipe_file(folder: Path, name: str, **sections: Any) -> Path:
    recipe = tiny_recipe(folder, name=name, **sections)
    file = folder / f"{name}.yaml"
    file.write_text(dump_recipe(recipe))
    return file


@contextmanager
def started(*command: object, **environment: str) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_steps(folder: Path, name: str, process: subprocess.Popen, steps: int = 3) -> None:
    """Returns once the run has written `steps` step records."""
    path = folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.stdout.read() if process.stdout else ''}")
        if path.exists() and sum(isinstance(r, StepRecord) for r in read_records(path)) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("no steps within 90 seconds")


def done_steps(folder: Path, name: str) -> list[int]:
    records = read_records(folder / "runs" / name / "metrics.jsonl")
    return [record.step for record in records if isinstance(record, StepRecord)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stop_signal_saves_and_leaves_with_75(folder: Path, number: signal.Signals) -> None:
    name = f"stop-{number.name}"
    file = recipe_file(folder, name, parallel={"tensor": 2}, **ENDLESS)
    with started(OURO, "train", file) as process:
        wait_for_steps(folder, name, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert number.name in output
    saved = int(resolve(folder / "runs" / name).folder.name[-8:])
    assert saved == done_steps(folder, name)[-1] >= 3


def test_a_second_ctrl_c_ends_at_once(folder: Path) -> None:
    file = recipe_file(folder, "impatient", parallel={"tensor": 2}, **ENDLESS)
    with started(OURO, "train", file) as process:
        wait_for_steps(folder, "impatient", process)
        stopped = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1")
        stopped.suspend()  # so that the first one cannot be obeyed
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    assert "interrupted twice" in output


def test_goes_on_after_a_stop_and_knows_when_it_is_finished(folder: Path) -> None:
    file = recipe_file(folder, "again", **ENDLESS)
    with started(OURO, "train", file) as process:
        wait_for_steps(folder, "again", process)
        process.terminate()
        process.communicate(timeout=60)
    stopped = done_steps(folder, "again")[-1]
    total = stopped + 2
    for expected in (f"going on from step {stopped}", "is finished"):
        with started(OURO, "train", file, f"budget.total={total} steps") as process:
            output, _ = process.communicate(timeout=90)
        assert process.returncode == 0, output
        assert expected in output
    assert done_steps(folder, "again") == list(range(1, total + 1))


def test_kill_minus_nine_of_everything_loses_only_the_steps_since_the_last_save(folder: Path) -> None:
    sections: dict[str, Any] = {"budget": {"total": "20 steps"}, "checkpoint": {"every": "5 steps"}}
    straight = recipe_file(folder, "straight", **sections)
    with started(OURO, "train", straight) as process:
        assert process.communicate(timeout=90) and process.returncode == 0
    file = recipe_file(folder, "killed", **sections)
    with started(OURO, "train", file) as process:
        wait_for_steps(folder, "killed", process, 12)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "ranks outlived their launcher"
    with started(OURO, "train", file) as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    curves = [
        [r.loss for r in read_records(folder / "runs" / name / "metrics.jsonl") if isinstance(r, StepRecord)]
        for name in ("straight", "killed")
    ]
    assert curves[0] == curves[1]


def test_a_rank_that_dies_is_named(folder: Path) -> None:
    file = recipe_file(folder, "dead-rank", parallel={"tensor": 2, "pipeline": 2}, **ENDLESS)
    with started(OURO, "train", file) as process:
        wait_for_steps(folder, "dead-rank", process)
        ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "2"]
        began = time.monotonic()
        ranks[0].kill()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 5, output
    assert "rank 2 was ended by SIGKILL" in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 45


def test_a_rank_that_hangs_ends_the_run_within_the_timeout(folder: Path) -> None:
    parallel = {"pipeline": 2, "timeout_seconds": 5}
    file = recipe_file(folder, "hang", parallel=parallel, **ENDLESS)
    with started(OURO, "train", file) as process:
        wait_for_steps(folder, "hang", process)
        stopped = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1")
        stopped.suspend()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 5, output
    for words in ("rank 0 (tensor 0, pipeline 0, data 0)", "stage hang, step"):
        assert words in output, output


def test_an_expected_error_is_one_message(folder: Path) -> None:
    file = recipe_file(folder, "no-data", parallel={"data": 2})
    with started(OURO, "train", file, "data.train=[{path: /nowhere/x, weight: 1}]") as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 3, output
    assert output.count("/nowhere/x.idx") == 1
    assert "Traceback" not in output


def test_a_bad_recipe_starts_nothing(folder: Path) -> None:
    file = recipe_file(folder, "bad")
    with started(OURO, "train", file, "model.heads=3") as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "model.heads=3" in output
    assert not (folder / "runs" / "bad").exists()


def test_under_torchrun(folder: Path) -> None:
    file = recipe_file(folder, "torchrun", budget={"total": "5 steps"}, parallel={"pipeline": 2})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    with started(*torchrun, "--no-python", OURO, "train", file) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert done_steps(folder, "torchrun") == [1, 2, 3, 4, 5]


def test_with_the_variables_of_srun(folder: Path) -> None:
    file = recipe_file(folder, "srun", budget={"total": "5 steps"}, parallel={"data": 2})
    port = str(free_port())
    with two_tasks(file, port) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert done_steps(folder, "srun") == [1, 2, 3, 4, 5]


@contextmanager
def two_tasks(file: Path, port: str) -> Iterator[list[subprocess.Popen]]:
    """Two tasks as srun would start them."""
    common = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with (
        started(OURO, "train", file, **common, SLURM_PROCID="0", SLURM_LOCALID="0") as first,
        started(OURO, "train", file, **common, SLURM_PROCID="1", SLURM_LOCALID="1") as second,
    ):
        yield [first, second]
