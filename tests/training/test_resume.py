"""Runs that stop and go on: bit-exact at the same layout, to 1e-5 at any other."""

import math
from pathlib import Path
from typing import Any

import pytest

from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord, StepRecord
from ouro_megatron.training.signals import StopSignals
from ouro_megatron.training.stage import run_stage
from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS: dict[str, dict[str, Any]] = {
    "1x1": {},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
    "tp2pp2sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "dp4": {"data": 4},
    "pp2dp2": {"pipeline": 2, "data": 2},
    "cp2": {"context": 2},
}


def ranks_of(layout: str) -> int:
    sizes = LAYOUTS[layout]
    return math.prod(sizes.get(name, 1) for name in ("tensor", "context", "pipeline", "data"))


def stage(recipe: Recipe) -> bool:
    return run_stage(recipe, StopSignals())


def train(folder: Path, layout: str, **sections: Any) -> Recipe:
    sections["parallel"] = {"timeout_seconds": 60, **LAYOUTS[layout]}
    recipe = tiny_recipe(folder, **sections)
    run_ranks(stage, ranks_of(layout), recipe)
    return recipe


def losses(recipe: Recipe) -> list[float]:
    records = read_records(recipe.run_folder / "metrics.jsonl")
    return [record.loss for record in records if isinstance(record, StepRecord)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], float]:
    """The folder with the data, and the 20 losses of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("with space") / "a run"
    recipe = train(folder, "1x1", name="whole")
    held_out = [r for r in read_records(recipe.run_folder / "metrics.jsonl") if isinstance(r, EvalRecord)]
    return folder, losses(recipe), held_out[-1].loss


def test_training_learns(whole: tuple[Path, list[float], float]) -> None:
    _, curve, held_out = whole
    assert len(curve) == 20
    assert curve[-1] < curve[0] - 0.3
    assert held_out < curve[0] - 0.3


@pytest.mark.parametrize("layout", ["1x1", "tp2pp2", "pp2dp2"])
def test_same_layout_is_bit_exact(whole: tuple[Path, list[float], float], layout: str) -> None:
    folder, _, _ = whole
    straight = losses(train(folder, layout, name=f"straight-{layout}"))
    train(folder, layout, name=f"halves-{layout}", budget={"total": "10 steps"})
    halves = losses(train(folder, layout, name=f"halves-{layout}"))
    assert halves == straight


@pytest.mark.parametrize(
    ("first", "then"),
    [("tp2pp2", "1x1"), ("tp2pp2sp", "dp4"), ("dp4", "tp2pp2"), ("1x1", "pp2dp2"), ("cp2", "1x1"), ("1x1", "cp2")],
)
def test_other_layout_goes_on_the_same(whole: tuple[Path, list[float], float], first: str, then: str) -> None:
    folder, curve, _ = whole
    name = f"{first}-{then}"
    train(folder, first, name=name, budget={"total": "10 steps"})
    resumed = losses(train(folder, then, name=name))
    assert len(resumed) == 20
    assert resumed == pytest.approx(curve, abs=1e-5)


def test_bf16_trains_close_to_fp32_and_its_checkpoint_goes_on_in_fp32(whole: tuple[Path, list[float], float]) -> None:
    folder, curve, _ = whole
    bf16: dict[str, Any] = {"precision": {"compute": "bf16"}}
    low = losses(train(folder, "tp2pp2sp", name="bf16", budget={"total": "10 steps"}, **bf16))
    assert low == pytest.approx(curve[:10], abs=0.02)
    resumed = losses(train(folder, "1x1", name="bf16"))
    assert len(resumed) == 20
    assert resumed[10:] == pytest.approx(curve[10:], abs=0.03)


def test_gate_stage_trains_the_gate_alone_and_resumes(whole: tuple[Path, list[float], float]) -> None:
    import numpy as np

    from ouro_megatron.checkpoint.folder import resolve
    from tests.checkpoint.test_upcycle import read

    folder, _, _ = whole
    gate: dict[str, Any] = {
        "objective": {"kind": "gate"},
        "init": {"checkpoint": str(folder / "runs" / "whole")},
        "name": "gate",
    }
    straight = losses(train(folder, "pp2dp2", **{**gate, "name": "gate-straight"}))
    train(folder, "pp2dp2", budget={"total": "10 steps"}, **gate)
    assert losses(train(folder, "dp4", **gate)) == pytest.approx(straight, abs=1e-5)
    assert straight[-1] < straight[0]
    before, after = (read(resolve(folder / "runs" / name).folder) for name in ("whole", "gate"))
    changed = {name for name in before if name.startswith("weight.") and not np.array_equal(before[name], after[name])}
    assert changed == {"weight.exit_gate.weight", "weight.exit_gate.bias"}
    assert {name for name in after if name.startswith("exp_avg.")} == {
        "exp_avg.exit_gate.weight",
        "exp_avg.exit_gate.bias",
    }


@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_emulated_fp8_goes_on_bit_exactly(whole: tuple[Path, list[float], float], recipe: str) -> None:
    """On two pipeline ranks; delayed scaling finds its histories again."""
    folder, _, _ = whole
    sections: dict[str, Any] = {
        "model": {"layers": 4, "hidden": 64, "heads": 4, "ffn": 64, "vocab": 128, "loops": 2},
        "precision": {"compute": "bf16", "fp8": {"recipe": recipe, "emulate": True, "first_layers_bf16": 1}},
        "batch": {"global_tokens": 256, "microbatch": 2},
        "schedule": {"warmup": "1 steps"},
    }
    short = {"total": "4 steps"}
    straight = losses(train(folder, "pp2dp2", name=f"straight-{recipe}", budget=short, **sections))
    train(folder, "pp2dp2", name=f"halves-{recipe}", budget={"total": "2 steps"}, **sections)
    halves = losses(train(folder, "pp2dp2", name=f"halves-{recipe}", budget=short, **sections))
    assert halves == straight and len(straight) == 4
