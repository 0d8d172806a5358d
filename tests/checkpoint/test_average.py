"""The mean of checkpoints, exact against numpy; the lineage that `ouro checkpoint show` prints."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ouro_megatron.checkpoint.average import average_files
from ouro_megatron.checkpoint.folder import problem_with, step_folders
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.errors import CheckpointError
from ouro_megatron.recipe.schema import Recipe
from tests.checkpoint.test_upcycle import read
from tests.training.test_resume import losses, train

pytestmark = pytest.mark.distributed
OURO = Path(sys.executable).with_name("ouro")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run with checkpoints of steps 2, 4 and 6, saved at TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("average")
    return train(
        folder,
        "tp2pp2",
        name="run",
        budget={"total": "6 steps"},
        checkpoint={"every": "2 steps", "keep_last": 3},
        evaluation={"batches": 1},
    )


@pytest.fixture(scope="module")
def mean(run: Recipe) -> Path:
    target = run.run_folder.parent / "mean"
    average_files([run.run_folder], target, 3)
    return target


def test_the_mean_is_numpys_to_the_last_bit(run: Recipe, mean: Path) -> None:
    assert problem_with(mean) is None
    parts = [read(folder) for folder in step_folders(run.run_folder / "checkpoints")]
    assert len(parts) == 3
    found = read(mean)
    weights = {name for name in parts[0] if name.startswith("weight.")}
    assert set(found) == weights, "weights only"
    for name in weights:
        expected = np.mean([part[name].astype(np.float64) for part in parts], axis=0).astype(np.float32)
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], expected), name
        assert name.endswith(".bias") or not np.array_equal(found[name], parts[-1][name]), name


def test_the_lineage_names_what_was_averaged_and_a_stage_starts_from_it(run: Recipe, mean: Path) -> None:
    state = read_state(mean)
    assert (state.step, state.first_sample, state.origin) == (0, 48, "average")
    assert [record.kind for record in state.history] == ["training", "average"]
    assert "steps 2, 4, 6 of run" in state.history[1].detail
    after = train(run.run_dir.parent, "1x1", name="after", init={"checkpoint": str(mean)}, budget={"total": "4 steps"})
    assert losses(after)[0] < losses(run)[0]


def test_show_prints_the_lineage(run: Recipe, mean: Path) -> None:
    done = subprocess.run([str(OURO), "checkpoint", "show", str(mean)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ("mean of 3 checkpoints", "4 x 3", "1.54k", "1: run: new weights; train 100%", "steps 2, 4, 6"):
        assert words in done.stdout, done.stdout
    done = subprocess.run(
        [str(OURO), "checkpoint", "show", str(run.run_folder)], capture_output=True, text=True, timeout=60
    )
    assert "step 6 of run: 1.54k tokens of this stage" in done.stdout


def test_what_cannot_be_averaged(run: Recipe, mean: Path, tmp_path: Path) -> None:
    other = train(run.run_dir.parent, "1x1", name="other", model={"layers": 2}, budget={"total": "4 steps"})
    for sources, last, message in (
        ([run.run_folder], 4, "holds 3 complete checkpoints, 4 are to be averaged"),
        ([run.run_folder], None, "with --last"),
        ([run.run_folder, other.run_folder], None, "model.layers"),
        ([run.run_folder, mean], 2, "--last is for one run folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            average_files(sources, tmp_path / "mean", last)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"
    with pytest.raises(CheckpointError, match="exists already"):
        average_files([run.run_folder], mean, 2)
