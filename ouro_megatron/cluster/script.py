"""The batch script of one step: plain bash that a person can read, change and submit by hand."""

import shlex
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ouro_megatron.cluster.pipeline import Job
from ouro_megatron.cluster.settings import Cluster

SCRIPT = "job.sbatch"


def options(job: Job, cluster: Cluster, folder: Path) -> list[str]:
    """sbatch's options of a step, one a line. `folder`: the job's own, for its log."""
    train = job.recipe is not None
    ranks = cluster.ranks_per_node if train else 1
    lines = [f"--job-name={job.name}", f"--nodes={job.nodes if train else 1}", f"--ntasks-per-node={ranks}"]
    cpus = cluster.cpus_per_task if train else cluster.cpus_per_task * cluster.ranks_per_node
    lines.append(f"--cpus-per-task={cpus}")
    if cluster.gpus_per_node and train:
        lines.append(f"--gpus-per-node={cluster.gpus_per_node}")
    if cluster.exclusive and train:
        lines.append("--exclusive")
    for name, value in (
        ("partition", job.partition or cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
    ):
        if value is not None:
            lines.append(f"--{name}={value}")
    lines.append(f"--time={job.time}")
    if train:
        lines.append(f"--signal=USR1@{cluster.grace_seconds}")
    lines += ["--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes"]
    lines.append(f"--output={shlex.quote(str(folder / 'job-%j.log'))}")
    return [*lines, *cluster.sbatch]


def render(job: Job, cluster: Cluster, pipeline: str, project: Path) -> str:
    """The whole script. `project`: the folder that relative paths, the recipe's too, are meant from."""
    folder = (project / job.slurm_folder).resolve()
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = environment.from_string(files("slurm").joinpath("step.sbatch.j2").read_text("utf-8"))
    what = {"train": "Trains stage", "upcycle": "Makes the deeper model", "average": "Averages checkpoints:"}[job.kind]
    container = _container(cluster, project)
    return template.render(
        title=f"{what} {job.name} of pipeline {pipeline}",
        name=job.name,
        script=shlex.quote(str(folder / SCRIPT)),
        options=options(job, cluster, folder),
        project=shlex.quote(str(project)),
        folder=shlex.quote(str(folder)),
        setup=cluster.setup,
        environment=[(name, shlex.quote(value)) for name, value in cluster.environment.items()],
        train=job.recipe is not None,
        retries=cluster.retries,
        srun=" ".join([*container, *cluster.srun]) if job.recipe is not None else _alone(container, cluster),
        command=_command(cluster),
        made=shlex.quote(str(job.made)),
        arguments="" if job.recipe is not None else arguments(job),
    )


def arguments(job: Job) -> str:
    """What follows `ouro` in the job of an upcycling or averaging."""
    words = [str(job.source)]
    if job.upcycle is not None:
        made = job.upcycle
        words = ["upcycle", *words, "--layers", str(made.layers), "--map", made.map, "--sequences", str(made.sequences)]
        words += ["--residual-scale", f"{made.residual_scale:g}", *(["--optimizer"] if made.optimizer else [])]
    else:
        assert job.average is not None
        words = ["checkpoint", "average", *words, "--last", str(job.average.last)]
    return shlex.join([*words, "--out", str(job.made)])


def _command(cluster: Cluster) -> str:
    return " ".join(shlex.quote(word) for word in shlex.split(cluster.command))


def _container(cluster: Cluster, project: Path) -> list[str]:
    """srun's options for pyxis."""
    if cluster.container is None:
        return []
    mounts = ",".join([f"{project}:{project}", *cluster.container.mounts])
    image = cluster.container.image_file(project) or cluster.container.image
    words = [f"--container-image={image}", f"--container-mounts={mounts}"]
    return [shlex.quote(word) for word in [*words, f"--container-workdir={project}"]]


def _alone(container: list[str], cluster: Cluster) -> str:
    """A step of one process needs srun only for its container."""
    return " ".join(["srun", "--ntasks=1", *container, *cluster.srun]) + " " if container else ""
