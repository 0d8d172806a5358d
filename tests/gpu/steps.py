"""One training step on a GPU and the same step of the fp64 reference on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from ouro_megatron.model.documents import DocumentBounds
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import (
    Fp8Section,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    Recompute,
)
from ouro_megatron.training.engine import Engine, Microbatch
from tests.distributed.parity import load
from tests.reference.looplm import ReferenceLoopLM, ReferenceObjective, reference_loss, token_loss
from tests.reference.mapping import reference_config, to_megatron

MODEL = ModelSection(layers=3, hidden=256, heads=2, ffn=512, vocab=1024, loops=3)
SEQUENCE, ROWS, MICROBATCHES = 256, 2, 2
DOCUMENTS = (100, 1, 27, 128)
"""Lengths of the documents of each row of a packed batch."""


def needs_transformer_engine() -> None:
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")


@dataclass(frozen=True)
class Step:
    """What one accumulation of gradients gave, on the CPU in fp64."""

    loss: float
    gradients: dict[str, Tensor]

    def distance(self, other: "Step") -> float:
        """Norm of the difference of all gradients over the norm of the other's."""
        difference = sum(
            float((self.gradients[name] - value).square().sum()) for name, value in other.gradients.items()
        )
        return (difference / sum(float(value.square().sum()) for value in other.gradients.values())) ** 0.5

    def worst(self, other: "Step") -> tuple[str, float]:
        """The tensor whose gradient is furthest off, over its own norm."""
        found = {
            name: float((self.gradients[name] - value).norm() / value.norm()) for name, value in other.gradients.items()
        }
        name = max(found, key=lambda key: found[key])
        return name, found[name]


@cache
def weights() -> dict[str, Tensor]:
    """Reference weights that bf16 holds exactly, so that all sides start from the same model."""
    reference = ReferenceLoopLM(reference_config(MODEL))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            around = 1.0 if parameter.dim() == 1 and parameter.numel() > 1 else 0.0
            parameter.copy_((torch.randn_like(parameter) * 0.05 + around).bfloat16())
    return dict(reference.state_dict())


@cache
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS * MICROBATCHES, SEQUENCE)
    tokens, labels = (torch.randint(0, MODEL.vocab, shape, generator=generator) for _ in range(2))
    return tokens, labels, (torch.rand(shape, generator=generator) > 0.2).float()


@cache
def reference_step(packed: bool = False) -> Step:
    reference = ReferenceLoopLM(reference_config(MODEL))
    reference.load_state_dict(weights())
    reference.double()
    tokens, labels, mask = batch()
    if packed:
        total = torch.zeros((), dtype=torch.float64)
        for start, length in zip(torch.tensor((0, *DOCUMENTS)).cumsum(0).tolist(), DOCUMENTS, strict=False):
            part = (slice(None), slice(start, start + length))
            outputs = reference(tokens[part])
            total = total + (token_loss(outputs, labels[part], ReferenceObjective()) * mask[part]).sum()
        loss = total / mask.sum()
    else:
        loss = reference_loss(reference, tokens, labels, mask, ReferenceObjective())
    loss.backward()
    found = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    return Step(float(loss.detach()), to_megatron(found, reference.config))


@contextmanager
def on_gpu() -> Iterator[ParallelContext]:
    context = create_context(ParallelSection(), "cuda")
    try:
        yield context
    finally:
        context.close()


def engine_of(
    context: ParallelContext,
    implementation: str,
    dtype: torch.dtype = torch.bfloat16,
    fp8: Fp8Section | None = None,
    recompute: Recompute = "none",
    lr: float = 1e-3,
    cuda_graphs: bool = False,
) -> Engine:
    model = MODEL.model_copy(update={"implementation": implementation})
    lm = LoopLM(model, context, dtype=dtype, fp8=fp8, recompute=recompute)
    load(
        lm, {name: value.to(context.device) for name, value in to_megatron(weights(), reference_config(model)).items()}
    )
    engine = Engine(
        lm,
        context,
        ObjectiveSection(chunk_tokens=96),
        OptimizerSection(lr=lr),
        loops=model.loops,
        cuda_graphs=cuda_graphs,
    )
    engine.adopt_weights()
    return engine


def microbatches(device: torch.device, packed: bool = False) -> list[Microbatch]:
    parts = []
    for index in range(MICROBATCHES):
        rows = slice(index * ROWS, (index + 1) * ROWS)
        tokens, labels, mask = (whole[rows].to(device) for whole in batch())
        documents = None
        if packed:
            positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).repeat(ROWS, 1)
            documents = DocumentBounds.of(positions, device)
        parts.append(Microbatch(tokens, labels, mask, documents))
    return parts


def step_of(engine: Engine, packed: bool = False) -> Step:
    means = engine.accumulate(microbatches(engine.context.device, packed))
    gradients = {name: p.main_grad.double().cpu() for name, p in engine.lm.named_global_parameters()}  # type: ignore[attr-defined]
    return Step(means.loss, gradients)
