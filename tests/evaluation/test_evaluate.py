"""`ouro eval`: the trainer's own losses, any number of loops, any kind of model folder, one rank or two."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ouro_megatron.errors import DataError, RecipeError
from ouro_megatron.evaluation.evaluate import EvaluationSettings, default_out, evaluate
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ParallelSection
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EvalRecord
from tests.checkpoint.huggingface.published import CONFIG, reference, write_published
from tests.distributed.ranks import RankFailure, run_ranks
from tests.training.test_resume import train

OURO = Path(sys.executable).with_name("ouro")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("evaluate") / "published", dict(reference().state_dict()))


def run(path: Path, settings: EvaluationSettings, out: Path | None = None) -> dict[str, Any]:
    return evaluate(path, settings, out=out).as_json()


@pytest.mark.distributed
def test_equals_the_trainers_evaluation_and_goes_deeper(tmp_path: Path) -> None:
    recipe = train(tmp_path, "tp2pp2", name="run", budget={"total": "4 steps"})
    record = [r for r in read_records(recipe.run_folder / "metrics.jsonl") if isinstance(r, EvalRecord)][-1]
    # The trainer evaluates 2 global batches of 8 sequences.
    result = subprocess.run(
        [str(OURO), "eval", str(recipe.run_folder), "--sequences", "16", "--loops", "5"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((recipe.run_folder / "evaluation" / "evaluation.json").read_text())
    assert (recipe.run_folder / "evaluation" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    losses = [row["loss"] for row in found["quality"]]
    assert len(losses) == 5 and losses[:3] == pytest.approx(record.loops.ce, abs=1e-5)
    exits = [row["exit_probability"] for row in found["quality"]]
    assert exits == pytest.approx([*record.loops.exit_probability, 0, 0], abs=1e-5)
    assert found["expected_depth"] == pytest.approx(record.loops.expected_depth, abs=1e-4)
    # This corpus's tokens are one byte each; ends of documents are none.
    ends = sum(row["tokens"] for row in found["classes"] if row["name"] == "end of document")
    assert found["text_bytes"] == found["tokens"] - ends == 16 * 32 - ends
    for row in found["quality"]:
        bits = row["loss"] * found["tokens"] / math.log(2) / found["text_bytes"]
        assert row["bits_per_byte"] == pytest.approx(bits)
    curve = found["curve"]
    assert (curve[0]["mean_loops"], curve[-1]["mean_loops"]) == (1.0, 3.0)
    assert (curve[0]["loss"], curve[-1]["loss"]) == pytest.approx((losses[0], losses[2]), abs=1e-6)
    assert len(found["gates"]) == 2 and sum(row["tokens"] for row in found["classes"]) == found["tokens"]
    assert (
        default_out(recipe.run_folder / "checkpoints" / "step-00000004") == (recipe.run_folder / "evaluation").resolve()
    )


@pytest.mark.distributed
def test_published_folder_on_text_with_tensor_parallelism(published: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 12)
    settings = EvaluationSettings(loops=6, sequences=3, text=(text,), sequence_length=100)
    alone = run_ranks(run, 1, published, settings, tmp_path / "out")[0]
    first, second = run_ranks(run, 2, published, settings, tmp_path / "parallel")
    assert first == second
    assert alone["tokens"] == 300 and alone["trained_loops"] == CONFIG.loops
    for one, other in zip(alone["quality"], first["quality"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["accuracy"] == other["accuracy"]
    short = EvaluationSettings(loops=1, sequences=99, text=(text,), sequence_length=100)
    # 12 x 27 letters and the end of the document, of which the first is no label.
    assert run_ranks(run, 1, published, short)[0]["tokens"] == 12 * 27


def test_what_cannot_be_evaluated(published: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--loops 0"):
        evaluate(published, EvaluationSettings(loops=0))
    for settings, message in (
        (EvaluationSettings(), "names no data.validation; give --data PREFIX"),
        (EvaluationSettings(text=(tmp_path / "nowhere.txt",)), "nowhere.txt cannot be read"),
        (EvaluationSettings(text=(published,), data=(published,)), "--data or --text, not both"),
    ):
        with pytest.raises(RankFailure, match=message) as caught:
            run_ranks(run, 1, published, settings, tmp_path / "out")
        assert DataError.__name__ in str(caught.value)
    assert not (tmp_path / "out").exists()


def evaluate_in_a_pipeline(path: Path) -> str:
    from ouro_megatron.checkpoint.load import load_for_inference
    from ouro_megatron.evaluation.evaluate import evaluate_loaded

    context = create_context(ParallelSection(pipeline=2))
    try:
        evaluate_loaded(load_for_inference(path, context=context), EvaluationSettings(text=(Path("x"),)))
    except (RecipeError, DataError) as error:
        return str(error)
    finally:
        context.close()
    return "no error"


@pytest.mark.distributed
def test_a_pipeline_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    even = replace(CONFIG, layers=4)
    folder = write_published(tmp_path / "published", dict(reference(even).state_dict()), even)
    messages = run_ranks(evaluate_in_a_pipeline, 2, folder)
    assert all("without pipeline" in message for message in messages)
