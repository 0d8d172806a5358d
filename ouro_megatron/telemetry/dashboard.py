"""A Weights & Biases workspace for looped models: written as a file, pushed on request."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_megatron.errors import DashboardError, OuroError
from ouro_megatron.recipe.load import load_recipe
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metric_names import X_AXIS
from ouro_megatron.telemetry.run_reader import read_stages
from ouro_megatron.telemetry.sink import pipeline_of


@dataclass(frozen=True)
class Facts:
    """What the panels depend on."""

    title: str
    project: str
    entity: str | None
    loops: int
    sources: tuple[str, ...]
    groups: tuple[str, ...]
    """W&B groups of the stages, in order."""


def facts_of(path: Path, recipes: Sequence[Recipe] = ()) -> Facts:
    """From `recipes`; without any, from the recipe file, run folder or folder of a pipeline's runs at `path`.

    Raises RecipeError for a recipe that cannot be read, MetricsError for a folder without runs.
    """
    if not recipes:
        found = [load_recipe(path)] if path.is_file() else [stage.recipe for stage in read_stages(path)]
        recipes = [recipe for recipe in found if recipe is not None]
    if not recipes:
        raise DashboardError(f"{path}: none of its runs has a recipe.yaml that this version can read")
    first = recipes[0]
    sources = dict.fromkeys(entry.name or entry.path.name for recipe in recipes for entry in recipe.data.train)
    return Facts(
        title=pipeline_of(first),
        project=first.logging.wandb.project,
        entity=first.logging.wandb.entity,
        loops=max(_loops(recipe) for recipe in recipes),
        sources=tuple(sources),
        groups=tuple(dict.fromkeys(f"{pipeline_of(recipe)}/{recipe.name}" for recipe in recipes)),
    )


def _loops(recipe: Recipe) -> int:
    """The most it ever uses."""
    return max([recipe.model.loops, *(early.loops for early in recipe.training.early_loops)])


def write_dashboard(
    path: Path,
    out: Path | None,
    *,
    entity: str | None,
    project: str | None,
    push: bool,
    recipes: Sequence[Recipe] = (),
) -> str:
    """Writes the workspace's definition and, with `push`, creates it on the server; returns a line that says where.

    `out`: the JSON file; dashboard.json in the run folder, or beside the recipe, when None. It holds exactly what is
    pushed. `recipes`: a pipeline's stages, where `path` is one. Raises DashboardError when wandb-workspaces is missing
    or the server does not take it.
    """
    facts = facts_of(path, recipes)
    workspace = build_workspace(facts, entity or facts.entity or "", project or facts.project)
    out = out or (path.with_name(f"{path.stem}.dashboard.json") if path.is_file() else path / "dashboard.json")
    text = workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=1)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.part")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise DashboardError(f"{out} cannot be written: {error.strerror}") from error
    return f"{out}\n{_push(workspace)}" if push else str(out)


def _push(workspace: Any) -> str:
    if not workspace.entity:
        raise DashboardError("--push needs to know whose project it is: --entity NAME, or logging.wandb.entity")
    try:
        return str(workspace.save().url)
    except OuroError:
        raise
    except (Exception, SystemExit) as error:
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DashboardError(f"Weights & Biases did not take the dashboard: {why}. Is `wandb login` done?") from error


def build_workspace(facts: Facts, entity: str, project: str) -> Any:
    """The wandb_workspaces Workspace. Raises DashboardError when the package is missing."""
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise DashboardError(
            "the package wandb-workspaces is missing: pip install 'ouro-megatron[dashboard]'"
        ) from error
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Looped model {facts.title}",
        sections=[
            ws.Section(name=name, is_open=True, panels=panels, panel_settings=_over_tokens(ws))
            for name, panels in _sections(facts).items()
            if panels
        ],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS, group_by_prefix="first", max_runs=30),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Metric("Group")], filters=[ws.Metric("Group").isin(list(facts.groups))]
        ),
    )


def _over_tokens(ws: Any) -> Any:
    return ws.SectionPanelSettings(x_axis=X_AXIS)


def _sections(facts: Facts) -> dict[str, list[Any]]:
    loops = range(1, facts.loops + 1)
    last = facts.loops
    gain = [f"${{held_out/loop_{t}}} - ${{held_out/loop_{t + 1}}}" for t in range(1, last)]
    return {
        "Loss": [
            _lines("Loss by loop", [f"loss/loop_{t}" for t in loops]),
            _lines("Held-out loss by loop", [f"held_out/loop_{t}" for t in loops]),
            _lines("Objective", ["loss/total", "held_out/total"]),
            *([_lines("What one more loop buys (held out)", [], custom_expressions=gain)] if gain else []),
        ],
        "Exit": [
            _lines("Exit distribution", [f"exit/p_{t}" for t in loops], plot_type="pct-area"),
            _lines("Expected depth", ["exit/expected_depth", "held_out_exit/expected_depth"]),
            _lines("Entropy of the exits", ["exit/entropy", "held_out_exit/entropy"]),
        ],
        "Optimisation": [
            _lines("Gradient norm", ["optim/grad_norm"], log_y=True),
            _lines("Learning rate", ["optim/lr"]),
            _lines("Skipped updates and rollbacks", ["optim/skipped_steps", "optim/rollbacks"]),
        ],
        "Throughput": [
            _lines("Tokens per second", ["perf/tokens_per_s"]),
            _lines("Model FLOPs utilisation", ["perf/mfu"]),
            _lines("Seconds a step", ["perf/step_seconds", "perf/rank_seconds_min", "perf/rank_seconds_max"]),
            _lines("Tokens a step", ["progress/global_tokens"]),
        ],
        "Data": [
            _lines(
                "Share of tokens by source",
                [f"data/source_share/{name}" for name in facts.sources],
                plot_type="pct-area",
            )
        ],
        "System": [
            _lines("Device memory (GB)", ["system/device_memory_gb"]),
            _lines("Host memory", ["system/host_memory_share", "system/process_memory_gb"]),
            _lines("CPU", ["system/cpu_share"]),
            _lines("Free disk (GB)", ["system/disk_free_gb"]),
        ],
    }


def _lines(title: str, metrics: list[str], **options: Any) -> Any:
    from wandb_workspaces.reports.v2 import LinePlot

    return LinePlot(title=title, x=X_AXIS, y=metrics, **options)
