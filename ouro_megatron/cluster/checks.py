"""Everything that can be known to be wrong before a job waits in a queue for days. All problems at once."""

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ouro_megatron.cluster import slurm
from ouro_megatron.cluster.pipeline import Job, Pipeline
from ouro_megatron.cluster.progress import is_finished
from ouro_megatron.cluster.script import render
from ouro_megatron.cluster.settings import Cluster
from ouro_megatron.data.complete import complete
from ouro_megatron.data.indexed import check_prefix
from ouro_megatron.errors import DataError, OuroError, RecipeError
from ouro_megatron.recipe.validate import check_recipe, ranks_of_a_sample


def completed(job: Job) -> Job:
    """The job with its recipe completed from its data, as far as that is there: `data_problems` names what is not."""
    try:
        return job if job.recipe is None else replace(job, recipe=complete(job.recipe))
    except DataError:
        return job


def find_problems(pipeline: Pipeline, jobs: Sequence[Job], running: dict[str, int], project: Path) -> list[str]:
    """One line a problem. `jobs`: those to submit; `running`: ids of steps that are in the queue already."""
    problems: list[str] = []
    for job in jobs:
        problems += layout_problems(job, pipeline.cluster)
        problems += data_problems(job)
    problems += _source_problems(pipeline, jobs, running)
    problems += _command_problems(pipeline.cluster, project)
    if slurm.is_there():
        problems += _refusals(pipeline, jobs, project)
    return list(dict.fromkeys(problems))


def layout_problems(job: Job, cluster: Cluster) -> Iterator[str]:
    """The recipe's own rules, for the ranks that the step's nodes have."""
    if job.recipe is None:
        return
    ranks = job.nodes * cluster.ranks_per_node
    unit = ranks_of_a_sample(job.recipe)
    if ranks < unit:
        nodes = -(-unit // cluster.ranks_per_node)
        yield (
            f"{job.name}: {job.nodes} nodes x {cluster.ranks_per_node} ranks = {ranks}, but parallel.tensor="
            f"{job.recipe.parallel.tensor} x parallel.pipeline={job.recipe.parallel.pipeline} x parallel.context="
            f"{job.recipe.parallel.context} needs {unit}; "
            f"{nodes} nodes would do"
        )
        return
    try:
        check_recipe(job.recipe, ranks)
    except RecipeError as error:
        for line in str(error).splitlines()[1:]:
            yield f"{job.name} on {job.nodes} nodes: {line.strip()}"


def data_problems(job: Job) -> Iterator[str]:
    """Files that are missing, cut short, or tokenised for another vocabulary."""
    if job.recipe is None:
        return
    data = job.recipe.data
    for entry in [*data.train, *data.validation]:
        try:
            check_prefix(entry.path, job.recipe.model.vocab)
        except OuroError as error:
            yield f"data: {error}"
    if not (data.tokenizer / "tokenizer.json").is_file():
        yield f"data.tokenizer: {data.tokenizer / 'tokenizer.json'} is missing"


def _source_problems(pipeline: Pipeline, jobs: Sequence[Job], running: dict[str, int]) -> Iterator[str]:
    """Steps whose predecessor is neither submitted, nor in the queue, nor finished."""
    names = {job.name for job in jobs}
    known = {job.name: job for job in pipeline.jobs}
    for job in jobs:
        for need in job.needs:
            if need not in names and need not in running and not is_finished(known[need]):
                yield f"{job.name} needs {need}, which is not finished; start with --from {need}"
        inside = {known[need].run_folder for need in job.needs}
        if job.source is not None and job.source not in inside and not job.source.exists():
            yield f"{job.name} starts from {job.source}, which does not exist"


def _command_problems(cluster: Cluster, project: Path) -> Iterator[str]:
    """The ranks' program, where it is no image's."""
    if cluster.container is not None or cluster.setup:
        return  # the setup's modules may bring it
    program = shlex.split(cluster.command)[0]
    if shutil.which(program) is None and not (project / program).is_file():
        yield f"command: {program} is not there (from {project}); install the project or set cluster.command"


def _refusals(pipeline: Pipeline, jobs: Sequence[Job], project: Path) -> Iterator[str]:
    """What sbatch itself would refuse: partitions, GPUs, nodes, times."""
    asked: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="ouro-submit-") as folder:
        for number, job in enumerate(jobs):
            script = Path(folder) / f"{number}.sbatch"
            script.write_text(render(job, pipeline.cluster, pipeline.name, project), encoding="utf-8")
            reason = slurm.test(script)
            if reason is not None:
                asked.setdefault(reason, []).append(job.name)
    for reason, names in asked.items():
        yield f"sbatch would refuse {', '.join(names)}: {reason}"
