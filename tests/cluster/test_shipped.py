"""The shipped recipes and pipelines against the paper's tables (arXiv 2510.25741, tables 1, 4, 5; section 4.3)."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ouro_megatron.cluster.checks import layout_problems
from ouro_megatron.cluster.pipeline import Job, Pipeline, load_pipeline
from ouro_megatron.cluster.script import render
from ouro_megatron.planning.flops import parameter_counts
from ouro_megatron.recipe.load import load_recipe
from ouro_megatron.recipe.schedule import BatchPlan, LoopPlan, LRSchedule
from ouro_megatron.recipe.validate import check_recipe
from tests.distributed.ranks import ROOT

STAGES = ROOT / "stages"
OURO = Path(sys.executable).with_name("ouro")
CLUSTERS = ("8xh100", "8xh200", "8xa100", "container")
T, B, M = 10**12, 10**9, 2**20
RECIPES = sorted(
    file for folder in ("ouro", "ouro-1.4b", "ouro-2.6b") for file in (STAGES / folder).glob("[0-9]-*.yaml")
)


@dataclass(frozen=True)
class Row:
    """One stage of table 1."""

    tokens: int | None
    lr: float
    final_lr: float
    schedule: str
    batch: int
    sequence: int
    rope: float
    loops: int
    beta: float


TABLE = {
    "1-warmup": Row(20 * B, 3e-4, 3e-4, "constant", 4 * M, 4096, 1e4, 8, 0.1),
    "2-stable-1": Row(3 * T - 20 * B, 3e-4, 3e-4, "constant", 8 * M, 4096, 1e4, 4, 0.1),
    "4-stable-2": Row(3 * T, 3e-4, 3e-4, "constant", 8 * M, 4096, 1e4, 4, 0.05),
    "5-ct-annealing": Row(1400 * B, 3e-4, 3e-5, "cosine", 8 * M, 16384, 4e4, 4, 0.05),
    "6-long-ct": Row(20 * B, 3e-5, 3e-5, "constant", 8 * M, 65536, 1e6, 4, 0.05),
    "7-mid-training": Row(300 * B, 3e-5, 1e-5, "cosine", 8 * M, 32768, 1e6, 4, 0.05),
    "8-reasoning-sft": Row(None, 2e-5, 0.0, "cosine", 4 * M, 32768, 1e6, 4, 0.05),
}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline(STAGES / "ouro")


def row_of(job: Job) -> Row | None:
    return TABLE.get(job.name.removeprefix("1.4b-").removeprefix("2.6b-"))


def test_every_stage_is_as_the_table_says(pipeline: Pipeline) -> None:
    compared = 0
    for job in pipeline.jobs:
        row, recipe = row_of(job), job.recipe
        if row is None or recipe is None:
            continue
        compared += 1
        assert (recipe.budget.total.tokens if recipe.budget.total else None) == row.tokens, job.name
        sizes = [recipe.batch.global_tokens, *(point.global_tokens for point in recipe.batch.ramp)]
        found = (recipe.optimizer.lr, recipe.schedule.kind, sizes[-1], recipe.data.sequence_length)
        assert found == (row.lr, row.schedule, row.batch, row.sequence), job.name
        assert (recipe.model.rope_base, recipe.model.loops, recipe.objective.beta) == (row.rope, row.loops, row.beta)
        long = row.sequence > 4096
        packing = "best_fit" if "sft" in job.name else "none"
        assert (recipe.data.masks_documents, recipe.data.packing) == (long, packing), job.name
        assert recipe.optimizer.betas == (0.9, 0.95)
        assert (recipe.optimizer.weight_decay, recipe.optimizer.clip) == (0.1, 1.0)
        if recipe.budget.total is not None:
            plan = BatchPlan(recipe)
            last = LRSchedule(recipe, plan).at(plan.total_steps - 1)
            assert last == pytest.approx(row.final_lr, rel=1e-6), job.name
    assert compared == 2 + 2 * 5


def test_stage_1a_is_three_trillion_tokens_whose_loops_and_batch_change(pipeline: Pipeline) -> None:
    first, second = (pipeline.job(name).recipe for name in ("1-warmup", "2-stable-1"))
    assert first is not None and second is not None
    plan = BatchPlan(second)
    assert 3 * T <= BatchPlan(first).total_tokens + plan.total_tokens < 3 * T + 3 * second.batch.ramp[0].global_tokens
    change = plan.first_step_at(second.training.early_loops[0].until)
    loops = LoopPlan(second, plan)
    assert [loops.at(0), loops.at(change - 1), loops.at(change), loops.at(plan.total_steps - 1)] == [8, 8, 4, 4]
    assert (plan.at(change - 1).tokens, plan.at(change).tokens) == (4 * M, 8 * M)


@pytest.mark.parametrize(("size", "layers", "parameters"), [("1.4b", 24, 1.434e9), ("2.6b", 48, 2.668e9)])
def test_sizes_of_every_stage(pipeline: Pipeline, size: str, layers: int, parameters: float) -> None:
    jobs = [job for job in pipeline.jobs if job.name.startswith(size) and job.recipe is not None]
    assert len(jobs) == 6
    for job in jobs:
        assert job.recipe is not None
        assert job.recipe.model.layers == layers
        assert parameter_counts(job.recipe.model).total == pytest.approx(parameters, rel=1e-3)


def test_the_gate_stage_has_the_papers_label() -> None:
    for size in ("1.4b", "2.6b"):
        recipe = load_recipe(STAGES / f"ouro-{size}" / "9-gate.yaml")
        assert recipe.objective.kind == "gate"
        assert (recipe.objective.gate_slope, recipe.objective.gate_threshold) == (50, 0.005)
        assert recipe.budget.total is not None and recipe.budget.epochs is None


def blend(name: str) -> dict[str, float]:
    recipe = load_recipe(
        STAGES / "ouro" / "base.yaml",
        ["name=x", "data.sequence_length=8", "optimizer.lr=1", "batch.global_tokens=8", "budget.total=8"]
        + [f"data.{key}={value}" for key, value in blend_file(name).items()],
    )
    return {entry.path.name: entry.share for entry in recipe.data.train}


def blend_file(name: str) -> dict[str, str]:
    import json

    import yaml

    return {
        key: json.dumps(value) for key, value in yaml.safe_load((STAGES / "data" / name).read_text())["data"].items()
    }


def test_blends() -> None:
    first, second, last = blend("stage-1.yaml"), blend("ct-annealing.yaml"), blend("mid-training.yaml")
    assert first == {
        "nemotron-cc": 73.4,
        "map-cc": 13.0,
        "ultra-fineweb-zh": 2.0,
        "opencoder-pretrain": 7.5,
        "megamath-web": 4.1,
    }
    assert second == {
        "nemotron-cc-high-quality": 66.5,
        "nemotron-cc-math-v1": 15.0,
        "megamath-high-quality": 4.6,
        "opencoder-annealing": 0.5,
        "nemotron-synthetic-code": 3.8,
        "nemotron-sft-code": 3.4,
        "nemotron-sft-general": 6.2,
    }
    for mixture in (first, second, last):
        assert sum(mixture.values()) == pytest.approx(100)
    # 300B tokens: 90B of instructions, replays of 30B of stage 1 and 180B of annealing in their own proportions.
    assert last.pop("mid-training-sft") == 30.0
    expected = {name: weight * 0.1 for name, weight in first.items()} | {
        name: weight * 0.6 for name, weight in second.items()
    }
    assert last == pytest.approx(expected)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_recipe_passes_the_check_and_is_small(file: Path) -> None:
    check_recipe(load_recipe(file))
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 15, "one file a stage, small because of `extends`"


def test_all_files_at_the_command_line() -> None:
    words = [str(OURO), "recipe", "check", *map(str, RECIPES), "--nproc", "64"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": good") == len(RECIPES) == 14


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("folder", ["ouro", "ouro-1.4b", "ouro-2.6b"])
def test_layouts_fit_the_nodes_and_scripts_are_valid_bash(folder: str, cluster: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(STAGES / folder, cluster=STAGES / "cluster" / f"{cluster}.yaml")
    assert not [problem for job in pipeline.jobs for problem in layout_problems(job, pipeline.cluster)]
    for job in pipeline.jobs:
        script = tmp_path / f"{job.name}.sbatch"
        script.write_text(render(job, pipeline.cluster, pipeline.name, tmp_path))
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
        text = script.read_text()
        assert (f"--container-image={tmp_path}/images/ouro.sqsh" in text) == (cluster == "container")
        for option in ("--requeue", "--kill-on-invalid-dep=yes", f"--time={job.time}"):
            assert f"#SBATCH {option}\n" in text
    shellcheck = shutil.which("shellcheck")
    if shellcheck is not None:
        subprocess.run([shellcheck, "-S", "error", str(script)], check=True, timeout=60)


@pytest.mark.parametrize("cluster", [*CLUSTERS, "cpu"])
def test_the_twin_fits_one_node(cluster: str) -> None:
    pipeline = load_pipeline(STAGES / "ouro", cluster=STAGES / "cluster" / f"{cluster}.yaml", twin=True)
    assert {job.nodes for job in pipeline.jobs} == {1}
    assert not [problem for job in pipeline.jobs for problem in layout_problems(job, pipeline.cluster)]


def test_the_branches_share_stages_1_and_2(pipeline: Pipeline) -> None:
    names = [job.name for job in pipeline.jobs]
    assert len(names) == len(set(names)) == 2 + 6 + 1 + 6
    assert pipeline.job("1.4b-4-stable-2").needs == ("2-stable-1",)
    assert pipeline.job("2.6b-3-branch").needs == ("2-stable-1",)
    assert pipeline.job("2.6b-4-stable-2").needs == ("2.6b-3-branch",)
    chosen = [job.name for job in pipeline.between("2.6b-3-branch", "2.6b-5-ct-annealing")]
    assert chosen == ["2.6b-3-branch", "2.6b-4-stable-2", "2.6b-5-ct-annealing"]
    assert [job.name for job in pipeline.between(None, "1-warmup")] == ["1-warmup"]
