"""The simulated schedule: every task once, in a possible order, within the memory bound, with the known bubble."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from ouro_megatron.planning.schedule import Task, most_in_flight, needs, rank_order, simulate

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3)).map(
    lambda shape: (shape[0], shape[1], shape[2] * shape[0])
)


def even(rank: int, task: Task) -> float:
    return 1.0 if task.kind == "forward" else 2.0


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 10))
def test_every_task_once_and_after_what_it_needs(shape: tuple[int, int, int], hop: int) -> None:
    pipeline, loops, microbatches = shape
    timeline = simulate(pipeline, loops, microbatches, even, float(hop))
    ends = {(event.rank, event.task): event.end for event in timeline.events}
    assert len(timeline.events) == len(ends) == 2 * pipeline * loops * microbatches
    last_end = [0.0] * pipeline
    for event in timeline.events:
        source = needs(event.task, event.rank, pipeline, loops)
        if source is not None:
            delay = hop if source[0] != event.rank else 0
            assert event.start >= ends[source] + delay
        assert event.start >= last_end[event.rank]
        last_end[event.rank] = event.end


@pytest.mark.parametrize("pipeline", [2, 4, 8])
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_bubble_of_equal_ranks(pipeline: int, loops: int, rounds: int) -> None:
    microbatches = rounds * pipeline
    timeline = simulate(pipeline, loops, microbatches, even)
    assert timeline.bubble == pytest.approx((pipeline - 1) / (loops * microbatches))


@given(SHAPES)
def test_memory_bound(shape: tuple[int, int, int]) -> None:
    pipeline, loops, microbatches = shape
    for rank in range(pipeline):
        held = most_in_flight(pipeline, rank, loops, microbatches)
        if pipeline == 1:
            assert held == loops
        elif loops == 1:
            assert held == min(pipeline - rank, microbatches)
        else:
            assert held == min((pipeline - rank - 1) * 2 + (loops - 1) * pipeline + 1, loops * microbatches)


@pytest.mark.parametrize(("pipeline", "loops", "microbatches"), [(2, 4, 4), (4, 2, 8), (3, 3, 6)])
def test_forward_order_is_megatrons(pipeline: int, loops: int, microbatches: int) -> None:
    table = get_schedule_table(microbatches, loops, pipeline)
    order = [task for task in rank_order(pipeline, 0, loops, microbatches) if task.kind == "forward"]
    assert [(task.microbatch, task.loop) for task in order] == table


def test_a_slow_last_rank_sets_the_pace() -> None:
    timeline = simulate(2, 4, 8, lambda rank, task: even(rank, task) * (1.5 if rank == 1 else 1.0))
    assert timeline.ideal == timeline.busy(1) == 1.5 * timeline.busy(0)
