"""Batch plan and learning rate against a loop that counts step by step."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_megatron.recipe.schedule import BatchPlan, LRSchedule, is_due
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.recipe.spans import Span

SEQUENCE = 16


def recipe(**sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "t",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 64, "loops": 2},
        "data": {"sequence_length": SEQUENCE, "tokenizer": Path("t"), "train": [{"path": "a", "weight": 1}]},
        "optimizer": {"lr": 1.0},
        "batch": {"global_tokens": 64},
        "budget": {"total": "100 steps"},
    }
    return Recipe.model_validate({**values, **sections})


spans = st.one_of(
    st.integers(1, 4000).map(lambda n: f"{n} tokens"),
    st.integers(1, 60).map(lambda n: f"{n} steps"),
)


@settings(max_examples=200, deadline=None)
@given(ramp=st.lists(st.tuples(spans, st.integers(1, 20)), max_size=3), total=spans)
def test_plan_equals_counting(ramp: list[tuple[str, int]], total: str) -> None:
    points = [{"after": after, "global_tokens": size * SEQUENCE} for after, size in ramp]
    made = recipe(batch={"global_tokens": 64, "ramp": points}, budget={"total": total})
    plan = BatchPlan(made)
    budget = made.budget.total
    assert budget is not None
    step = tokens = 0
    size, waiting = 64, list(made.batch.ramp)
    while (step < budget.steps) if budget.steps is not None else (tokens < (budget.tokens or 0)):
        while waiting and (
            step >= waiting[0].after.steps
            if waiting[0].after.steps is not None
            else tokens >= (waiting[0].after.tokens or 0)
        ):
            size = waiting.pop(0).global_tokens
        point = plan.at(step)
        assert (point.consumed_tokens, point.tokens) == (tokens, size)
        assert point.samples * SEQUENCE == point.tokens
        step, tokens = step + 1, tokens + size
    assert (plan.total_steps, plan.total_tokens) == (step, tokens)


def test_huge_stage_is_instant() -> None:
    plan = BatchPlan(recipe(batch={"global_tokens": "8Mi"}, budget={"total": "3T"}))
    assert plan.total_steps == math.ceil(3e12 / (8 * 2**20))


def rates(**sections: Any) -> list[float]:
    made = recipe(**sections)
    plan = BatchPlan(made)
    schedule = LRSchedule(made, plan)
    return [schedule.at(step) for step in range(plan.total_steps)]


def test_warmup_then_constant() -> None:
    curve = rates(schedule={"warmup": "10 steps"})
    assert curve[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert curve[9:] == [1.0] * 91


def test_wsd_ends_at_the_floor() -> None:
    curve = rates(schedule={"kind": "wsd", "warmup": "10 steps", "decay": "20 steps", "min_lr": 0.1})
    assert curve[10:80] == [1.0] * 70
    assert curve[80] == pytest.approx(1 - 0.9 / 20)
    assert curve[-1] == pytest.approx(0.1)


def test_cosine() -> None:
    curve = rates(schedule={"kind": "cosine", "min_lr": 0.2})
    assert curve[49] == pytest.approx(0.6)
    assert curve[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(curve))


def test_the_ramp_does_not_bend_the_decay() -> None:
    ramp = {"global_tokens": 64, "ramp": [{"after": "1280 tokens", "global_tokens": 128}]}
    curve = rates(batch=ramp, budget={"total": "2560 tokens"}, schedule={"kind": "cosine"})
    assert len(curve) == 30
    assert curve[19] == pytest.approx(0.5)  # half of the tokens after 20 of 30 steps


@settings(max_examples=100, deadline=None)
@given(every=spans)
def test_due_as_often_as_it_should(every: str) -> None:
    plan = BatchPlan(recipe())
    span = Span.parse(every)
    times = sum(is_due(span, plan.at(step), plan.at(step + 1)) for step in range(plan.total_steps))
    if span.steps is not None:
        assert times == plan.total_steps // span.steps
    else:
        assert span.tokens is not None
        reached = {plan.at(step).consumed_tokens // span.tokens for step in range(plan.total_steps + 1)}
        assert times == len(reached) - 1
    assert not is_due(None, plan.at(0), plan.at(1))
