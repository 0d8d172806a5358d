"""Every shipped recipe runs a step on shapes.

Its tensor- and pipeline-parallel ranks do; where it has none, as many data-parallel ones as its pipeline gives it.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ouro_megatron.cluster.pipeline import load_pipeline
from ouro_megatron.recipe.load import load_recipe
from ouro_megatron.recipe.validate import ranks_needed
from ouro_megatron.training.dry_run import dry_run, rehearsal_pool
from tests.distributed.ranks import ROOT

STAGES = ROOT / "stages"
RECIPES = sorted(STAGES.glob("*/[0-9]-*.yaml"))


@pytest.fixture(scope="module")
def worlds() -> dict[str, int]:
    """Ranks by stage, as `ouro submit` would start them."""
    pipeline = load_pipeline(STAGES / "ouro")
    return {job.name: job.nodes * pipeline.cluster.ranks_per_node for job in pipeline.jobs if job.recipe is not None}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes for all recipes: importing torch and Megatron anew for each would take longer than the runs."""
    with rehearsal_pool(2) as processes:
        yield processes


def test_none_is_forgotten(worlds: dict[str, int]) -> None:
    names = {file.name for folder in ("demo", "ouro", "ouro-1.4b", "ouro-2.6b") for file in (STAGES / folder).iterdir()}
    assert names - {file.name for file in RECIPES} == {"base.yaml", "data.yaml", "pipeline.yaml"}
    assert len(RECIPES) == 14 + 4
    assert set(worlds) < {load_recipe(file).name for file in RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_dry_run(
    file: Path, worlds: dict[str, int], pool: ProcessPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(file)
    world = ranks_needed(recipe)
    if world == 1:
        world = worlds[recipe.name]
    dry_run(recipe, world, data=False, pool=pool)
    shown = capsys.readouterr().out
    assert f"of {world} ran a step on shapes" in shown and "agree in group, order, shape and type" in shown
    assert "too much" not in shown, "the plan says that it does not fit into an H100's memory"
    assert ("which was not read" in shown) == (recipe.budget.total is None)
