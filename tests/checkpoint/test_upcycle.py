"""Upcycling copies the right layers, optimizer included, and the result trains at any layout."""

from pathlib import Path

import numpy as np
import pytest
from megatron.core import dist_checkpointing

from ouro_megatron.checkpoint.folder import problem_with, resolve
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.checkpoint.upcycle import LayerMap, layer_map
from ouro_megatron.errors import CheckpointError
from ouro_megatron.evaluation.upcycled import upcycle_and_compare
from tests.distributed.ranks import run_ranks
from tests.training.test_resume import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the data and a run `base` of four layers, saved from TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("upcycle")
    train(folder, "tp2pp2", name="base", budget={"total": "6 steps"})
    return folder


def tensors(folder: str) -> dict[str, np.ndarray]:
    from ouro_megatron.parallel.context import create_context
    from ouro_megatron.recipe.schema import ParallelSection

    context = create_context(ParallelSection())
    loaded = {name: tensor.numpy().copy() for name, tensor in dist_checkpointing.load_plain_tensors(folder).items()}
    context.close()
    return loaded


def read(folder: Path) -> dict[str, np.ndarray]:
    return run_ranks(tensors, 1, str(folder))[0]


def run_upcycle(
    source: Path, target: Path, layers: int, kind: LayerMap, optimizer: bool, scale: float = 1.0
) -> tuple[float, float]:
    compared = upcycle_and_compare(source, target, layers, kind, optimizer=optimizer, residual_scale=scale, sequences=8)
    assert compared is not None
    before, after = compared
    assert (before.layers, after.layers) == (4, layers)
    return before.means.loss, after.means.loss


@pytest.mark.parametrize(
    ("kind", "order"), [("stack", [0, 1, 2, 3, 0, 1, 2, 3]), ("interleave", [0, 0, 1, 1, 2, 2, 3, 3])]
)
def test_layers_and_moments_are_copied(trained: Path, tmp_path: Path, kind: LayerMap, order: list[int]) -> None:
    target = tmp_path / "deep er"
    before, after = run_ranks(run_upcycle, 1, trained / "runs" / "base", target, 8, kind, True)[0]
    assert 0 < before < 10 and 0 < after < 10
    assert problem_with(target) is None
    old, new = read(resolve(trained / "runs" / "base").folder), read(target)
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        for layer, source in enumerate(order):
            for part in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "post_mlp_norm.weight"):
                assert np.array_equal(
                    new[f"{key}.decoder.layers.{layer}.{part}"], old[f"{key}.decoder.layers.{source}.{part}"]
                )
        assert np.array_equal(new[f"{key}.output_layer.weight"], old[f"{key}.output_layer.weight"])
    state = read_state(target)
    assert state.recipe["model"]["layers"] == 8
    assert [record.kind for record in state.history] == ["training", "upcycle"]
    assert state.optimizer_steps == 6


@pytest.mark.distributed
def test_the_deeper_model_trains_on_another_layout(trained: Path) -> None:
    target = trained / "deeper"
    run_ranks(run_upcycle, 1, trained / "runs" / "base", target, 8, "stack", False)
    assert not any(name.startswith("exp_avg") for name in read(target))
    recipe = train(
        trained,
        "pp2dp2",
        name="deep",
        model={"layers": 8},
        init={"checkpoint": str(target)},
        budget={"total": "4 steps"},
    )
    state = read_state(resolve(recipe.run_folder).folder)
    assert [record.name for record in state.history] == ["base", "stack to 8 layers"]
    with pytest.raises(AssertionError, match=r"no optimizer state.*init\.optimizer=false"):
        init = {"checkpoint": str(target), "optimizer": True}
        train(trained, "1x1", name="with-optimizer", model={"layers": 8}, init=init)


def test_residual_scale_shrinks_what_layers_add_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    source = trained / "runs" / "base"
    for scale in (1.0, 0.5):
        run_ranks(run_upcycle, 1, source, tmp_path / f"by {scale}", 8, "interleave", True, scale)
    plain, scaled = read(tmp_path / "by 1.0"), read(tmp_path / "by 0.5")
    for name, values in plain.items():
        factor = 0.5 if name.startswith("weight.") and ".post_" in name else 1.0
        assert np.array_equal(scaled[name], values * factor), name
    assert "residual scale 0.5" in read_state(tmp_path / "by 0.5").history[-1].detail


def test_layer_maps() -> None:
    assert layer_map("stack", 2, 6) == [0, 1, 0, 1, 0, 1]
    assert layer_map("interleave", 2, 6) == [0, 0, 0, 1, 1, 1]
    for layers in (2, 3, 1):
        with pytest.raises(CheckpointError, match="multiple"):
            layer_map("stack", 2, layers)


def test_target_must_be_new(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exists already"):
        run_ranks(run_upcycle, 1, trained / "runs" / "base", tmp_path, 8, "stack", False)
