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
from ouro_megatron.cluster.settings import Cluster, seconds_of
from ouro_megatron.data.complete import complete
from ouro_megatron.data.indexed import check_prefix, pairs_of
from ouro_megatron.errors import ClusterError, DataError, OuroError, RecipeError
from ouro_megatron.recipe.validate import check_recipe, ranks_of_a_sample
from ouro_megatron.telemetry.text import duration


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
        problems += time_problems(job, pipeline.cluster)
        problems += layout_problems(job, pipeline.cluster)
    problems += data_problems(jobs)
    problems += _source_problems(pipeline, jobs, running)
    problems += _command_problems(pipeline.cluster, project)
    if slurm.is_there():
        problems += _refusals(pipeline, jobs, project)
    return list(dict.fromkeys(problems))


def time_problems(job: Job, cluster: Cluster) -> Iterator[str]:
    """A time limit within the grace: the job would be told to stop when it has hardly begun, again and again."""
    if job.recipe is not None and seconds_of(job.time) <= cluster.grace_seconds:
        yield (
            f"{job.name}: its time limit {job.time} is not longer than cluster.grace_seconds={cluster.grace_seconds}, "
            "so it would be told to stop at once; give it more time or less grace"
        )


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


def data_problems(jobs: Sequence[Job]) -> Iterator[str]:
    """Files that are cut short or tokenised for another vocabulary, and those that are missing: one line for all that
    a step is the first to need."""
    seen: set[Path | str] = set()
    for job in jobs:
        if job.recipe is None:
            continue
        data, missing = job.recipe.data, []
        for entry in [*data.train, *data.validation]:
            if entry.path in seen:
                continue
            seen.add(entry.path)
            try:
                if pairs_of(entry.path) == [entry.path] and not Path(f"{entry.path}.idx").exists():
                    missing.append(str(entry.path))
                    continue
                check_prefix(entry.path, job.recipe.model.vocab)
            except OuroError as error:
                yield f"{job.name}: data: {error}"
        if missing:
            yield (
                f"{job.name}: data: these .bin/.idx pairs are missing ({len(missing)}): {', '.join(missing)}; prepare "
                "them (`ouro data prepare`), or submit only steps that do not need them (--to)"
            )
        if data.tokenizer not in seen and not (data.tokenizer / "tokenizer.json").is_file():
            yield f"{job.name}: data.tokenizer: {data.tokenizer / 'tokenizer.json'} is missing"
        seen.add(data.tokenizer)


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
    """The image's file; without an image the ranks' program."""
    if cluster.container is not None:
        image = cluster.container.image_file(project)
        if image is not None and not image.is_file():
            yield f"container.image: {image} is not there; make it (docs/cluster.md) or set cluster.container.image"
        return
    if cluster.setup:
        return  # its modules may bring the program
    program = shlex.split(cluster.command)[0]
    if shutil.which(program) is None and not (project / program).is_file():
        yield f"command: {program} is not there (from {project}); install the project or set cluster.command"


def _refusals(pipeline: Pipeline, jobs: Sequence[Job], project: Path) -> Iterator[str]:
    """What sbatch itself would refuse: partitions, GPUs, nodes, times."""
    refused: dict[tuple[str, str], list[str]] = {}
    limits = slurm.time_limits()
    with tempfile.TemporaryDirectory(prefix="ouro-submit-") as folder:
        for number, job in enumerate(jobs):
            script = Path(folder) / f"{number}.sbatch"
            script.write_text(render(job, pipeline.cluster, pipeline.name, project), encoding="utf-8")
            try:
                reason = slurm.test(script)
            except ClusterError as error:
                yield str(error)
                return
            if reason is not None:
                refused.setdefault((reason, _asked(job, pipeline.cluster)), []).append(job.name)
            elif (limit := _limit_below(job, pipeline.cluster, limits)) is not None:
                yield (
                    f"{job.name} asks for {job.time}, its partition's time limit is {duration(limit)}: it would "
                    "wait for ever; ask for less (--time), a stage goes on in further jobs"
                )
    for (reason, asked), names in refused.items():
        yield f"sbatch would refuse {', '.join(names)} ({asked}): {reason}"


def _limit_below(job: Job, cluster: Cluster, limits: dict[str, int]) -> int | None:
    """The partition's time limit where the job's is above it: unless the site says so, sbatch takes such a job."""
    names = (job.partition or cluster.partition or "").split(",")
    longest = max(limits.get(name, 0) for name in names) if all(name in limits for name in names) else None
    return longest if longest is not None and seconds_of(job.time) > longest else None


def _asked(job: Job, cluster: Cluster) -> str:
    """What a step wants of Slurm, in words."""
    nodes, gpus = (job.nodes, cluster.gpus_per_node) if job.recipe is not None else (1, 0)
    cores = cluster.cpus_per_task * cluster.ranks_per_node
    where = f"partition {job.partition or cluster.partition or 'not named'}"
    each = f"{gpus} GPUs and {cores} cores each" if gpus else f"{cores} cores each"
    return f"{nodes} {'node' if nodes == 1 else 'nodes'}, {each}, {where}, time {job.time}"
