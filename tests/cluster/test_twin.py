"""The small twin of the whole shipped chain, warmup to both gates: the same files, one fragment over them."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ouro_megatron.checkpoint.folder import resolve
from ouro_megatron.checkpoint.state import RunState, read_state, tokens_in_all
from ouro_megatron.cluster.pipeline import Pipeline, load_pipeline
from ouro_megatron.cluster.status import status
from ouro_megatron.cluster.submit import plan, run_here
from ouro_megatron.data.indexed import check_prefix
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.telemetry.metrics_file import read_records
from ouro_megatron.telemetry.records import EventRecord, StepRecord
from ouro_megatron.telemetry.report import write_report
from tests.checkpoint.test_upcycle import read
from tests.cluster.data import write_data
from tests.distributed.ranks import ROOT, run_ranks
from tests.training.test_resume import stage

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SIZES = ("1.4b", "2.6b")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """All steps of both sizes, run."""
    folder, before = tmp_path_factory.mktemp("twin"), Path.cwd()
    os.chdir(folder)
    try:
        pipeline = load_pipeline(ROOT / "stages" / "ouro", ["model.vocab=128", "parallel.pipeline=2"], twin=True)
        write_data(pipeline)
        assert run_here(pipeline, plan(pipeline), train, print) == 0
        yield pipeline
    finally:
        os.chdir(before)


def train(recipe: Recipe) -> int:
    from ouro_megatron.data.complete import complete

    return 0 if all(run_ranks(stage, 2, complete(recipe))) else 75


def state_of(pipeline: Pipeline, name: str) -> RunState:
    return read_state(resolve(pipeline.job(name).run_folder).folder)


def steps_of(pipeline: Pipeline, name: str) -> list[StepRecord]:
    records = read_records(pipeline.job(name).run_folder / "metrics.jsonl")
    return [record for record in records if isinstance(record, StepRecord)]


def test_every_step_is_finished_and_learns_finite_numbers(chain: Pipeline) -> None:
    assert {step.name: step.state for step in status(chain)} == {job.name: "finished" for job in chain.jobs}
    assert not plan(chain).submit, "a second submission must find nothing to do"
    for job in chain.jobs:
        if job.recipe is not None:
            assert all(np.isfinite(step.loss) and not step.skipped for step in steps_of(chain, job.name))


def test_loops_and_batch_change_inside_stable_1(chain: Pipeline) -> None:
    steps = steps_of(chain, "2-stable-1")
    loops = [len(step.loops.ce) for step in steps]
    assert loops[0] == 8 and loops[-1] == 4
    assert [step.global_tokens for step in steps] == [2048 if loop == 8 else 4096 for loop in loops]
    events = read_records(chain.job("2-stable-1").run_folder / "metrics.jsonl")
    assert any(isinstance(event, EventRecord) and "8 -> 4 loops" in event.message for event in events)


@pytest.mark.parametrize("size", SIZES)
def test_the_lineage_of_the_last_stage_is_the_whole_chain(chain: Pipeline, size: str) -> None:
    state = state_of(chain, f"{size}-9-gate")
    made = ["stack to 4 layers"] if size == "2.6b" else []
    own = ["4-stable-2", "5-ct-annealing", "6-long-ct", "7-mid-training", "8-reasoning-sft"]
    expected = ["1-warmup", "2-stable-1", *made, *(f"{size}-{name}" for name in own)]
    assert [record.name for record in state.history] == expected
    assert tokens_in_all(state) == sum(
        steps_of(chain, name)[-1].tokens for name in [*expected, f"{size}-9-gate"] if name not in made
    )
    facts = {record.name: record.facts for record in state.history if record.facts}
    lengths = [facts[f"{size}-{name}"]["sequence_length"] for name in own]
    assert lengths == [32, 128, 512, 256, 256]
    assert [facts[f"{size}-{name}"]["rope_base"] for name in own] == [1e4, 4e4, 1e6, 1e6, 1e6]
    assert all(facts[f"{size}-{name}"]["layers"] == (2 if size == "1.4b" else 4) for name in own)


@pytest.mark.parametrize("size", SIZES)
def test_both_sizes_go_on_in_the_same_blend_after_stable_1(chain: Pipeline, size: str) -> None:
    first, second = state_of(chain, "1-warmup"), state_of(chain, "2-stable-1")
    assert second.first_sample == first.samples
    stable = state_of(chain, f"{size}-4-stable-2")
    assert stable.first_sample == first.samples + second.samples
    assert stable.optimizer_steps == sum(
        len(steps_of(chain, name)) for name in ("1-warmup", "2-stable-1", f"{size}-4-stable-2")
    )
    assert state_of(chain, f"{size}-5-ct-annealing").first_sample == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_gate_stage_leaves_the_language_model_alone(chain: Pipeline, size: str) -> None:
    before, after = (
        read(resolve(chain.job(f"{size}-{name}").run_folder).folder) for name in ("8-reasoning-sft", "9-gate")
    )
    changed = {name for name in after if name.startswith("weight.") and not np.array_equal(before[name], after[name])}
    assert changed == {"weight.exit_gate.weight", "weight.exit_gate.bias"}


def test_sft_counts_in_epochs(chain: Pipeline) -> None:
    recipe = Recipe.model_validate(state_of(chain, "1.4b-8-reasoning-sft").recipe)
    shares = [entry.share for entry in recipe.data.train]
    assert shares == [check_prefix(entry.path, 128).tokens for entry in recipe.data.train], "weights by tokens"
    assert steps_of(chain, "1.4b-8-reasoning-sft")[-1].tokens == 2 * 2048


def test_the_report_covers_all_stages(chain: Pipeline) -> None:
    page = write_report(chain.jobs[0].run_folder.parent, None).read_text()
    assert all(job.name in page for job in chain.jobs if job.recipe is not None)
