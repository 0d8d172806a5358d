"""Cached decoding equals full recomputation by the reference, for every exit policy and beyond the trained loops."""

from dataclasses import dataclass

import pytest
import torch

from ouro_megatron.inference.decoder import LoopDecoder
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ParallelSection
from tests.distributed.parity import Layout, fill_reference, load, model_section
from tests.distributed.ranks import run_ranks
from tests.reference.looplm import ReferenceLoopLM, exit_probabilities, reference_generate
from tests.reference.mapping import reference_config, to_megatron

PROMPT = [3, 17, 5, 40, 9]
POLICIES = ["q=0", "q=0.3", "q=0.6", "q=1", "step=1", "step=3", "all"]


@dataclass(frozen=True)
class Decoded:
    policy: str
    loops: int
    difference: float
    """Largest difference of a logit or an exit probability from the reference's recomputation."""
    tokens: list[int]
    depths: list[int]
    wanted: tuple[list[int], list[int]] | None
    """Tokens and depths by the reference, where it has the policy."""


def models(tensor: int, kv_heads: int) -> tuple[ReferenceLoopLM, LoopLM]:
    context = create_context(ParallelSection(tensor=tensor))
    section = model_section(Layout(kv_heads=kv_heads))
    reference = ReferenceLoopLM(reference_config(section))
    fill_reference(reference)
    with torch.no_grad():
        reference.model.early_exit_gate.weight.mul_(6)  # so that tokens leave at different loops
    lm = LoopLM(section, context)
    load(lm, to_megatron(dict(reference.state_dict()), reference.config))
    return reference, lm


def decode_all(tensor: int, kv_heads: int, loop_counts: tuple[int, ...]) -> list[Decoded]:
    reference, lm = models(tensor, kv_heads)
    results = []
    for loops in loop_counts:
        for policy in POLICIES:
            results.append(_decode(reference, lm, policy, loops))
    lm.context.close()
    return results


def _decode(reference: ReferenceLoopLM, lm: LoopLM, policy: str, loops: int, new: int = 12) -> Decoded:
    exit_policy = ExitPolicy.parse(policy)
    decoder = LoopDecoder(lm, exit_policy, loops)
    sequence, waiting, depths, worst = list(PROMPT), list(PROMPT), [], 0.0
    for _ in range(new):
        prediction = decoder.feed(waiting)
        with torch.no_grad():
            outputs = reference(torch.tensor([sequence]), loops)
        logits = outputs[prediction.depth - 1].logits_bsv[0, -1]
        worst = max(worst, float((prediction.logits_v - logits).abs().max()))
        for got, want in zip(prediction.exit_probability, exit_probabilities(outputs), strict=True):
            worst = max(worst, abs(got - float(want[0, -1])))
        waiting = [int(prediction.logits_v.argmax())]
        sequence += waiting
        depths.append(prediction.depth)
    wanted = None
    if exit_policy.step is None:
        q = None if exit_policy.q == 1.0 else exit_policy.q
        wanted = reference_generate(reference, PROMPT, new, loops, q)
    return Decoded(policy, loops, worst, sequence[len(PROMPT) :], depths, wanted)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_recomputation(kv_heads: int) -> None:
    (results,) = run_ranks(decode_all, 1, 1, kv_heads, (4, 8))
    seen: set[int] = set()
    for result in results:
        assert result.difference < 2e-5, result
        if result.wanted is not None:
            assert (result.tokens, result.depths) == result.wanted, result
        seen.update(result.depths if result.policy == "q=0.6" else [])
    assert len(seen) > 1, "the test's gate lets all tokens leave at one loop"


@pytest.mark.distributed
def test_tensor_parallel_ranks_agree_with_the_reference() -> None:
    first, second = run_ranks(decode_all, 2, 2, 4, (5,))
    assert first == second
    assert max(result.difference for result in first) < 2e-5


def cache_checks() -> dict[str, float]:
    """Differences that must vanish: many tokens at once against one by one, and growth beyond one block."""
    reference, lm = models(1, 4)
    found = {}
    for policy, loops_run in (("exact", 4), ("reuse", 4)):
        together, alone = (
            LoopDecoder(lm, ExitPolicy.parse("step=2"), loops_run, policy)  # type: ignore[arg-type]
            for _ in range(2)
        )
        together.feed(PROMPT)
        alone.feed(PROMPT)
        at_once = together.feed([1, 2, 3])
        for token in (1, 2, 3):
            one_by_one = alone.feed([token])
        found[policy] = float((at_once.logits_v - one_by_one.logits_v).abs().max())
        both = (together.feed([7]), alone.feed([7]))
        found[f"{policy} after"] = float((both[0].logits_v - both[1].logits_v).abs().max())
    sequence = torch.randint(0, 64, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = LoopDecoder(lm, ExitPolicy(), 4)
    decoder.feed(sequence[:250])
    for token in sequence[250:-1]:
        decoder.feed([token])
    prediction = decoder.feed(sequence[-1:])
    with torch.no_grad():
        wanted = reference(torch.tensor([sequence]), 4)[-1].logits_bsv[0, -1]
    found["growth"] = float((prediction.logits_v - wanted).abs().max())
    lm.context.close()
    return found


def test_cache_grows_and_takes_several_tokens() -> None:
    (found,) = run_ranks(cache_checks, 1)
    assert all(difference < 2e-5 for difference in found.values()), found


def reuse_work() -> tuple[int, int]:
    """Layer calls for ten tokens at `step=1`: (exact, reuse)."""
    _, lm = models(1, 4)
    calls = []
    for policy in ("exact", "reuse"):
        count = 0
        original = lm.run_layers

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            return original(*args, **kwargs)  # type: ignore[arg-type]  # noqa: B023

        lm.run_layers = counted  # type: ignore[method-assign,assignment]
        decoder = LoopDecoder(lm, ExitPolicy.parse("step=1"), 4, policy)
        decoder.feed(PROMPT)
        for token in range(10):
            decoder.feed([token])
        lm.run_layers = original  # type: ignore[method-assign]
        calls.append(count)
    lm.context.close()
    return calls[0], calls[1]


def test_reuse_skips_the_loops_after_the_exit() -> None:
    assert run_ranks(reuse_work, 1)[0] == (4 + 10 * 4, 4 + 10)
