"""From a pipeline file to jobs in the order they can run."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from ouro_megatron.cluster.settings import Average, Cluster, PipelineFile, Step, Twin, Upcycle, seconds_of
from ouro_megatron.cluster.twin import twin_of
from ouro_megatron.errors import ClusterError, RecipeError
from ouro_megatron.recipe.load import load_recipe, load_section, recipe_from_values
from ouro_megatron.recipe.schema import Recipe

PIPELINE_NAME = "pipeline.yaml"
_CLUSTER_PREFIX = "cluster."


@dataclass(frozen=True)
class Job:
    """One step of a pipeline, complete: nothing is looked up in files any more."""

    name: str
    run_folder: Path
    nodes: int
    time: str
    partition: str | None
    needs: tuple[str, ...]
    """Steps of the same pipeline that must have succeeded."""
    recipe: Recipe | None = None
    """Of a stage to train."""
    upcycle: Upcycle | None = None
    average: Average | None = None

    @property
    def kind(self) -> str:
        return "train" if self.recipe is not None else "upcycle" if self.upcycle is not None else "average"

    @property
    def slurm_folder(self) -> Path:
        """Where `ouro submit` keeps the job's script, recipe, log and notes."""
        return self.run_folder / "slurm"

    @property
    def source(self) -> Path | None:
        """The run folder this step starts from."""
        if self.recipe is not None:
            return self.recipe.init_path
        made = self.upcycle or self.average
        assert made is not None
        return self.run_folder.parent / made.source

    @property
    def made(self) -> Path:
        """The checkpoint that an upcycling or averaging makes."""
        return self.run_folder / "checkpoints" / "step-00000000"


@dataclass(frozen=True)
class Pipeline:
    name: str
    jobs: tuple[Job, ...]
    """In an order in which each comes after those it needs."""
    cluster: Cluster

    def job(self, name: str) -> Job:
        """Raises ClusterError naming the nearest step when there is none."""
        for job in self.jobs:
            if job.name == name:
                return job
        names = [job.name for job in self.jobs]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(names)}"
        raise ClusterError(f"pipeline {self.name} has no step {name!r}; {hint}")

    def ancestors(self, name: str) -> set[str]:
        """Steps that must succeed before `name` can start."""
        found: set[str] = set()
        waiting = list(self.job(name).needs)
        while waiting:
            step = waiting.pop()
            if step not in found:
                found.add(step)
                waiting += self.job(step).needs
        return found

    def between(self, first: str | None, last: str | None) -> tuple[Job, ...]:
        """Steps from `first` on (it and what depends on it) up to `last` (it and what it depends on)."""
        wanted = {job.name for job in self.jobs}
        if first is not None:
            self.job(first)
            wanted &= {job.name for job in self.jobs if job.name == first or first in self.ancestors(job.name)}
        if last is not None:
            wanted &= {last, *self.ancestors(last)}
        if not wanted:
            raise ClusterError(f"--from {first} --to {last}: {last} does not depend on {first}, nothing lies between")
        return tuple(job for job in self.jobs if job.name in wanted)


def load_pipeline(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: Path | None = None,
    twin: bool = False,
    nodes: int | None = None,
    time: str | None = None,
) -> Pipeline:
    """The pipeline at `path`: a pipeline file, a folder that holds one, or the recipe of a single stage.

    `overrides`: key.path=value for all recipes, `cluster.` in front for the cluster. `nodes` and `time` hold for all
    steps. Raises RecipeError listing all problems of all files, and ClusterError for steps that do not fit together
    and a time that sbatch would not understand.
    """
    file = path / PIPELINE_NAME if path.is_dir() else path
    if time is not None:
        seconds_of(time)
    ours = [text.removeprefix(_CLUSTER_PREFIX) for text in overrides if text.startswith(_CLUSTER_PREFIX)]
    theirs = [text for text in overrides if not text.startswith(_CLUSTER_PREFIX)]
    if _is_recipe(file):
        settings, steps = _single(file)
    else:
        settings, steps = _read(file, ())
    cluster_file = cluster or settings.cluster
    machine = load_section(cluster_file, Cluster, ours)
    small = _twin(settings, file) if twin else None
    jobs = _jobs(settings, steps, theirs, small, nodes, time)
    return Pipeline(settings.name, tuple(_in_order(jobs)), machine)


def stages_of(path: Path) -> list[Recipe]:
    """Recipes of the pipeline at `path`, in order; none when there is no pipeline file. Raises as `load_pipeline`."""
    file = path / PIPELINE_NAME if path.is_dir() else path
    if not file.is_file() or _is_recipe(file):
        return []
    return [job.recipe for job in load_pipeline(path).jobs if job.recipe is not None]


