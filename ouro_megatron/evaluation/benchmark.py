"""`ouro benchmark`: tasks of lm-evaluation-harness at several exits, into one table, JSON file and picture."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.errors import DataError, RecipeError
from ouro_megatron.evaluation.session import ModelSession
from ouro_megatron.inference.exit_policy import ExitPolicy


@dataclass(frozen=True)
class TaskChoice:
    """One task of the harness and how to run it."""

    task: str
    shots: int | None = None
    """None: what the task says."""
    metric: str | None = None
    """The harness's name of the number to report, with its filter: "exact_match,strict-match". None: the first."""
    unsafe: bool = False
    """Runs code that the model wrote."""
    about: str = ""


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to run and at which depths."""

    tasks: Sequence[TaskChoice]
    exits: Sequence[str] = ("all",)
    loops: int | None = None
    """At most; the training's when None."""
    include: Sequence[Path] = ()
    """Folders with task files of one's own."""
    limit: int | None = None
    batch: int = 8
    max_length: int | None = None
    allow_code: bool = False
    """Run tasks that execute code the model wrote."""


@dataclass(frozen=True)
class Result:
    """One task at one exit."""

    task: str
    exit: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None
    samples: int
    mean_loops: float
    """Mean loop at which the tokens that counted left."""
    all_metrics: dict[str, Any] = field(default_factory=dict)


def suites() -> list[str]:
    """Names of the ready lists."""
    folder = files("ouro_megatron.evaluation") / "suites"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_suite(name: str) -> list[TaskChoice]:
    """The tasks of a ready list, or of a YAML file of one's own. Raises RecipeError when it cannot be read."""
    path: Any = Path(name)
    if not path.is_file():
        if name not in suites():
            raise RecipeError(f"--suite {name!r}: neither a file nor one of {', '.join(suites())}")
        path = files("ouro_megatron.evaluation") / "suites" / f"{name}.yaml"
    try:
        return [TaskChoice(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["tasks"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise RecipeError(f"--suite {name}: a mapping with a list `tasks` of task, shots, metric ({error})") from error


def require_harness() -> None:
    """Raises RecipeError when lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("lm-evaluation-harness is not installed: pip install 'ouro-megatron[eval]'")


def run_benchmark(
    path: Path, settings: BenchmarkSettings, *, device: str = "cpu", out: Path | None = None
) -> list[Result]:
    """Runs every task at every exit; the model is loaded once. Writes `out`/benchmark.json and benchmark.png.

    Raises RecipeError for settings out of range, a task the harness does not know, or the harness not being installed;
    DataError when a task's data cannot be had.
    """
    require_harness()
    policies = [ExitPolicy.parse(text) for text in settings.exits]
    unsafe = [choice.task for choice in settings.tasks if choice.unsafe]
    if unsafe and not settings.allow_code:
        raise RecipeError(
            f"{', '.join(unsafe)}: these run code the model wrote. Allow it with --allow-code, in a sandbox"
        )
    if not settings.tasks:
        raise RecipeError("name tasks (--task) or a list of them (--suite)")
    from lm_eval.tasks import TaskManager

    from ouro_megatron.evaluation.harness import OuroMegatronLM

    manager = TaskManager(include_path=[str(folder) for folder in settings.include] or None)
    unknown = [choice.task for choice in settings.tasks if choice.task not in manager.all_tasks]
    if unknown:
        raise RecipeError(f"lm-evaluation-harness knows no task {', '.join(unknown)}; --include FOLDER adds your own")
    session = ModelSession(path, device=device, batch=settings.batch)
    try:
        lm = OuroMegatronLM(str(path), loops=settings.loops, max_length=settings.max_length, session=session)
        results: list[Result] = []
        for policy in policies:
            policy.check(lm.loops)
            lm.set_exit(policy, lm.loops)
            results += [_run_task(lm, choice, manager, settings) for choice in settings.tasks]
        if out is not None and session.context.rank == 0:
            write_benchmark(path, results, out)
        return results
    finally:
        session.close()


def _run_task(lm: Any, choice: TaskChoice, manager: Any, settings: BenchmarkSettings) -> Result:
    from lm_eval.evaluator import simple_evaluate

    lm.set_exit(lm.policy, lm.loops)
    try:
        found = simple_evaluate(
            lm,
            tasks=[choice.task],
            num_fewshot=choice.shots,
            limit=settings.limit,
            bootstrap_iters=1000,
            log_samples=False,
            task_manager=manager,
            confirm_run_unsafe_code=settings.allow_code,
        )
    except (OSError, ConnectionError) as error:
        raise DataError(f"{choice.task}: its data cannot be had ({error})") from error
    # Ranks other than the first get nothing: they have no numbers to report.
    row: dict[str, Any] = found["results"][choice.task] if found else {}
    metrics = {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and "," in name and "_stderr" not in name
    }
    metric = choice.metric or next(iter(metrics), "")
    if found and metric not in metrics:
        raise RecipeError(f"{choice.task}: reports no {metric!r}; it reports {', '.join(metrics)}")
    name, _, kind = metric.partition(",")
    stderr = row.get(f"{name}_stderr,{kind}")
    samples = found["n-samples"] if found else {}
    depths = lm.depths or [0.0]
    return Result(
        choice.task,
        str(lm.policy),
        metric,
        float(metrics.get(metric, float("nan"))),
        float(stderr) if isinstance(stderr, int | float) else None,
        choice.shots,
        sum(int(counts["effective"]) for counts in samples.values()),
        sum(depths) / len(depths),
        metrics,
    )


def write_benchmark(path: Path, results: Sequence[Result], out: Path) -> None:
    """benchmark.json with all numbers, benchmark.png with each task's over the loops used."""
    from ouro_megatron.evaluation.figures import lines_figure

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "benchmark.json", {"model": str(path), "results": [asdict(result) for result in results]})
    tasks = list(dict.fromkeys(result.task for result in results))
    lines_figure(
        f"{path}: benchmarks by depth",
        {
            task: [(result.mean_loops, result.value, result.exit) for result in results if result.task == task]
            for task in tasks
        },
        ("mean loops", "score"),
        out / "benchmark.png",
    )
