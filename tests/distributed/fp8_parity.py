"""Gradients of one step with emulated FP8 at some layout, compared with the single-process reference in fp64.

Both run in fp64: rounding to 8 bits then meets the same numbers on both sides, and the only difference left is that
Megatron's gradient buffers are fp32.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ouro_megatron.model.layout import take_shard
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import Fp8Section, ModelSection, ObjectiveSection, ParallelSection, Recompute
from ouro_megatron.training.engine import Engine, Microbatch
from tests.distributed.parity import fill_reference, gradient_of, load
from tests.reference.fp8 import Fp8Reference, in_fp8
from tests.reference.looplm import ReferenceLoopLM, ReferenceObjective, token_loss
from tests.reference.mapping import reference_config, to_megatron

SEQUENCE, MICROBATCH, MICROBATCHES = 64, 2, 2


@dataclass(frozen=True)
class Fp8Layout:
    recipe: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    loops: int = 2
    layers: int = 2
    first_bf16: int = 0
    last_bf16: int = 0

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def without_pipeline(self) -> "Fp8Layout":
        """With the same reference: neither the pipeline nor recomputation change a number."""
        return replace(self, pipeline=1, sequence_parallel=False, recompute="none")

    def section(self) -> Fp8Section:
        return Fp8Section(
            recipe=self.recipe,
            first_layers_bf16=self.first_bf16,
            last_layers_bf16=self.last_bf16,
            amax_history=3,
            emulate=True,
        )


@dataclass(frozen=True)
class Fp8Differences:
    loss: float
    """Relative."""
    gradient: float
    """Largest difference over the largest entry of that gradient, worst tensor."""
    name: str
    against_exact: float
    """The same against the reference without FP8: that the comparison has something to find."""
    weights_quantised: int


class _WideAngles(LoopLM):
    """With RoPE's angles in fp64, as the reference has them: 1e-6 would round a few values to another 8-bit float."""

    def rotary(self, positions_s: Tensor) -> Tensor:
        dim = self.model.hidden // self.model.heads
        exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles = positions_s.double()[:, None] / self.model.rope_base**exponent
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


@dataclass(frozen=True)
class Expected:
    loss: float
    gradients: dict[str, np.ndarray]
    """Whole, under this project's names."""


@cache
def expected(layout: Fp8Layout, *, rounded: bool) -> Expected:
    """From the reference, in this process: with FP8, or without."""
    config = reference_config(model_of(layout))
    reference = ReferenceLoopLM(config)
    fill_reference(reference)
    reference.double()
    if rounded:
        fp8 = Fp8Reference(layout.recipe, layout.tensor, layout.data, layout.context, visits=3)
        in_fp8(reference, fp8, range(layout.first_bf16, layout.layers - layout.last_bf16))
    whole = rows_of(layout)
    counted, total = float(whole[2].sum()), 0.0
    rows = MICROBATCH * layout.data
    for begin in range(0, len(whole[0]), rows):
        tokens, labels, mask = (tensor[begin : begin + rows] for tensor in whole)
        loss = (token_loss(reference(tokens), labels, ReferenceObjective()) * mask).sum()
        loss.backward()
        total += float(loss)
    gradients = {name: p.grad / counted for name, p in reference.named_parameters() if p.grad is not None}
    return Expected(total / counted, {name: g.numpy() for name, g in to_megatron(gradients, config).items()})


def both(layout: Fp8Layout) -> tuple[Expected, Expected]:
    """With FP8 and without."""
    plain = layout.without_pipeline
    exact = replace(plain, recipe="none", tensor=1, context=1, first_bf16=0, last_bf16=0)
    return expected(plain, rounded=True), expected(exact, rounded=False)


def compare_all(layouts: list[Fp8Layout], wanted: list[tuple[Expected, Expected]]) -> list[Fp8Differences]:
    """Runs on every rank; the layouts share one set of process groups. `wanted`: what `both` says of each."""
    first = layouts[0]
    context = create_context(
        ParallelSection(
            tensor=first.tensor, pipeline=first.pipeline, context=first.context, sequence=first.sequence_parallel
        )
    )
    try:
        return [_compare(layout, context, *pair) for layout, pair in zip(layouts, wanted, strict=True)]
    finally:
        context.close()


def model_of(layout: Fp8Layout) -> ModelSection:
    return ModelSection(layers=layout.layers, hidden=256, heads=8, ffn=256, vocab=64, loops=layout.loops)


def rows_of(layout: Fp8Layout) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels int64 and mask [MICROBATCHES x data x MICROBATCH, s]."""
    generator = torch.Generator().manual_seed(3)
    count = MICROBATCHES * layout.data * MICROBATCH
    tokens = torch.randint(0, 64, (count, SEQUENCE), generator=generator)
    labels = torch.randint(0, 64, (count, SEQUENCE), generator=generator)
    return tokens, labels, (torch.rand(count, SEQUENCE, generator=generator) > 0.2).float()


def _compare(layout: Fp8Layout, context: ParallelContext, wanted: Expected, exact: Expected) -> Fp8Differences:
    reference = ReferenceLoopLM(reference_config(model_of(layout)))
    fill_reference(reference)
    lm = _WideAngles(
        model_of(layout),
        context,
        dtype=torch.float64,
        recompute=layout.recompute,
        fp8=layout.section(),
    )
    load(lm, to_megatron(dict(reference.state_dict()), reference.config))
    objective = ObjectiveSection(chunk_tokens=50)
    # Megatron's distributed optimizer knows no fp64: the engine makes gradients only.
    engine = Engine(lm, context, objective, None, loops=layout.loops)
    engine.keep_whole_gradients = True
    tokens, labels, mask = rows_of(layout)
    mine = []
    for index in range(MICROBATCHES):
        begin = (index * layout.data + context.data_rank) * MICROBATCH
        part = slice(begin, begin + MICROBATCH)
        mine.append(Microbatch(tokens[part], labels[part], mask[part]))
    means = engine.accumulate(mine)
    worst, worst_name, apart = 0.0, "", 0.0
    for name, parameter in lm.named_global_parameters():
        target, other = (
            take_shard(name, torch.from_numpy(which.gradients[name]), context.tensor_rank, context.tensor_size)
            for which in (wanted, exact)
        )
        if name.endswith("gate.bias"):
            continue  # a sum in which most terms cancel; its weight is compared
        scale = float(target.abs().max())
        difference = float((gradient_of(parameter) - target).abs().max()) / scale
        apart = max(apart, float((gradient_of(parameter) - other).abs().max()) / scale)
        if difference >= worst:
            worst, worst_name = difference, name
    assert lm.fp8_emulation is not None
    return Fp8Differences(
        loss=abs(means.loss - wanted.loss) / abs(wanted.loss),
        gradient=worst,
        name=worst_name,
        against_exact=apart,
        weights_quantised=lm.fp8_emulation.weights_quantised,
    )
