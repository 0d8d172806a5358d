"""All layouts of a recipe on so many GPUs, ranked by predicted time."""

import itertools
from collections.abc import Iterator

from ouro_megatron.errors import RecipeError
from ouro_megatron.planning.hardware import Efficiency, Gpu
from ouro_megatron.planning.layout import layout_of
from ouro_megatron.planning.plan import Plan
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.schema import Recipe, Recompute

MIN_PIECE = 4096
"""Tokens of a sequence that a context-parallel rank holds at least."""

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


def plan_for(recipe: Recipe, world: int, gpu: Gpu, efficiency: Efficiency | None = None) -> Plan:
    """The plan of the recipe's own layout. Raises RecipeError with all problems when it cannot run on `world` GPUs."""
    layout = layout_of(recipe, world)
    return Plan(layout, gpu, _budget(recipe), efficiency or Efficiency())


def _budget(recipe: Recipe) -> int | None:
    """Tokens of the stage; None for epochs of data that nobody has counted yet."""
    return None if recipe.budget.total is None else BatchPlan(recipe).total_tokens


def best_plans(recipe: Recipe, world: int, gpu: Gpu, efficiency: Efficiency | None = None) -> list[Plan]:
    """One plan for each (tensor, context, pipeline, microbatch) that can run, with the least recomputation that fits.

    Those that fit into memory come first, fastest first; then those that do not, smallest first. Global batch, model
    and data stay as the recipe says. Raises RecipeError when no layout can run.
    """
    total = _budget(recipe)
    plans = []
    for variant in _variants(recipe, world):
        chosen = None
        for mode in _RECOMPUTE:
            training = variant.training.model_copy(update={"recompute": mode, "recompute_loops": None})
            try:
                layout = layout_of(variant.model_copy(update={"training": training}), world)
            except RecipeError:
                break
            chosen = Plan(layout, gpu, total, efficiency or Efficiency())
            if chosen.fits:
                break
        if chosen is not None:
            plans.append(chosen)
    if not plans:
        raise RecipeError(
            f"no layout of {recipe.name!r} runs on {world} GPUs with batch.global_tokens={recipe.batch.global_tokens}; "
            "a global batch that is a multiple of the GPUs and the sequence length has more choices"
        )
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step_seconds if plan.fits else plan.peak_bytes))


def _variants(recipe: Recipe, world: int) -> Iterator[Recipe]:
    tensors = [size for size in (1, 2, 4, 8) if size <= world]
    pipelines = [size for size in (1, 2, 3, 4, 6, 8, 12, 16) if size <= min(world, recipe.model.layers)]
    # Shorter pieces leave a GPU's kernels too little to do.
    contexts = [size for size in (1, 2, 4, 8, 16) if size == 1 or recipe.data.sequence_length >= size * MIN_PIECE]
    for tensor, context, pipeline, microbatch in itertools.product(tensors, contexts, pipelines, (1, 2, 4, 8)):
        sizes = {"tensor": tensor, "context": context, "pipeline": pipeline, "sequence": tensor > 1}
        parallel = recipe.parallel.model_copy(update={**sizes, "data": None, "layers": None})
        batch = recipe.batch.model_copy(update={"microbatch": microbatch})
        yield recipe.model_copy(update={"parallel": parallel, "batch": batch})
