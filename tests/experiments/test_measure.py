"""What is measured of a trained cell, against the slow way: real decoding, token by token scores, the run's metrics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ouro_megatron.evaluation.likelihood import Continuation
from ouro_megatron.evaluation.session import ModelSession, Prompt
from ouro_megatron.experiments.cells import cells_of
from ouro_megatron.experiments.plan import Sweep, save_plan
from ouro_megatron.experiments.run import run_cell
from ouro_megatron.experiments.settings import ExperimentFile
from ouro_megatron.experiments.tasks.capo import Capo, known_bits
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord
from ouro_megatron.training.signals import StopSignals
from tests.distributed.ranks import run_ranks

RECIPE: dict[str, Any] = {
    "model": {"hidden": 16, "heads": 2, "ffn": 32, "init_std": 0.2},
    "data": {"packing": "in_order", "sequence_length": 51},
    "objective": {"kind": "last_loop"},
    "optimizer": {"lr": 1e-2},
    "batch": {"global_tokens": 204, "microbatch": 4},
    "precision": {"compute": "fp32"},
    "training": {"device": "cpu"},
    "evaluation": {"batches": 2},
    "logging": {"wandb": {"mode": "disabled"}, "every": 100},
}


def swept(
    folder: Path, task: dict[str, Any], measure: str, objective: dict[str, Any], steps: int = 30
) -> tuple[Sweep, dict[str, Any]]:
    """One cell of 1 x 2, trained and measured in this process."""
    values = {
        "title": "t",
        "task": task,
        "examples": 400,
        "test_examples": 40,
        "shapes": ["1x2"],
        "claims": [],
        "seeds": 1,
        "measure": measure,
        "recipe": {**RECIPE, "objective": objective, "budget": {"total": f"{steps} steps"}},
    }
    sweep = Sweep("mano", "test", ExperimentFile.model_validate(values), folder)
    save_plan(sweep)
    cell = cells_of(sweep.settings)[0]
    assert run_cell(sweep, cell, StopSignals())
    result = sweep.result(cell)
    assert result is not None
    return sweep, result["metrics"]


def measured(folder: Path) -> dict[str, Any]:
    """Runs in a process of its own: our numbers and those found the slow way."""
    found: dict[str, Any] = {}
    last = {"kind": "last_loop"}
    sweep, found["accuracy"] = swept(folder / "a", {"kind": "mano", "operations": 2, "modulus": 2}, "accuracy", last)
    cell = cells_of(sweep.settings)[0]
    corpus = sweep.corpus(cell)
    assert corpus is not None
    session = ModelSession(sweep.run_folder(cell))
    pairs = corpus.tests()["l=2"]
    prompts = [Prompt(tuple(prompt), 1) for prompt, _ in pairs]
    answers = session.generate(prompts, ExitPolicy(step=2), 2, 20)
    words = session.tokenizer.decode
    found["decoded"] = [
        item.text.strip() == words(answer).strip() for item, (_, answer) in zip(answers, pairs, strict=True)
    ]
    session.close()

    people = {"kind": "capo", "people": 20, "names": [4, 4, 4], "dates": [3, 3, 3], "cities": 3, "universities": 3}
    sweep, found["bits"] = swept(folder / "b", {**people, "majors": 3, "employers": 3}, "bits", last, 150)
    task = Capo(people=20, names=(4, 4, 4), dates=(3, 3, 3), cities=3, universities=3, majors=3, employers=3)
    examples = task.biographies(np.argsort(np.random.default_rng(5).random((20, 5)), axis=1))
    session = ModelSession(sweep.run_folder(cells_of(sweep.settings)[0]))
    nats = []
    for places in task.value_places(examples):
        asked = [
            Continuation(examples.tokens[row, :place].tolist(), [int(examples.tokens[row, place])])
            for row, place in zip(*np.nonzero(places), strict=True)
        ]
        nats.append(-sum(item.logprob for item in session.score(asked, ExitPolicy(step=2), 2, 20)) / 20)
    session.close()
    found["slow bits"] = known_bits(task, *nats)

    task_values = {"kind": "mano", "operations": 2, "modulus": 3}
    sweep, found["depth"] = swept(folder / "c", task_values, "depth", {"kind": "expected_loss"})
    records = read_records(sweep.run_folder(cells_of(sweep.settings)[0]) / "metrics.jsonl")
    found["last evaluation"] = next(r for r in reversed(records) if isinstance(r, EvalRecord)).loops
    return found


@pytest.mark.timeout(200)
def test_numbers_are_those_found_the_slow_way(tmp_path: Path) -> None:
    found = run_ranks(measured, 1, tmp_path)[0]
    assert 0 < len(found["decoded"]) <= 40
    share = 100 * sum(found["decoded"]) / len(found["decoded"])
    assert found["accuracy"]["accuracy l=2"] == pytest.approx(share) and 0 < share < 100

    names, attributes = found["slow bits"]
    assert attributes > 0, "150 steps are enough to know more than nothing"
    assert found["bits"]["attribute bits"] == pytest.approx(attributes, rel=1e-4)
    assert found["bits"]["bits"] == pytest.approx(names + attributes, rel=1e-4)
    per_parameter = found["bits"]["bits"] / found["bits"]["parameters"]
    assert found["bits"]["bits per parameter"] == pytest.approx(per_parameter)

    depth, loops = found["depth"], found["last evaluation"]
    assert [depth["loss loop 1"], depth["loss loop 2"]] == loops.ce and depth["loss last loop"] == loops.ce[1]
    assert depth["exits at loop 1"] + depth["exits at last loop"] == pytest.approx(100)
    assert depth["expected depth"] == pytest.approx(1 + depth["exits at last loop"] / 100, abs=1e-6)
