"""A dry run: real construction and schedule on shapes, and the comparison of ranks that it rests on."""

import re
from pathlib import Path

import pytest

from ouro_megatron.errors import DataError, RecipeError, TrainingError
from ouro_megatron.parallel.collective_log import Call, disagreements
from ouro_megatron.planning.layout import layout_of
from ouro_megatron.planning.run import PlanRequest, run_plan
from ouro_megatron.training.dry_run import check_dry_run_options, dry_run, ranks_to_try, rehearsal_pool, rehearse
from tests.tiny import tiny_recipe

GROUP = (0, 1)


def reduce(elements: int, dtype: str = "float32") -> Call:
    return Call("allreduce_", GROUP, ((elements, dtype),))


def message(operation: str, peer: int, elements: int) -> Call:
    return Call(operation, GROUP, ((elements, "bfloat16"),), peer)


def test_ranks_that_agree() -> None:
    forth = [reduce(4), message("send", 1, 8), message("recv_", 1, 6)]
    back = [message("recv_", 0, 8), reduce(4), message("send", 0, 6)]
    assert disagreements({0: forth, 1: back}) == []


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        ([reduce(4), reduce(5)], [reduce(5), reduce(4)], "call 1 is allreduce_"),
        ([reduce(4)], [reduce(4, "bfloat16")], "bfloat16"),
        ([reduce(4)], [], "rank 0 makes 1 calls, rank 1 0"),
        ([message("send", 1, 8)], [], "sends rank 1 1 messages, it receives 0"),
        ([message("send", 1, 8)], [message("recv_", 0, 9)], "shape of message 1"),
    ],
)
def test_ranks_that_do_not_fit_together_are_named(left: list[Call], right: list[Call], words: str) -> None:
    problems = disagreements({0: left, 1: right})
    assert len(problems) == 1 and words in problems[0]


def test_calls_of_other_groups_are_not_compared() -> None:
    other = Call("allreduce_", (0, 2), ((9, "float32"),))
    assert disagreements({0: [other, reduce(4)], 1: [reduce(4)]}) == []


@pytest.mark.slow
def test_a_thousand_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(
        tmp_path,
        parallel={"tensor": 2, "pipeline": 2, "sequence": True, "layers": [3, 1]},
        batch={"global_tokens": 256 * 2 * 32, "microbatch": 1},
    )
    dry_run(recipe, 1024)
    shown = capsys.readouterr().out
    assert "agree in group, order, shape and type" in shown and "data.train: 1 sources" in shown
    assert "6 ranks of 1024" in shown


def test_calls_are_those_of_the_layout(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, parallel={"tensor": 2, "pipeline": 2}, batch={"global_tokens": 256})
    ranks = ranks_to_try(layout_of(recipe, 8))
    assert ranks == {
        0: "pipeline 0",
        1: "pipeline 0, tensor 1",
        2: "pipeline 0, data 1",
        4: "pipeline 1",
        5: "pipeline 1, tensor 1",
        6: "pipeline 1, data 1",
    }
    first = next(one for one in rehearse(recipe, 8, {0: "pipeline 0"}))
    visits = recipe.model.loops * 2
    assert sum(call.operation == "send" for call in first.calls) == visits + (visits - 2)
    assert {call.peer for call in first.calls if call.peer is not None} == {4}
    assert {call.ranks for call in first.calls if call.peer is None} == {(0, 1), (0, 2)}


def test_context_parallel_ranks_gather_and_scatter(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        parallel={"context": 2, "pipeline": 2},
        batch={"global_tokens": 256},
        training={"recompute": "full", "recompute_loops": 1},
    )
    ranks = ranks_to_try(layout_of(recipe, 8))
    assert ranks == {
        0: "pipeline 0",
        1: "pipeline 0, context 1",
        2: "pipeline 0, data 1",
        4: "pipeline 1",
        5: "pipeline 1, context 1",
        6: "pipeline 1, data 1",
    }
    done = rehearse(recipe, 8, {rank: role for rank, role in ranks.items() if rank in (0, 1)})
    assert disagreements({one.rank: one.calls for one in done}) == []
    in_group = [call for call in done[0].calls if call.ranks == (0, 1)]
    visits = 2 * recipe.model.loops * 2  # of two layers by two microbatches
    gathers = [call for call in in_group if call.operation.startswith("_allgather")]
    scatters = [call for call in in_group if call.operation.startswith("_reduce_scatter")]
    # Once in forward and once for backward, where a recomputed forward gathers it does so in backward's place.
    assert len(gathers) == 2 * visits and len(scatters) == visits
    half = 2 * 16 * 32  # keys and values of half a sequence
    assert {call.tensors for call in gathers} == {((2 * half, "float32"), (half, "float32"))}
    assert {size for call in done[0].calls if call.operation == "send" for size, _ in call.tensors} == {16 * 32}


def test_refused_before_any_process_starts(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"batch\.global_tokens"):
        dry_run(recipe, 1024)
    with pytest.raises(RecipeError, match="--world"):
        check_dry_run_options(None, None)
    with pytest.raises(RecipeError, match="--nproc"):
        check_dry_run_options(8, 4)
    lost = tiny_recipe(tmp_path, data={"train": [{"path": str(tmp_path / "gone"), "weight": 1}]})
    with pytest.raises(DataError, match="gone"):
        dry_run(lost, 1)


def test_a_budget_in_epochs_is_counted_where_the_data_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(tmp_path / "train")
    recipe = tiny_recipe(
        tmp_path,
        budget={"total": None, "epochs": 2},
        data={"train": [{"path": prefix}, {"path": str(tmp_path / "held-out")}]},
        schedule={"kind": "constant", "warmup": 0},
    )
    with rehearsal_pool(1) as pool:
        dry_run(recipe, 1, pool=pool)
        assert re.search(r"[\d.]+k? tokens take ", capsys.readouterr().out)
        dry_run(recipe, 1, data=False, pool=pool)
    assert "depends on data.train, which was not read: budget.epochs counts its tokens" in capsys.readouterr().out
    run_plan(recipe, PlanRequest(1, "h100"))
    assert "tokens take" in " ".join(capsys.readouterr().out.split())
    Path(f"{prefix}.bin").unlink()
    run_plan(recipe, PlanRequest(1, "h100", search=True))
    run_plan(recipe, PlanRequest(1, "h100"))
    assert "depends on data.train" in " ".join(capsys.readouterr().out.split())


def test_a_rank_that_cannot_run_is_named(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    broken = recipe.model_copy(update={"model": recipe.model.model_copy(update={"heads": 3})})
    with pytest.raises((TrainingError, RecipeError)):
        rehearse(broken, 1, {0: "pipeline 0"})
