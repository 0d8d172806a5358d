"""`ouro evaluate` gives the loss that training's own evaluation gives, and takes any number of loops."""

from pathlib import Path

import pytest

from ouro_megatron.evaluation.held_out import evaluate_checkpoint
from ouro_megatron.objective.losses import LoopMeans
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord
from tests.distributed.ranks import run_ranks
from tests.training.test_resume import train


def means(path: str, loops: int | None, sequences: int) -> LoopMeans:
    return evaluate_checkpoint(Path(path), loops=loops, sequences=sequences).means


@pytest.mark.distributed
def test_equals_the_trainers_evaluation_at_another_layout(tmp_path: Path) -> None:
    recipe = train(tmp_path, "tp2pp2", name="run", budget={"total": "4 steps"})
    record = [r for r in read_records(recipe.run_folder / "metrics.jsonl") if isinstance(r, EvalRecord)][-1]
    # The trainer evaluates 2 global batches of 8 sequences.
    found = run_ranks(means, 1, str(recipe.run_folder), None, 16)[0]
    assert found.ce == pytest.approx(record.loops.ce, abs=1e-5)
    assert found.loss == pytest.approx(record.loss, abs=1e-5)
    deeper = run_ranks(means, 1, str(recipe.run_folder), 6, 16)[0]
    assert len(deeper.ce) == 6
    assert deeper.ce[:3] == pytest.approx(found.ce, abs=1e-5)
