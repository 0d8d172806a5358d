"""Rules between fields: each broken one is found, named, and comes with a fix."""

from pathlib import Path

import pytest

from ouro_megatron.errors import RecipeError
from ouro_megatron.recipe.load import load_recipe
from ouro_megatron.recipe.validate import check_recipe, ranks_needed
from tests.recipe.test_load import BASE

STAGES = Path(__file__).resolve().parents[2] / "stages"


def check(tmp_path: Path, *overrides: str, ranks: int | None = None) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    check_recipe(load_recipe(path, overrides), ranks)


def test_good(tmp_path: Path) -> None:
    check(tmp_path)
    check(tmp_path, "parallel.tensor=2", "parallel.pipeline=2", ranks=8)
    check(tmp_path, "parallel.context=2", "parallel.tensor=2", "parallel.sequence=true", ranks=8)
    check(tmp_path, "parallel.context=2", "model.implementation=transformer_engine", ranks=4)


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        (["parallel.tensor=3"], None, ["model.heads=4", "parallel.tensor=3"]),
        (["model.kv_heads=1", "parallel.tensor=2"], None, ["model.kv_heads=1"]),
        (["model.kv_heads=3"], None, ["model.heads=4", "model.kv_heads=3"]),
        (["model.hidden=30"], None, ["model.hidden=30", "head_dim"]),
        (["model.head_dim=7"], None, ["odd", "RoPE"]),
        (["parallel.pipeline=4"], None, ["model.layers=2", "parallel.pipeline=4", "2 or less"]),
        (["parallel.pipeline=2", "parallel.layers=[2]"], None, ["parallel.layers=[2]", "[1, 1]"]),
        (["parallel.tensor=2"], 3, ["3 ranks", "= 2"]),
        (["parallel.data=2"], 4, ["parallel.data=2", "4 ranks"]),
        (["parallel.sequence=true"], None, ["parallel.sequence=true", "parallel.tensor > 1"]),
        (["parallel.context=2"], 3, ["3 ranks", "parallel.context=2 = 2"]),
        (["parallel.context=2", "parallel.tensor=2", "parallel.data=2"], 4, ["parallel.data=2 = 8"]),
        (
            ["parallel.context=3"],
            None,
            ["data.sequence_length=16", "2 x parallel.context=3", "=2 would fit"],
        ),
        (["parallel.context=16"], None, ["parallel.context=8 would fit"]),
        (
            ["parallel.context=8", "parallel.tensor=4", "parallel.sequence=true"],
            None,
            ["leaves 2 tokens", "parallel.tensor=4"],
        ),
        (
            ["model.implementation=transformer_engine", "parallel.context=2", "data.document_mask=true"],
            None,
            ["keep documents apart", "model.implementation=local", "data.document_mask=false"],
        ),
        (
            ["precision.fp8={emulate: true}", "parallel.context=2"],
            None,
            ["/ parallel.context=2 is 8, not a multiple of 16"],
        ),
        (["batch.global_tokens=1000"], None, ["batch.global_tokens=1000", "992 or 1008"]),
        (["batch.global_tokens=16", "parallel.pipeline=2"], None, ["groups of that size", "32"]),
        (["batch.ramp=[{after: 2k, global_tokens: 1000}]"], None, ["batch.ramp.0.global_tokens=1000"]),
        (
            ["batch.ramp=[{after: 4k, global_tokens: 1Ki}, {after: 2k, global_tokens: 1Ki}]"],
            None,
            ["batch.ramp.1.after"],
        ),
        (["batch.ramp=[{after: 2M, global_tokens: 1Ki}]"], None, ["beyond budget.total"]),
        (["data.sequence_length=64", "model.rope_base=2"], None, ["model.rope_base=2", "data.sequence_length=64"]),
        (["schedule.kind=wsd"], None, ["schedule.decay"]),
        (["schedule.decay=1k"], None, ["schedule.kind=wsd"]),
        (["schedule.warmup=2M"], None, ["schedule.warmup", "budget.total"]),
        (["schedule.min_lr=1"], None, ["schedule.min_lr=1", "optimizer.lr"]),
        (["objective.kind=gate"], None, ["init.checkpoint"]),
        (["objective.kind=gate", "init.checkpoint=x", "model.loops=1"], None, ["at least 2"]),
        (["init.optimizer=true"], None, ["init.checkpoint"]),
        (["budget.total=0"], None, ["nothing to train"]),
        (["checkpoint.every=0"], None, ["checkpoint.every is 0"]),
        (["evaluation.every=1k"], None, ["data.validation"]),
        (["model.implementation=transformer_engine", "training.device=cpu"], None, ["transformer_engine"]),
        (["data.long_documents=drop"], None, ["data.long_documents=drop", "data.packing", "best_fit"]),
        (
            ["model.implementation=transformer_engine", "data.document_mask=true", "precision.compute=fp32"],
            None,
            ["document mask", "precision.compute=bf16"],
        ),
    ],
)
def test_each_rule(tmp_path: Path, overrides: list[str], ranks: int | None, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, *overrides, ranks=ranks)
    for word in words:
        assert word in str(caught.value)


def test_lists_all_problems(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, "parallel.tensor=3", "parallel.pipeline=4", "schedule.min_lr=1")
    assert len(str(caught.value).splitlines()) >= 5


@pytest.mark.parametrize("file", sorted(STAGES.glob("demo/[0-9]*.yaml")), ids=lambda file: file.stem)
def test_shipped_stages(file: Path) -> None:
    recipe = load_recipe(file)
    check_recipe(recipe, ranks_needed(recipe))


@pytest.mark.parametrize(("size", "layers", "billions"), [("1.4b", 24, 1.4), ("2.6b", 48, 2.6)])
def test_published_shapes(tmp_path: Path, size: str, layers: int, billions: float) -> None:
    from ouro_megatron.planning.flops import parameter_counts

    path = tmp_path / "stage.yaml"
    path.write_text(BASE.replace("model: ", "ignored: ").split("ignored")[0] + "\n".join(BASE.splitlines()[2:]))
    path.write_text(f"extends: [{STAGES}/model/ouro-{size}.yaml]\n" + path.read_text())
    recipe = load_recipe(path, ["data.sequence_length=4096", "batch.global_tokens=4Mi", "budget.total=1B"])
    check_recipe(recipe, 64)
    assert recipe.model.layers == layers
    assert parameter_counts(recipe.model).total / 1e9 == pytest.approx(billions, rel=0.04)


@pytest.mark.parametrize(("base", "length"), [(10_000, 4096), (40_000, 16_384), (1_000_000, 65_536)])
def test_published_sequence_lengths_fit_their_rope_base(tmp_path: Path, base: int, length: int) -> None:
    check(
        tmp_path,
        "model.head_dim=128",
        f"model.rope_base={base}",
        f"data.sequence_length={length}",
        f"batch.global_tokens={length}",
    )
