"""Every shipped experiment at every scale makes recipes that check_recipe accepts, of the shapes it names."""

from pathlib import Path

import pytest

from ouro_megatron.experiments.cells import cells_of, cost
from ouro_megatron.experiments.plan import Sweep
from ouro_megatron.experiments.settings import NAMES, SCALES, load_settings, parse_shape
from ouro_megatron.recipe.schedule import BatchPlan, LRSchedule
from ouro_megatron.recipe.validate import check_recipe


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_all_cells_have_a_recipe_that_can_run(name: str, scale: str, tmp_path: Path) -> None:
    sweep = Sweep(name, scale, load_settings(name, scale), tmp_path)
    for cell in cells_of(sweep.settings, seeds=1):
        recipe = sweep.recipe(cell)
        check_recipe(recipe)
        check_recipe(recipe, 8) if scale == "paper" else check_recipe(recipe, 1)
        assert (recipe.model.layers, recipe.model.loops) == parse_shape(cell.shape)
        assert recipe.training.seed == 1 and recipe.name == cell.name
        assert recipe.objective.kind == ("expected_loss" if name == "prior" else "last_loop")
        plan = BatchPlan(recipe)
        assert LRSchedule(recipe, plan).at(plan.total_steps - 1) == pytest.approx(recipe.optimizer.lr / 10, rel=0.01)
        assert cost(recipe) > 0
    assert not list(tmp_path.iterdir()), "settings are checked without a file being written"


def test_iso_flop_baselines_cost_the_same_layers_and_iso_parameter_ones_weigh_the_same() -> None:
    from ouro_megatron.planning.flops import parameter_counts

    sweep = Sweep("mano", "paper", load_settings("mano", "paper"), Path("nowhere"))
    recipes = {cell.shape: sweep.recipe(cell) for cell in cells_of(sweep.settings, 1, ["L10"])}
    layers = {shape: parameter_counts(recipe.model).layers for shape, recipe in recipes.items()}
    assert layers["2x6"] == layers["2x1"] and layers["12x1"] == 6 * layers["2x6"]
    work = {shape: recipe.model.layers * recipe.model.loops for shape, recipe in recipes.items()}
    assert work["2x6"] == work["3x4"] == work["12x1"] == work["6x2"]


def test_the_papers_settings_are_the_papers() -> None:
    mano = {
        cell.group: Sweep("mano", "paper", load_settings("mano", "paper"), Path("x")).recipe(cell)
        for cell in cells_of(load_settings("mano", "paper"), 1)
    }
    steps = {name: BatchPlan(mano[f"2x6/{name}"]).total_steps for name in ("L10", "L16", "L24")}
    assert steps == {"L10": 80_000, "L16": 110_000, "L24": 200_000}
    recipe = mano["2x6/L10"]
    assert recipe.optimizer.betas == (0.9, 0.98) and recipe.optimizer.eps == 1e-6 and recipe.optimizer.clip == 1.0
    assert recipe.batch.global_tokens == 128 * 1024 and str(recipe.schedule.warmup) == "1000 steps"
    capo = load_settings("capo", "paper")
    for cell in cells_of(capo, 1):
        sweep = Sweep("capo", "paper", capo, Path("x"))
        values = {**capo.task, **cell.variant.task}  # type: ignore[union-attr, dict-item]
        # 30 biographies of 17 slots a row: each person is read about 1000 times.
        reads = BatchPlan(sweep.recipe(cell)).total_tokens / 17 / values["people"]
        assert 990 < reads < 1010, cell.name
