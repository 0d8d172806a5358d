"""`precision.fp8`: what cannot run is refused with its fix, and what surprises is said."""

from pathlib import Path

import pytest

from ouro_megatron.errors import RecipeError
from ouro_megatron.recipe.fp8 import UNIT, fp8_warning
from ouro_megatron.recipe.layers import fp8_layers
from ouro_megatron.recipe.load import load_recipe
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.recipe.validate import check_recipe
from tests.recipe.test_load import BASE

SHAPE = ["model.hidden=256", "model.heads=8", "model.ffn=256", "data.sequence_length=128", "model.layers=4"]
SHAPE += ["batch.global_tokens=1Ki"]


def fp8_recipe(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return load_recipe(path, [*SHAPE, "precision.fp8.recipe=current", *overrides])


REAL = ["model.implementation=transformer_engine", "precision.compute=bf16"]
EMULATED = ["precision.fp8.emulate=true"]


@pytest.mark.parametrize("recipe", list(UNIT))
def test_good(tmp_path: Path, recipe: str) -> None:
    for how in (REAL, EMULATED, [*EMULATED, "precision.compute=fp32"], [*EMULATED, "parallel.tensor=2"]):
        check_recipe(fp8_recipe(tmp_path, f"precision.fp8.recipe={recipe}", *how))
    check_recipe(fp8_recipe(tmp_path, *REAL, f"precision.fp8.recipe={recipe}", "precision.fp8.parameters=true"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["model.implementation=local", "transformer_engine", "precision.fp8.emulate=true"]),
        ([*EMULATED, REAL[0]], ["emulate=true", "model.implementation=local"]),
        ([REAL[0], "precision.compute=fp32"], ["precision.compute=bf16", "not fp32"]),
        ([*EMULATED, "precision.fp8.parameters=true"], ["precision.fp8.parameters=true", "remove one"]),
        (
            [*EMULATED, "precision.fp8.first_layers_bf16=2", "precision.fp8.last_layers_bf16=2"],
            ["none of model.layers=4"],
        ),
        (
            [*EMULATED, "precision.fp8.recipe=delayed", "training.recompute=full"],
            ["training.recompute=full", "recompute=selective", "blockwise"],
        ),
        (
            [*EMULATED, "precision.fp8.recipe=delayed", "objective.kind=gate", "init.checkpoint=x"],
            ["objective.kind=gate", "current"],
        ),
        (
            [*REAL, "parallel.pipeline=4", "precision.fp8.first_layers_bf16=2", "batch.global_tokens=4Ki"],
            ["first_layers_bf16=2", "the 1 layers"],
        ),
        ([*REAL, "precision.fp8.recipe=delayed", "precision.fp8.first_layers_bf16=1"], ["must be 0", "blockwise"]),
        ([*REAL, "precision.fp8.parameters=true", "objective.kind=gate", "init.checkpoint=x"], ["trains none"]),
        ([*EMULATED, "model.ffn=264"], ["model.ffn=264", "multiple of 16"]),
        ([*EMULATED, "precision.fp8.recipe=mxfp8", "model.ffn=272"], ["model.ffn=272", "multiple of 32"]),
        (
            [*EMULATED, "precision.fp8.recipe=blockwise", "parallel.tensor=4"],
            ["model.ffn=256 / parallel.tensor=4 is 64", "multiple of 128"],
        ),
        (
            [*EMULATED, "precision.fp8.recipe=blockwise", "data.sequence_length=64"],
            ["data.sequence_length=64 x batch.microbatch=1 is 64"],
        ),
        (
            [*EMULATED, "precision.fp8.recipe=blockwise", "parallel.context=2"],
            ["data.sequence_length=128 x batch.microbatch=1 / parallel.context=2 is 64"],
        ),
        ([*EMULATED, "model.hidden=264", "model.head_dim=32"], ["model.hidden=264"]),
        ([*EMULATED, "model.kv_heads=1", "model.head_dim=10"], ["queries, keys and values"]),
        (["precision.fp8.recipe=tensorwise"], ["tensorwise"]),
    ],
)
def test_refused(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(fp8_recipe(tmp_path, *overrides))
    for word in words:
        assert word in str(caught.value)


def test_layers_are_counted_over_the_whole_model(tmp_path: Path) -> None:
    recipe = fp8_recipe(tmp_path, *EMULATED, "precision.fp8.first_layers_bf16=1", "precision.fp8.last_layers_bf16=2")
    assert list(fp8_layers(recipe.model, recipe.precision.fp8)) == [1]
    assert list(fp8_layers(recipe.model, None)) == []


def test_delayed_scaling_over_loops_is_warned_of(tmp_path: Path) -> None:
    delayed = [*EMULATED, "precision.fp8.recipe=delayed"]
    warning = fp8_warning(fp8_recipe(tmp_path, *delayed, "model.loops=3"))
    assert warning is not None and "3 visits" in warning and "blockwise" in warning
    assert fp8_warning(fp8_recipe(tmp_path, *delayed, "model.loops=1")) is None
    assert fp8_warning(fp8_recipe(tmp_path, *EMULATED)) is None
