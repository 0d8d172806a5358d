"""Plans of the published sizes: golden numbers, what must hold of any plan, and the command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ouro_megatron.cli.main import app
from ouro_megatron.errors import RecipeError
from ouro_megatron.planning.hardware import GIB, GPUS, gpu_named
from ouro_megatron.planning.memory import rank_memory, rank_parameters
from ouro_megatron.planning.plan import Plan
from ouro_megatron.planning.search import best_plans, plan_for
from ouro_megatron.recipe.load import load_recipe
from ouro_megatron.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "stage.yaml"
    file.write_text(
        f"extends: {ROOT}/stages/model/ouro-1.4b.yaml\n"
        "name: planned\n"
        "data: {sequence_length: 4096, tokenizer: /none, train: [{path: /none/x, weight: 1}]}\n"
        "optimizer: {lr: 3.0e-4}\n"
        "batch: {global_tokens: 4Mi, microbatch: 1}\n"
        "budget: {total: 3T}\n"
    )
    return file


def load(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, list(overrides))


@pytest.mark.parametrize(("layers", "parameters"), [(24, 1_434_652_673), (48, 2_667_974_657)])
def test_parameters_of_the_published_sizes(recipe_file: Path, layers: int, parameters: int) -> None:
    whole = plan_for(load(recipe_file, f"model.layers={layers}"), 1, GPUS["h100"])
    assert rank_parameters(whole.layout, 0) == parameters
    cut = plan_for(load(recipe_file, f"model.layers={layers}", "parallel.pipeline=4"), 4, GPUS["h100"])
    assert sum(rank_parameters(cut.layout, rank) for rank in range(4)) == parameters


def test_golden_memory_of_the_1_4b_on_one_gpu(recipe_file: Path) -> None:
    memory = rank_memory(plan_for(load(recipe_file), 1, GPUS["h200"]).layout, 0)
    assert memory.weights == 2 * 1_434_652_673
    assert memory.gradients == 4 * 1_434_652_673
    assert memory.optimizer == 12 * 1_434_652_673
    assert memory.visits_in_flight == 4
    # 24 layers x 4 visits x 4096 tokens of 18.25 hidden widths in bf16, and the odd rest: worked out by hand.
    layer = 2 * 4096 * (6 * 2048 + 4 * 2048 + 3 * 5632) + 16 * 4096 + 64 * 4096
    visit = 24 * layer + 2 * 4096 * 2048 * 2 + 4 * 4096 + 4 * 4096 * 2048 + 40 * 4096
    assert memory.activations == 4 * visit
    assert 27.6 < memory.activations / GIB < 27.7


GOLDEN = {
    # Layers, overrides: layers by rank, parameters by rank, visits, activations in GiB, bubble, FLOPs a token.
    "1.4B": (
        ("model.layers=24", "parallel.pipeline=4"),
        (7, 6, 6, 5),
        (460_382_208, 308_330_496, 308_330_496, 357_609_473),
        (38.263, 29.383, 25.926, 19.573),
        36_842_766_336,
    ),
    "2.6B": (
        ("model.layers=48", "parallel.pipeline=4", "parallel.tensor=2", "parallel.sequence=true"),
        (13, 12, 12, 11),
        (384_409_600, 308_379_648, 308_379_648, 333_017_089),
        (35.403, 29.250, 25.809, 20.920),
        71_269_613_568,
    ),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_numbers_of_both_sizes(recipe_file: Path, size: str) -> None:
    overrides, layers, parameters, activations, flops = GOLDEN[size]
    plan = plan_for(load(recipe_file, *overrides), 64, GPUS["h100"])
    assert plan.layout.layers == layers and plan.flops_per_token == flops
    assert tuple(memory.parameters for memory in plan.memory) == parameters
    assert tuple(memory.visits_in_flight for memory in plan.memory) == (19, 17, 15, 13)
    assert [memory.activations / GIB for memory in plan.memory] == pytest.approx(activations, abs=2e-3)
    for memory, count in zip(plan.memory, parameters, strict=True):
        assert (memory.weights, memory.gradients) == (2 * count, 4 * count)
        assert memory.optimizer == 12 * count / plan.layout.data


def test_bytes_by_link_and_purpose(recipe_file: Path) -> None:
    plan = plan_for(load(recipe_file, *GOLDEN["2.6B"][0]), 64, GPUS["h100"])
    first, middle = plan.traffic[0], plan.traffic[1]
    visits, hidden = 4 * plan.layout.microbatches, 4096 * 2048 * 2
    # Two all-reduces forward and two backward in each layer's visit, half of each state from either rank.
    assert first.by_purpose(in_node=True) == {"tensor": visits * 13 * 4 * hidden}
    # A state there and a gradient back each visit; the first rank's first loop sends no gradient.
    assert (
        middle.pipeline == 2 * visits * hidden / 2
        and first.pipeline == (2 * visits - plan.layout.microbatches) * hidden / 2
    )
    assert set(first.by_purpose(in_node=False)) == {"pipeline", "data"}
    assert first.data == 7 / 8 * 384_409_600 * (4 + 2)
    assert first.between_nodes == first.pipeline + first.data


def test_limit_names_the_two_largest_costs(recipe_file: Path) -> None:
    said = plan_for(load(recipe_file, "training.recompute=full"), 8, GPUS["h100"]).limit()
    assert "recomputation, " in said and "training.recompute=selective" in said and said.count("of the step") == 2


def test_bubble_mfu_and_shares_agree(recipe_file: Path) -> None:
    plan = plan_for(load(recipe_file, "parallel.pipeline=4"), 64, GPUS["h100"])
    assert plan.layout.layers == (7, 6, 6, 5)
    assert sum(plan.shares().values()) == pytest.approx(1.0)
    assert plan.tokens_per_second == pytest.approx(4 * 2**20 / plan.step_seconds)
    assert plan.mfu == pytest.approx(plan.tokens_per_second * 36.8e9 / (64 * 989e12), rel=2e-3)
    assert plan.days == pytest.approx(3e12 / plan.tokens_per_second / 86400, rel=1e-3)


def test_more_of_each_cure_needs_less_memory(recipe_file: Path) -> None:
    def peak(*overrides: str) -> float:
        return plan_for(load(recipe_file, *overrides), 8, GPUS["h100"]).peak_bytes

    plain = peak()
    full, selective = peak("training.recompute=full"), peak("training.recompute=selective")
    some = peak("training.recompute=full", "training.recompute_loops=2")
    assert full < some < plain and full < selective < plain
    assert peak("parallel.tensor=2", "parallel.sequence=true") < peak("parallel.tensor=2") < plain
    few = plan_for(load(recipe_file, "objective.chunk_tokens=256"), 8, GPUS["h100"]).memory[0].head
    many = plan_for(load(recipe_file), 8, GPUS["h100"]).memory[0].head
    assert many - few == 2 * (1024 - 256) * 49_152  # bf16 logits, whose memory their gradient takes


def test_a_layout_that_does_not_fit_says_what_to_change(recipe_file: Path) -> None:
    plan = plan_for(load(recipe_file, "batch.microbatch=8"), 8, GPUS["a100"])
    assert not plan.fits
    assert "activations" in plan.limit() and "training.recompute" in plan.limit()


def test_search_ranks_what_fits_first(recipe_file: Path) -> None:
    plans = best_plans(load(recipe_file, "model.layers=48"), 64, GPUS["h100"])
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True) and fits[0]
    seconds = [plan.step_seconds for plan in plans if plan.fits]
    assert seconds == sorted(seconds)
    assert {plan.layout.world for plan in plans} == {64}
    assert len({(plan.layout.tensor, plan.layout.pipeline, plan.layout.microbatch) for plan in plans}) == len(plans)


def test_search_without_any_layout(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="no layout of 'planned' runs on 7 GPUs"):
        best_plans(load(recipe_file), 7, GPUS["h100"])


def test_unknown_gpu() -> None:
    with pytest.raises(RecipeError, match="h100, h200"):
        gpu_named("v100")


def test_command_leaves_pictures_and_numbers(recipe_file: Path, tmp_path: Path) -> None:
    picture, trace = tmp_path / "out" / "s.png", tmp_path / "out" / "s.json"
    command = ["plan", str(recipe_file), "parallel.pipeline=2", "--gpus", "16", "--json"]
    result = CliRunner().invoke(app, [*command, "--picture", str(picture), "--trace", str(trace)])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.output)
    assert numbers["pipeline"] == 2 and len(numbers["memory"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    tasks = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(tasks) == 2 * 2 * 4 * min(12, numbers["microbatches"])


def test_command_shows_tables(recipe_file: Path) -> None:
    shown = CliRunner().invoke(app, ["plan", str(recipe_file), "--gpus", "8"])
    assert shown.exit_code == 0 and "GPU-hours" in shown.output and "Limit:" in shown.output
    ranked = CliRunner().invoke(app, ["plan", str(recipe_file), "--gpus", "8", "--search", "--rows", "3"])
    assert ranked.exit_code == 0 and "Best: parallel.tensor=" in ranked.output


SHIPPED = sorted(
    file for size in ("ouro", "ouro-1.4b", "ouro-2.6b") for file in (ROOT / "stages" / size).glob("[0-9]*")
)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_shipped_stages_fit_into_every_gpu(file: Path) -> None:
    # The length of a stage says nothing about its memory; epochs could only be counted with the data at hand.
    recipe = load(file, "budget={total: 1T}", "batch.ramp=[]", "training.early_loops=[]")
    for gpu in GPUS.values():
        plan = plan_for(recipe, 64, gpu)
        assert plan.fits, (gpu.name, plan.limit())


def test_context_parallelism_in_plan_and_search(recipe_file: Path) -> None:
    long = ("data.sequence_length=65536", "model.rope_base=1e6", "training.recompute=full")
    whole = plan_for(load(recipe_file, *long, "parallel.data=8"), 8, GPUS["h100"])
    cut = plan_for(load(recipe_file, *long, "parallel.context=8"), 8, GPUS["h100"])
    assert cut.layout.describe() == "TP 1 x CP 8 x PP 1 x DP 1"
    assert cut.layout.step_tokens == whole.layout.step_tokens
    assert cut.memory[0].activations == pytest.approx(whole.memory[0].activations / 8, rel=0.01)
    assert cut.memory[0].optimizer == whole.memory[0].optimizer  # shared over data- and context-parallel ranks alike
    # Forward, recomputed forward and backward each move the keys and values of seven eighths of a sequence.
    moved = 2 * 2 * 65_536 * 7 // 8 * 2048
    assert cut.traffic[0].context == 3 * moved * 24 * 4 * cut.layout.microbatches
    assert whole.traffic[0].context == 0 and cut.traffic[0].in_node > whole.traffic[0].in_node
    assert sum(cut.shares().values()) == pytest.approx(1.0)
    assert cut.shares()["context-parallel exchange"] > 0.05
    found = {plan.layout.context for plan in best_plans(load(recipe_file, *long), 64, GPUS["h100"])}
    assert found == {1, 2, 4, 8, 16}
    assert {plan.layout.context for plan in best_plans(load(recipe_file), 64, GPUS["h100"])} == {1}


def test_table_of_memory_has_numbers_under_their_names(recipe_file: Path) -> None:
    command = ["plan", str(recipe_file), "--gpus", "8"]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "160"}).output.splitlines()
    names = next(line for line in shown if "activations" in line).replace("┃", " ").split()
    values = next(line for line in shown if line.startswith("│")).replace("│", " ").split()
    row = dict(zip(names, values, strict=True))
    memory = plan_for(load(recipe_file), 8, GPUS["h100"]).memory[0]
    assert row["activations"] == f"{memory.activations / GIB:.2f}" and row["visits"] == "4"
    assert row["head"] == f"{memory.head / GIB:.2f}"


_GRAPHS = ("model.implementation=transformer_engine", "training.cuda_graphs=true")
MEASURED_ON_H200 = {
    # Overrides of one GPU's step of Ouro-1.4B: seconds and GiB that one H200 took (docs/results/gpu.md).
    ("batch.microbatch=2", "batch.global_tokens=32768"): (2.313, 79.9),
    ("batch.microbatch=3", "batch.global_tokens=36864"): (2.527, 107.5),
    (
        "data.sequence_length=16384",
        "batch.global_tokens=32768",
        "training.recompute=full",
        "training.recompute_loops=2",
    ): (3.633, 83.4),
    (*_GRAPHS, "batch.global_tokens=32768", "batch.microbatch=2"): (2.274, 85.0),
    (*_GRAPHS, "batch.global_tokens=32768", "batch.microbatch=2", "precision.fp8.recipe=current"): (1.811, 82.5),
}


@pytest.mark.parametrize("overrides", MEASURED_ON_H200)
def test_the_plan_is_near_what_an_h200_took(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    seconds, gib = MEASURED_ON_H200[overrides]
    plan = plan_for(load(recipe_file, "objective.chunk_tokens=4096", *overrides), 1, GPUS["h200"])
    assert plan.step_seconds == pytest.approx(seconds, rel=0.08)
    assert plan.memory[0].peak / GIB == pytest.approx(gib, rel=0.07)


def test_fp8_speeds_up_its_layers_until_the_host_is_in_the_way(recipe_file: Path) -> None:
    def plan(rows: int, *overrides: str) -> Plan:
        batch = (f"batch.microbatch={rows}", "batch.global_tokens=32768", "model.implementation=transformer_engine")
        return plan_for(load(recipe_file, *batch, *overrides), 1, GPUS["h200"])

    fp8 = "precision.fp8.recipe=current"
    assert 1.15 < plan(4).step_seconds / plan(4, fp8).step_seconds < 1.35
    half = plan(4, fp8, "precision.fp8.first_layers_bf16=6", "precision.fp8.last_layers_bf16=6")
    assert plan(4, fp8).step_seconds < half.step_seconds < plan(4).step_seconds
    assert plan(1, fp8).step_seconds > plan(1).step_seconds, "small pieces of work wait for Python"
    assert "the host" in plan(1, fp8).limit() and "batch.microbatch" in plan(1, fp8).limit()
    assert "the host" not in plan(4, fp8).limit()
    graphs = plan(1, fp8, "training.cuda_graphs=true")
    assert graphs.step_seconds < 0.8 * plan(1, fp8).step_seconds and "the host" not in graphs.limit()
