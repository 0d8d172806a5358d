"""The test cluster itself: two nodes, fake GPUs, dependencies, signals, a node that dies."""

from pathlib import Path

from tests.slurm.cluster import SlurmCluster, wait_until


def script(folder: Path, name: str, *lines: str) -> str:
    file = folder / name
    file.write_text("\n".join(["#!/bin/bash", f"#SBATCH --output={folder}/{name}.log", *lines, ""]))
    return str(file)


def test_srun_over_two_nodes_sees_ranks_and_gpus(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = slurm.submit(
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=8",
        script(tmp_path, "ranks", "srun bash -c 'echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME'"),
    )
    assert slurm.wait(job) == {str(job): "COMPLETED"}
    lines = sorted(line for line in (tmp_path / "ranks.log").read_text().splitlines() if line[:1].isdigit())
    assert lines == ["0 0 node1", "1 1 node1", "2 0 node2", "3 1 node2"]


def test_a_node_that_dies_requeues_its_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    body = 'echo start $SLURM_RESTART_COUNT; [ -n "${SLURM_RESTART_COUNT:-}" ] || srun sleep 300'
    job = slurm.submit("--nodes=2", "--requeue", "--open-mode=append", script(tmp_path, "dies", body))
    log = tmp_path / "dies.log"
    wait_until(lambda: log.exists() and "start" in log.read_text(), 30, "the job runs")
    slurm.kill_node("node2")
    slurm.revive_node("node2")
    assert slurm.wait(job) == {str(job): "COMPLETED"}
    assert "start 1" in log.read_text()


def test_stops_without_leaving_anything_behind(slurm: SlurmCluster, tmp_path: Path) -> None:
    other = SlurmCluster(nodes=1)
    other.start()
    job = other.submit(script(tmp_path, "endless", "trap '' TERM", "while true; do sleep 1; done"))
    wait_until(lambda: other.state(job) == "RUNNING", 30, "the job runs")
    other.stop()
    assert not other.folder.exists()
    assert not other.leftovers()
    assert slurm.idle_nodes() == slurm.nodes, "another cluster's end must not touch this one"
