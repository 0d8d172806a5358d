"""Stages that begin on a GPU and go on on a CPU, and back: a process each, as `ouro train` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import StepRecord
from tests.gpu.steps import needs_transformer_engine
from tests.tiny import VOCAB, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 128, "vocab": VOCAB, "loops": 3}
DATA = {"sequence_length": 64}
"""The least that graphs take."""


def train(
    recipe: Recipe, steps: int, device: str, implementation: str, compute: str, graphs: bool = False
) -> list[float]:
    """Goes on with `recipe` to `steps` in a process of its own; all losses so far."""
    file = recipe.run_dir / f"{recipe.name}-{device}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    words = [
        f"budget.total={steps} steps",
        f"training.device={device}",
        f"model.implementation={implementation}",
        f"precision.compute={compute}",
        f"training.cuda_graphs={str(graphs).lower()}",
        "evaluation.every=3 steps",
        "checkpoint.every=4 steps",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    code = "from ouro_megatron.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(file), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = read_records(recipe.run_folder / "metrics.jsonl")
    return [record.loss for record in records if isinstance(record, StepRecord)]


@pytest.mark.parametrize(
    ("implementation", "graphs"), [("local", False), ("transformer_engine", False), ("transformer_engine", True)]
)
def test_gpu_to_cpu_and_back(tmp_path: Path, implementation: str, graphs: bool) -> None:
    """The CPU's 20 losses in fp32 are the measure: bf16 on the GPU in between moves them by its rounding only.

    Evaluations and checkpoints come between the steps, of which graphs replay all but the first of a process.
    """
    if implementation == "transformer_engine":
        needs_transformer_engine()
    alone = tiny_recipe(tmp_path, name="alone", model=MODEL, data=DATA)
    straight = train(alone, 20, "cpu", "local", "fp32")
    mixed = tiny_recipe(tmp_path, name="mixed", model=MODEL, data=DATA)
    train(mixed, 7, "cuda", implementation, "bf16", graphs)
    train(mixed, 14, "cpu", "local", "fp32")
    losses = train(mixed, 20, "cuda", implementation, "bf16", graphs)
    assert len(losses) == 20
    assert losses == pytest.approx(straight, rel=2e-2)
    state = json.loads((sorted((mixed.run_folder / "checkpoints").iterdir())[-1] / "state.json").read_text())
    assert state["step"] == 20
