"""Greedy, temperature, top-k, top-p, seeds."""

import pytest
import torch

from ouro_megatron.errors import RequestError
from ouro_megatron.inference.request import Sampling
from ouro_megatron.inference.sampling import Sampler, token_logprobs

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])


def draws(**settings: float) -> set[int]:
    sampler = Sampler(Sampling(**settings))  # type: ignore[arg-type]
    return {sampler.choose(LOGITS) for _ in range(300)}


def test_greedy_top_k_top_p() -> None:
    assert draws() == {1}
    assert draws(temperature=5.0) == {0, 1, 2, 3, 4}
    assert draws(temperature=5.0, top_k=2) == {1, 2}
    assert draws(temperature=5.0, top_k=1) == {1}
    # softmax of the logits: 0.03 0.64 0.23 0.09 0.01
    assert draws(temperature=1.0, top_p=0.5) == {1}
    assert draws(temperature=1.0, top_p=0.7) == {1, 2}
    assert draws(temperature=5.0, top_k=3, top_p=1.0) == {1, 2, 3}
    assert draws(temperature=1e-30) == {1}


def test_a_wide_nucleus_is_found_too() -> None:
    """More entries than the first guess at the nucleus's size."""
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9))
    drawn = {sampler.choose(torch.zeros(1000)) for _ in range(4000)}
    assert 850 <= len(drawn) <= 900


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=2.0, seed=3))
    drawn = torch.tensor([sampler.choose(LOGITS) for _ in range(4000)]).bincount(minlength=5) / 4000
    assert torch.allclose(drawn, (LOGITS / 2).softmax(0), atol=0.03)


def test_seed_repeats() -> None:
    first, second, other = (
        [sampler.choose(LOGITS) for _ in range(20)]
        for sampler in (Sampler(Sampling(2.0, seed=4)), Sampler(Sampling(2.0, seed=4)), Sampler(Sampling(2.0, seed=5)))
    )
    assert first == second != other
    Sampler(Sampling(1.0, seed=-(2**70))).choose(LOGITS)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Sampler(Sampling(**settings))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_logprobs() -> None:
    logprob, top = token_logprobs(LOGITS, 2, 2)
    assert logprob == pytest.approx(float(LOGITS.log_softmax(0)[2]))
    assert [token for token, _ in top] == [1, 2]
