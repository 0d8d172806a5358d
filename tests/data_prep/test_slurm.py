"""Data preparation as jobs of a real Slurm of two nodes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from data_prep.slurm import _ranges
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
OURO = Path(sys.executable).with_name("ouro")


def text(number: int) -> str:
    return f"Document {number}: " + " ".join(f"word{(number * 7 + i) % 50}" for i in range(40)) + ".\n"


def write_raw(folder: Path) -> None:
    folder.mkdir(parents=True)
    for shard in range(6):
        lines = "".join(json.dumps({"text": text(shard * 20 + i)}) + "\n" for i in range(20))
        (folder / f"{shard}.jsonl").write_text(lines)


def write_recipe(root: Path, name: str, *, keep_parts: bool) -> Path:
    values = {
        "output": str(root / name),
        "tokenizer": {"kind": "train", "vocab": 320},
        "validation_fraction": 0.1,
        "shard_bytes": 5000,
        "keep_parts": keep_parts,
        "filters": {"exact_dedup": True},
        "sources": [{"name": "web", "kind": "jsonl", "path": str(root / "raw")}],
    }
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def ouro(slurm: SlurmCluster, *words: str) -> subprocess.CompletedProcess[str]:
    return slurm.run(str(OURO), "data", *words, check=False, cwd=ROOT, timeout=120)


def jobs_of(output: Path) -> dict[str, str]:
    return json.loads((output / "slurm" / "jobs.json").read_text())["jobs"]


def pairs(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(output.glob("web*.[bi][id][nx]"))}


def logs(output: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()}" for log in sorted((output / "slurm").glob("*.log")))


def test_array_does_what_is_missing_and_equals_one_machine(slurm: SlurmCluster, tmp_path: Path) -> None:
    root = tmp_path / "with a space"
    write_raw(root / "raw")
    recipe, output = write_recipe(root, "cluster", keep_parts=True), root / "cluster"
    options = ("--slurm", "--array-tasks", "3", "--cpus-per-task", "2", "--partition", "main", "--sbatch", "--nice=1")
    shown = ouro(slurm, "prepare", str(recipe), *options, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    scripts = output / "slurm"
    assert sorted(file.name for file in scripts.glob("*.sbatch")) == [
        "merge.sbatch",
        "tokenise.sbatch",
        "tokenizer.sbatch",
    ]
    assert not (scripts / "jobs.json").exists()

    # By hand, the tokenizer and share 1 of 3; that share is then not submitted any more.
    trained = slurm.submit(str(scripts / "tokenizer.sbatch"))
    share = slurm.submit(f"--dependency=afterok:{trained}", "--array=1", str(scripts / "tokenise.sbatch"))
    assert slurm.wait(trained, share, timeout=240)[str(share)] == "COMPLETED", logs(output)
    before = {file: file.stat().st_mtime_ns for file in output.glob(".parts/web/*/*")}
    assert before
    submitted = ouro(slurm, "prepare", str(recipe), *options)
    assert submitted.returncode == 0, submitted.stderr
    assert list(jobs_of(output)) == ["tokenise", "merge"]
    assert "#SBATCH --array=0,2\n" in (scripts / "tokenise.sbatch").read_text()
    again = ouro(slurm, "prepare", str(recipe), *options)
    assert again.returncode == 3 and "not over" in again.stderr
    assert set(slurm.wait(*jobs_of(output).values(), timeout=240).values()) == {"COMPLETED"}, logs(output)
    assert {file: file.stat().st_mtime_ns for file in before} == before

    alone = write_recipe(root, "alone", keep_parts=False)
    shutil.copytree(output / "tokenizer", root / "alone" / "tokenizer")
    done = ouro(slurm, "prepare", str(alone), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert pairs(root / "alone") == pairs(output) and len(pairs(output)) == 4
    assert "nothing to submit" in ouro(slurm, "prepare", str(recipe), *options).stdout


def test_ranges_of_an_array() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
