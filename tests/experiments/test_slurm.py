"""A sweep as an array of a real Slurm: a warned task saves, is requeued and goes on; the summary comes last."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.experiments.test_sweep import command, steps_of, write_settings
from tests.slurm.cluster import SlurmCluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]
OURO = Path(sys.executable).with_name("ouro")


def logs(out: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()}" for log in sorted((out / "slurm").glob("*.log")))


def test_an_array_trains_the_cells_and_writes_the_summary(slurm: SlurmCluster, tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    values = yaml.safe_load(settings.read_text())
    values["recipe"]["budget"]["total"] = "200 steps"
    values["recipe"]["checkpoint"]["every"] = "1000 steps"  # only a stop saves before the end
    settings.write_text(yaml.safe_dump(values))
    out = tmp_path / "a sweep"
    options = ("--slurm", "--partition", "main", "--cpus-per-task", "1", "--time", "0:10:00", "--sbatch", "--nice=1")
    shown = slurm.run(*command(settings, out, *options, "--dry-run"), check=False, cwd=ROOT, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert not (out / "slurm" / "jobs.json").exists()
    assert "#SBATCH --array=0-1\n" in (out / "slurm" / "cells.sbatch").read_text()

    sent = slurm.run(*command(settings, out, *options), check=False, cwd=ROOT, timeout=120)
    assert sent.returncode == 0, sent.stderr
    array, last = json.loads((out / "slurm" / "jobs.json").read_text())["jobs"]
    again = slurm.run(*command(settings, out, *options), check=False, cwd=ROOT, timeout=120)
    assert again.returncode == 8 and "not over" in again.stderr
    first = (out / "slurm" / "cells.txt").read_text().split()[0]
    wait_until(lambda: len(steps_of(out, first)) > 2, 120, f"{first} trains\n{logs(out)}")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{array}_0")
    ended = slurm.wait(f"{array}_0", f"{array}_1", last, timeout=240)
    assert set(ended.values()) == {"COMPLETED"}, (ended, logs(out))
    for cell in (out / "slurm" / "cells.txt").read_text().split():
        assert steps_of(out, cell) == list(range(1, 201)), logs(out)
    assert "stopping after step" in logs(out) and "going on from step" in logs(out)
    assert json.loads((out / "summary.json").read_text())["missing_cells"] == 0
    nothing = slurm.run(*command(settings, out, *options), check=False, cwd=ROOT, timeout=120)
    assert nothing.returncode == 0 and "1⊗2" in nothing.stdout
