"""A tiny reference model, the same weights in an engine, and full recomputation by the reference."""

from typing import Any

import torch
from torch import Tensor

from ouro_megatron.inference.engine import Engine, EngineSettings
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.request import GeneratedToken, Request
from ouro_megatron.inference.runner import Mix, Read, Runner
from ouro_megatron.inference.weights import ModelWeights, take_weights
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ParallelSection
from tests.distributed.parity import Layout, fill_reference, load, model_section
from tests.reference.looplm import LoopOutput, ReferenceLoopLM, exit_probabilities
from tests.reference.mapping import reference_config, to_megatron

VOCAB = 64


def models(
    tensor: int = 1, kv_heads: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[ReferenceLoopLM, ModelWeights, ParallelContext]:
    """The reference and this rank's decode weights of it; the caller closes the context."""
    context = create_context(ParallelSection(tensor=tensor))
    section = model_section(Layout(kv_heads=kv_heads))
    reference = ReferenceLoopLM(reference_config(section))
    fill_reference(reference)
    with torch.no_grad():
        reference.model.early_exit_gate.weight.mul_(6)  # so that tokens leave at different loops
    lm = LoopLM(section, context)
    load(lm, to_megatron(dict(reference.state_dict()), reference.config))
    return reference, take_weights(lm, dtype, 4), context


class RecordingRunner(Runner):
    """Keeps the logits of every read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Tensor] = []

    def logits(self, mixes: list[Mix], reads: list[Read]) -> Tensor:
        result = super().logits(mixes, reads)
        self.seen += [row.clone() for row in result]
        return result


def engine_of(
    weights: ModelWeights, settings: EngineSettings, context: ParallelContext
) -> tuple[Engine, RecordingRunner]:
    runner = RecordingRunner(
        weights,
        policy=settings.cache,
        loops=settings.max_loops,
        slots=settings.slots,
        capacity=settings.context,
        group=context.groups.tp,
    )
    return Engine(runner, settings, None, VOCAB), runner


def generate(engine: Engine, requests: list[Request], join_after: int = 0) -> list[list[GeneratedToken]]:
    """Runs all requests; each further one joins `join_after` steps after the one before it."""
    waiting = list(requests)
    order: list[int] = []
    made: dict[int, list[GeneratedToken]] = {}
    step = 0
    while waiting or engine.unfinished:
        while waiting and step >= join_after * len(order):
            order.append(engine.submit(waiting.pop(0)))
        for event in engine.step():
            if event.token is not None:
                made.setdefault(event.request_id, []).append(event.token)
        step += 1
    return [made.get(request_id, []) for request_id in order]


def leave(policy: ExitPolicy, outputs: list[LoopOutput]) -> tuple[int, Tensor]:
    """(exit loop, logits [vocab]) of the last position by the reference's outputs, from the definitions."""
    loops = len(outputs)
    probabilities = [float(p[0, -1]) for p in exit_probabilities(outputs)]
    depth = loops
    if policy.expected:
        return loops, sum(
            (p * o.logits_bsv[0, -1] for p, o in zip(probabilities, outputs, strict=True)), torch.zeros(VOCAB)
        )
    if policy.step is not None:
        depth = policy.step
    for t in range(loops, 0, -1):
        if policy.q is not None and policy.q < 1 and sum(probabilities[:t]) >= policy.q:
            depth = t
        if policy.change is not None and t >= 2:
            new, old = outputs[t - 1].hidden_bsh[0, -1], outputs[t - 2].hidden_bsh[0, -1]
            if float((new - old).norm() / old.norm()) < policy.change:
                depth = t
    return depth, outputs[depth - 1].logits_bsv[0, -1]


@torch.no_grad()
def recompute(
    reference: ReferenceLoopLM, prompt: list[int], new: int, policy: ExitPolicy, loops: int
) -> tuple[list[int], list[int], list[Tensor]]:
    """Greedy (tokens, depths, logits) with the whole sequence through all loops for each token."""
    tokens, depths, logits = list(prompt), [], []
    for _ in range(new):
        depth, logits_v = leave(policy, reference(torch.tensor([tokens]), loops))
        depths.append(depth)
        logits.append(logits_v)
        tokens.append(int(logits_v.argmax()))
    return tokens[len(prompt) :], depths, logits