def _is_recipe(file: Path) -> bool:
    """A recipe has a model or extends something that has one; a pipeline has steps or includes others."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError:
        return True  # the recipe's reader says what is wrong
    return isinstance(values, dict) and not {"steps", "include"} & set(values)


def _single(file: Path) -> tuple[PipelineFile, list[tuple[Path, Step]]]:
    step = Step(recipe=Path(file.name))
    return PipelineFile(name=file.stem), [(file.parent, step)]


def _read(file: Path, chain: tuple[Path, ...]) -> tuple[PipelineFile, list[tuple[Path, Step]]]:
    """The file, and its steps and those it includes with the folder their paths are relative to."""
    if file.resolve() in chain:
        raise RecipeError(f"{file}: pipelines include each other in a circle")
    settings = load_section(file, PipelineFile)
    steps: list[tuple[Path, Step]] = []
    for other in settings.include:
        steps += _read(file.parent / other, (*chain, file.resolve()))[1]
    steps += [(file.parent, step) for step in settings.steps]
    relative = {
        field: file.parent / value for field in ("cluster", "twin") if (value := getattr(settings, field)) is not None
    }
    return settings.model_copy(update=relative), steps


def _twin(settings: PipelineFile, file: Path) -> Twin:
    if settings.twin is None:
        raise RecipeError(f"{file}: --twin needs a line `twin: FILE` in the pipeline")
    return load_section(settings.twin, Twin)


def _jobs(
    settings: PipelineFile,
    steps: Sequence[tuple[Path, Step]],
    overrides: Sequence[str],
    twin: Twin | None,
    nodes: int | None,
    time: str | None,
) -> list[Job]:
    problems: list[str] = []
    jobs: dict[str, Job] = {}
    run_dir = twin.run_dir if twin is not None else settings.run_dir
    nodes, time = nodes or (twin.nodes if twin else None), time or (twin.time if twin else None)
    for folder, step in steps:
        try:
            job = _job(folder, step, run_dir, overrides, twin, nodes, time)
        except RecipeError as error:
            problems.append(str(error))
            continue
        if job.name in jobs and jobs[job.name] != job:
            problems.append(f"{settings.name}: two steps are called {job.name} and are not the same")
        jobs[job.name] = job
    for _, step in steps:
        problems += [f"after: there is no step {name!r}" for name in step.after if name not in jobs]
    if problems:
        raise RecipeError("\n".join(problems))
    return list(jobs.values())


def _job(
    folder: Path,
    step: Step,
    run_dir: Path | None,
    overrides: Sequence[str],
    twin: Twin | None,
    nodes: int | None,
    time: str | None,
) -> Job:
    kinds = [kind for kind in (step.recipe, step.upcycle, step.average) if kind is not None]
    if len(kinds) != 1:
        raise RecipeError(f"step {step.name or '?'}: give exactly one of recipe, upcycle and average")
    size, limit = nodes or step.nodes, time or step.time
    if step.recipe is not None:
        recipe = load_recipe(folder / step.recipe)
        values = recipe.model_dump(mode="json")
        if twin is not None:
            values = twin_of(recipe, twin).model_dump(mode="json")
        if run_dir is not None:
            values["run_dir"] = str(run_dir)
        recipe = recipe_from_values(values, str(folder / step.recipe), overrides)
        if step.name not in (None, recipe.name):
            raise RecipeError(f"step {step.name}: the recipe {folder / step.recipe} is called {recipe.name}")
        needs = [recipe.init.stage] if recipe.init.stage is not None else []
        return Job(recipe.name, recipe.run_folder, size, limit, step.partition, (*needs, *step.after), recipe=recipe)
    if step.name is None or run_dir is None:
        raise RecipeError("a step that is no recipe needs a name, and its pipeline a run_dir")
    made = step.upcycle or step.average
    assert made is not None
    upcycle = step.upcycle
    if upcycle is not None and twin is not None:
        upcycle = upcycle.model_copy(update={"layers": max(1, upcycle.layers // twin.divide.layers)})
    return Job(
        step.name,
        run_dir / step.name,
        size,
        limit,
        step.partition,
        (made.source, *step.after),
        upcycle=upcycle,
        average=step.average,
    )


def _in_order(jobs: Sequence[Job]) -> Iterator[Job]:
    """Each job after those it needs, as far as they are in the pipeline; `init.stage` may name one that is not."""
    names = {job.name for job in jobs}
    waiting = [_only_known(job, names) for job in jobs]
    done: set[str] = set()
    while waiting:
        ready = [job for job in waiting if done.issuperset(job.needs)]
        if not ready:
            raise ClusterError(f"steps wait for each other in a circle: {', '.join(job.name for job in waiting)}")
        yield ready[0]
        done.add(ready[0].name)
        waiting.remove(ready[0])


def _only_known(job: Job, names: set[str]) -> Job:
    return replace(job, needs=tuple(dict.fromkeys(name for name in job.needs if name in names)))
