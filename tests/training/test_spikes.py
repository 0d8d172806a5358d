"""The test for outliers, alone: what it lets through, what it does not, and that it goes on alike after a resume."""

import json
import random

import pytest

from ouro_megatron.objective.losses import LoopMeans
from ouro_megatron.parallel.context import ParallelContext
from ouro_megatron.recipe.schema import HealthSection
from ouro_megatron.training.spikes import SpikeGuard, deviation
from tests.distributed.ranks import run_ranks


class OneRank:
    """What the guard needs of a context."""

    def from_rank_zero(self, values: list[float]) -> list[float]:
        return values


def guard(**settings: object) -> SpikeGuard:
    section = HealthSection.model_validate({"skip_spikes": True, "window": 32, "min_steps": 8, **settings})
    return SpikeGuard(section, OneRank())  # type: ignore[arg-type]


def means(loss: float, loops: int = 2) -> LoopMeans:
    return LoopMeans(loss, [loss] * loops, [1 / loops] * loops, 0.5, 1.5, 100)


def quiet(number: int, seed: int = 0) -> list[tuple[float, float]]:
    generator = random.Random(seed)
    return [(4.0 - step / 200 + generator.gauss(0, 0.05), 1.0 + generator.gauss(0, 0.1)) for step in range(number)]


def test_deviations_of_a_known_list() -> None:
    assert deviation([1.0, 2.0, 3.0, 4.0, 5.0], 3.0) == 0.0
    assert deviation([1.0, 2.0, 3.0, 4.0, 5.0], 6.0) == pytest.approx(3.0 / 1.4826)  # MAD 1
    assert deviation([2.0] * 10, 2.1) == pytest.approx(5.0)  # a flat curve: sigma is 1% of the median


def test_noise_and_a_falling_curve_pass() -> None:
    judge = guard().judge
    assert [judge(means(loss), norm) for loss, norm in quiet(300)] == [None] * 300


@pytest.mark.parametrize(("loss", "norm", "word"), [(8.0, 1.0, "loss 8"), (3.9, 40.0, "gradient norm 40")])
def test_an_outlier_is_named_with_its_numbers(loss: float, norm: float, word: str) -> None:
    judged = guard()
    for past in quiet(30):
        assert judged.judge(means(past[0]), past[1]) is None
    reason = judged.judge(means(loss), norm)
    assert reason is not None and reason.startswith(word) and "of 30 steps" in reason
    assert judged.judge(means(3.9), 1.0) is None


def test_down_is_no_spike_and_a_limit_of_none_does_not_look() -> None:
    judged = guard(grad_norm_deviations=None)
    for past in quiet(30):
        judged.judge(means(past[0]), past[1])
    assert judged.judge(means(0.5), 500.0) is None


def test_a_new_level_is_accepted_after_half_a_window() -> None:
    judged = guard()
    for past in quiet(64):
        judged.judge(means(past[0]), past[1])
    refused = [judged.judge(means(7.0), 1.0) is not None for _ in range(32)]
    assert refused[0] and not refused[-1] and refused == sorted(refused, reverse=True)
    assert sum(refused) <= 17


def test_another_number_of_loops_begins_anew() -> None:
    judged = guard()
    for past in quiet(32):
        judged.judge(means(past[0]), past[1])
    assert judged.judge(means(8.0, loops=4), 1.0) is None


def test_state_through_json_judges_alike() -> None:
    curve = [(loss + (3.0 if step % 11 == 10 else 0.0), norm) for step, (loss, norm) in enumerate(quiet(80, seed=3))]
    straight, first, second = guard(), guard(), guard()
    expected = [straight.judge(means(loss), norm) for loss, norm in curve]
    found = [first.judge(means(loss), norm) for loss, norm in curve[:37]]
    second.restore(json.loads(json.dumps(first.state())))
    found += [second.judge(means(loss), norm) for loss, norm in curve[37:]]
    assert found == expected and any(expected)


def judged_apart(_: int) -> list[bool]:
    """Ranks whose numbers differ in the last digits, or much, must still decide alike."""
    import os

    from ouro_megatron.parallel.context import create_context
    from ouro_megatron.recipe.schema import ParallelSection

    context: ParallelContext = create_context(ParallelSection(data=2), "cpu")
    section = HealthSection(skip_spikes=True, window=32, min_steps=8)
    judged, rank = SpikeGuard(section, context), int(os.environ["RANK"])
    return [judged.judge(means(loss + rank * 5.0), norm) is not None for loss, norm in [*quiet(20), (9.0, 1.0)]]


@pytest.mark.distributed
def test_rank_zero_decides_for_all() -> None:
    first, second = run_ranks(judged_apart, 2, 0)
    assert first == second == [False] * 20 + [True]
