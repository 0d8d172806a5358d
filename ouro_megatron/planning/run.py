"""`ouro plan` as one call: plan, search, pictures."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ouro_megatron.data.complete import complete
from ouro_megatron.errors import DataError
from ouro_megatron.planning.hardware import gpu_named
from ouro_megatron.planning.search import best_plans, plan_for
from ouro_megatron.planning.show import plan_as_json, show_plan, show_search
from ouro_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class PlanRequest:
    """What to plan and what to leave behind."""

    gpus: int
    gpu: str
    search: bool = False
    rows: int = 15
    picture: Path | None = None
    trace: Path | None = None
    as_json: bool = False


def _counted(recipe: Recipe) -> Recipe:
    """With a budget in tokens, for one in epochs. A plan needs no data: without, it says that its length is open."""
    try:
        return complete(recipe)
    except DataError:
        return recipe


def run_plan(recipe: Recipe, request: PlanRequest) -> None:
    """Prints the plan (or with `search` the ranked layouts). Raises RecipeError when the recipe cannot run there."""
    gpu = gpu_named(request.gpu)
    if recipe.budget.total is None:
        recipe = _counted(recipe)
    plans = best_plans(recipe, request.gpus, gpu) if request.search else [plan_for(recipe, request.gpus, gpu)]
    if request.as_json:
        shown = plans[: request.rows]
        json.dump([plan_as_json(plan) for plan in shown] if request.search else plan_as_json(plans[0]), sys.stdout)
        print()
    else:
        console = Console(highlight=False)
        if request.search:
            show_search(plans, console, request.rows)
        else:
            show_plan(plans[0], console)
    plan = plans[0]
    if request.picture is not None:
        from ouro_megatron.planning.timeline import draw

        title = f"{recipe.name} on {request.gpus} x {gpu.name}: {plan.layout.describe()}, bubble {plan.bubble:.1%}"
        if plan.pictured_microbatches < plan.layout.microbatches:
            title += f" (drawn: {plan.pictured_microbatches} of {plan.layout.microbatches} microbatches)"
        draw(plan.pictured, plan.layout.loops, request.picture, title)
        _say(request, f"Picture: {request.picture}")
    if request.trace is not None:
        from ouro_megatron.planning.timeline import write_trace

        write_trace(plan.timeline, request.trace)
        _say(request, f"Trace: {request.trace}; open it in https://ui.perfetto.dev")


def _say(request: PlanRequest, line: str) -> None:
    if not request.as_json:
        print(line)
