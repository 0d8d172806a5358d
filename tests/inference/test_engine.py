"""Cached, batched decoding at mixed depths equals full recomputation by the reference, for every exact policy."""

from dataclasses import dataclass

import pytest
import torch

from ouro_megatron.inference.engine import EngineSettings
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.request import Request
from ouro_megatron.inference.sequence import SkippedLoops
from tests.distributed.ranks import run_ranks
from tests.inference.engines import engine_of, generate, models, recompute

PROMPTS = [[3, 17, 5, 40, 9], [8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [63, 0, 21]]
POLICIES = ["q=0", "q=0.3", "q=0.6", "q=1", "step=1", "step=3", "change=0.9", "expected", "all"]
NEW = 10


@dataclass(frozen=True)
class Decoded:
    policy: str
    difference: float
    """Largest difference of a logit from the reference's recomputation."""
    tokens: list[list[int]]
    depths: list[list[int]]
    wanted: list[tuple[list[int], list[int]]]


def decode(tensor: int, kv_heads: int, loops: int, skipped: SkippedLoops, join_after: int, slots: int) -> list[Decoded]:
    reference, weights, context = models(tensor, kv_heads)
    results = []
    for text in POLICIES:
        policy = ExitPolicy.parse(text)
        settings = EngineSettings(slots=slots, context=32, max_loops=loops, skipped=skipped)
        engine, runner = engine_of(weights, settings, context)
        requests = [Request(tuple(prompt), NEW, policy) for prompt in PROMPTS]
        made = generate(engine, requests, join_after)
        wanted = [recompute(reference, prompt, NEW, policy, loops) for prompt in PROMPTS]
        # Every row of logits that was read belongs to one (request, token): the nearest wanted one is its own.
        rows = torch.stack([row for item in wanted for row in item[2]])
        seen = torch.stack(runner.seen)  # type: ignore[attr-defined]
        assert len(seen) == len(rows)
        distance = (seen[:, None] - rows[None]).abs().amax(-1)
        results.append(
            Decoded(
                text,
                max(float(distance.min(0).values.max()), float(distance.min(1).values.max())),
                [[token.token for token in tokens] for tokens in made],
                [[token.depth for token in tokens] for tokens in made],
                [(item[0], item[1]) for item in wanted],
            )
        )
    context.close()
    return results


def check(results: list[Decoded]) -> None:
    for result in results:
        assert result.difference < 1e-5, result
        assert list(zip(result.tokens, result.depths, strict=True)) == result.wanted, result
    mixed = next(result for result in results if result.policy == "q=0.6")
    assert len({depth for depths in mixed.depths for depth in depths}) > 1, "the test's gate knows only one loop"


@pytest.mark.parametrize("skipped", ["later", "run"])
@pytest.mark.parametrize(("kv_heads", "loops", "join_after", "slots"), [(4, 4, 0, 4), (2, 4, 3, 4), (4, 6, 1, 2)])
def test_equals_recomputation(skipped: SkippedLoops, kv_heads: int, loops: int, join_after: int, slots: int) -> None:
    check(run_ranks(decode, 1, 1, kv_heads, loops, skipped, join_after, slots)[0])
