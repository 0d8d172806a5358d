"""Cached, batched decoding at mixed depths: equal to full recomputation for every exact policy, equal to the cache
policies' definitions for the others, on one rank and on two, whatever the batch."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ouro_megatron.inference.cache import CACHE_POLICIES, CachePolicy
from ouro_megatron.inference.engine import EngineSettings
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.request import GeneratedToken, Request, Sampling
from ouro_megatron.inference.sequence import SkippedLoops
from tests.distributed.ranks import run_ranks
from tests.inference.engines import RecordingRunner, engine_of, generate, models, recompute
from tests.inference.stepwise import stepwise

PROMPTS = [[3, 17, 5, 40, 9], [8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [63, 0, 21]]
POLICIES = ["q=0", "q=0.3", "q=0.6", "q=1", "step=1", "step=3", "change=0.9", "expected", "all"]
NEW = 10
Wanted = tuple[list[int], list[int], list[Tensor]]
"""Tokens, depths and logits of one sequence."""


@dataclass(frozen=True)
class Decoded:
    policy: str
    difference: float
    """Largest difference of a logit from the reference's recomputation."""
    tokens: list[list[int]]
    depths: list[list[int]]
    wanted: list[tuple[list[int], list[int]]]


def compare(name: str, runner: RecordingRunner, made: list[list[GeneratedToken]], wanted: list[Wanted]) -> Decoded:
    """Every row of logits that was read belongs to one (sequence, token): the nearest wanted one is its own."""
    rows = torch.stack([row for item in wanted for row in item[2]])
    seen = torch.stack(runner.seen)
    assert len(seen) == len(rows)
    distance = (seen[:, None] - rows[None]).abs().amax(-1)
    return Decoded(
        name,
        max(float(distance.min(0).values.max()), float(distance.min(1).values.max())),
        [[token.token for token in tokens] for tokens in made],
        [[token.depth for token in tokens] for tokens in made],
        [(item[0], item[1]) for item in wanted],
    )


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
        results.append(compare(text, runner, made, wanted))
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


@pytest.mark.distributed
def test_tensor_parallel_ranks_agree_with_the_reference() -> None:
    first, second = run_ranks(decode, 2, 2, 4, 4, "later", 2, 4)
    check(first)
    assert first == second


def in_bf16(cache: CachePolicy) -> tuple[float, float]:
    """Largest difference of a prompt's logits from the reference in fp32: of the engine, of the reference in bf16."""
    reference, weights, context = models(dtype=torch.bfloat16)
    engine, runner = engine_of(weights, EngineSettings(slots=4, context=32, max_loops=4, cache=cache), context)
    generate(engine, [Request(tuple(prompt), 2) for prompt in PROMPTS])
    rows = torch.stack([recompute(reference, prompt, 1, ExitPolicy(), 4)[2][0] for prompt in PROMPTS])
    # The first tokens of all prompts are read in one step.
    first = torch.stack(runner.seen[: len(PROMPTS)])
    reference.to(torch.bfloat16)
    own = torch.stack([recompute(reference, prompt, 1, ExitPolicy(), 4)[2][0].float() for prompt in PROMPTS])
    context.close()
    return float((first[:, None] - rows[None]).abs().amax(-1).min(0).values.max()), float((own - rows).abs().max())


@pytest.mark.parametrize("cache", ["all", "average"])
def test_bf16_costs_what_it_costs_the_reference(cache: CachePolicy) -> None:
    engine, reference = run_ranks(in_bf16, 1, cache)[0]
    assert 0 < engine < 3 * reference < 0.3, (engine, reference)


def decode_shared(kv_heads: int, run: bool) -> list[Decoded]:
    reference, weights, context = models(1, kv_heads)
    skipped: SkippedLoops = "run" if run else "copy"
    results = []
    for cache in CACHE_POLICIES:
        if run and cache == "all":
            continue
        for q in (0.5, 0.7, 1.1):
            settings = EngineSettings(slots=3, context=32, max_loops=4, cache=cache, skipped=skipped)
            engine, runner = engine_of(weights, settings, context)
            policy = ExitPolicy(q=q) if q <= 1 else ExitPolicy()
            made = generate(engine, [Request(tuple(prompt), NEW, policy) for prompt in PROMPTS], join_after=3)
            wanted = [stepwise(reference, prompt, NEW, loops=4, cache=cache, run_all=run, q=q) for prompt in PROMPTS]
            results.append(compare(f"{cache} {q}", runner, made, wanted))
    context.close()
    return results


@pytest.mark.parametrize(("kv_heads", "run"), [(4, False), (2, False), (4, True)])
def test_cache_policies_are_what_they_say(kv_heads: int, run: bool) -> None:
    results = run_ranks(decode_shared, 1, kv_heads, run)[0]
    for result in results:
        assert result.difference < 3e-5, result  # sums of another order, over 4 loops and 21 positions
        assert list(zip(result.tokens, result.depths, strict=True)) == result.wanted, result
    # The policies are told apart by what comes out.
    assert len({str(result.tokens) for result in results if result.policy.endswith("0.7")}) > 1


def alone_and_together(cache: CachePolicy) -> tuple[list[list[int]], list[list[int]]]:
    _, weights, context = models()
    settings = EngineSettings(slots=4, context=48, max_loops=4, cache=cache)
    requests = [
        Request(tuple(prompt), 20, ExitPolicy.parse(text), sampling=Sampling(0.8, top_p=0.95, seed=seed))
        for seed, (prompt, text) in enumerate(zip(PROMPTS * 2, POLICIES[1:], strict=True))
    ]
    together = generate(engine_of(weights, settings, context)[0], requests, join_after=2)
    alone = [generate(engine_of(weights, settings, context)[0], [request])[0] for request in requests]
    context.close()
    return tuple([[t.token for t in tokens] for tokens in made] for made in (together, alone))  # type: ignore[return-value]


@pytest.mark.parametrize("cache", ["all", "average"])
def test_sampled_text_does_not_depend_on_the_batch(cache: CachePolicy) -> None:
    together, alone = run_ranks(alone_and_together, 1, cache)[0]
    assert together == alone


def work() -> dict[str, int]:
    """Row visits of one sequence: 5 prompt tokens and 9 visits of one token each (the tenth is only read)."""
    _, weights, context = models()
    found = {}
    for name, policy, skipped in (("run", "step=1", "run"), ("copy", "step=1", "copy"), ("later", "step=1", "later")):
        settings = EngineSettings(slots=1, context=32, max_loops=4, skipped=skipped)  # type: ignore[arg-type]
        engine, _ = engine_of(weights, settings, context)
        engine.submit(Request(tuple(PROMPTS[0]), NEW, ExitPolicy.parse(policy)))
        last = next(event for _ in range(200) for event in engine.step() if event.finished)
        assert last.finished is not None
        found[name] = last.finished.row_visits
    context.close()
    return found


def test_loops_after_the_exit_are_saved() -> None:
    # The last token leaves at its first loop, where the sequence ends.
    assert run_ranks(work, 1)[0] == {"run": 5 * 4 + 8 * 4 + 1, "copy": 5 * 4 + 9, "later": 5 + 9}
