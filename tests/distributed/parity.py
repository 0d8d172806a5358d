"""One training step of a tiny model at some layout, compared with the single-process reference."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ouro_megatron.model.documents import DocumentBounds
from ouro_megatron.model.layout import take_shard
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ModelSection, ObjectiveSection, OptimizerSection, ParallelSection, Recompute
from ouro_megatron.training.engine import Engine, Microbatch
from tests.reference.looplm import ReferenceAdamW, ReferenceLoopLM, ReferenceObjective, reference_loss, token_loss
from tests.reference.mapping import reference_config, to_megatron

SEQUENCE, MICROBATCH = 16, 2


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    loops: int = 4
    microbatches: int = 2
    """A data-parallel rank's share of the global batch."""
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    recompute_loops: int | None = None
    kind: Literal["expected_loss", "last_loop", "gate"] = "expected_loss"
    prior: Literal["uniform", "geometric"] = "uniform"
    kv_heads: int = 4
    packed: bool = False
    """Several documents a row, compared with the reference on each document alone."""
    layers: tuple[int, ...] | None = None
    """Layers of each pipeline rank; balanced when None."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    def __str__(self) -> str:
        extras = [
            word
            for word, on in (
                (f"cp{self.context}", self.context > 1),
                ("sp", self.sequence_parallel),
                (f"recompute-{self.recompute}-{self.recompute_loops or 'all'}", self.recompute != "none"),
                (self.kind, self.kind != "expected_loss"),
                (self.prior, self.prior != "uniform"),
                (f"kv{self.kv_heads}", self.kv_heads != 4),
                ("packed", self.packed),
                (f"layers{self.layers}", self.layers is not None),
            )
            if on
        ]
        shape = f"tp{self.tensor}-pp{self.pipeline}-dp{self.data}-t{self.loops}-m{self.microbatches}"
        return "-".join([shape, *extras])


@dataclass(frozen=True)
class Differences:
    """Largest differences of one rank from the reference."""

    loss: float
    ce: float
    grad_norm: float
    gradient: float
    """Largest difference of a gradient over the largest entry of the reference's for that module, worst tensor."""
    gradient_name: str
    gradients_compared: int
    weight: float
    """Largest absolute difference of a weight after one optimizer step."""
    evaluation: float
    """The loss of `evaluate` before the step against the reference."""


def model_section(layout: Layout, layers: int = 4) -> ModelSection:
    return ModelSection(
        layers=layers, hidden=32, heads=4, kv_heads=layout.kv_heads, ffn=48, vocab=64, loops=layout.loops
    )


def parallel_section(layout: Layout) -> ParallelSection:
    return ParallelSection(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        sequence=layout.sequence_parallel,
    )


def fill_reference(reference: ReferenceLoopLM, seed: int = 0) -> None:
    """Weights large enough that loops, gates and layers all matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            around = 1.0 if parameter.dim() == 1 and parameter.numel() > 1 else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.1 + around)


def batch(count: int, vocab: int = 64, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels int64 [count, s] and a loss mask [count, s] with holes in it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (count, SEQUENCE), generator=generator)
    labels = torch.randint(0, vocab, (count, SEQUENCE), generator=generator)
    mask = (torch.rand(count, SEQUENCE, generator=generator) > 0.2).float()
    # The last data-parallel rank counts far fewer tokens: a mean of means would be wrong.
    mask[count - count // 4 :, : SEQUENCE // 2] = 0.0
    return tokens, labels, mask


ROWS = ((16,), (5, 1, 10), (1, 1, 2, 12), (8, 8), (15, 1), (3, 4, 9))
"""Lengths of the documents in each row of a packed batch, over and over."""


def documents_of(row: int) -> list[slice]:
    """Where the documents of a row of a packed batch lie."""
    ends = [0, *itertools.accumulate(ROWS[row % len(ROWS)])]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def positions(count: int) -> Tensor:
    """int64 [count, s]: each token's place in its document."""
    return torch.stack([torch.cat([torch.arange(n) for n in ROWS[row % len(ROWS)]]) for row in range(count)])


def share(whole: tuple[Tensor, ...], layout: Layout, data_rank: int) -> list[Microbatch]:
    """This data-parallel rank's microbatches of a global batch."""
    rows = MICROBATCH * layout.data
    where = positions(len(whole[0]))
    parts = []
    for index in range(layout.microbatches):
        first = index * rows + data_rank * MICROBATCH
        mine = slice(first, first + MICROBATCH)
        documents = DocumentBounds.of(where[mine], torch.device("cpu")) if layout.packed else None
        tokens, labels, mask = (tensor[mine] for tensor in whole)
        parts.append(Microbatch(tokens, labels, mask, documents))
    return parts


def expected_loss(
    layout: Layout, reference: ReferenceLoopLM, whole: tuple[Tensor, Tensor, Tensor], objective: ReferenceObjective
) -> Tensor:
    """The reference's mean over all counted tokens; of a packed batch each document is run by itself."""
    if not layout.packed:
        return reference_loss(reference, *whole, objective)
    tokens, labels, mask = whole
    total = torch.zeros(())
    for row in range(len(tokens)):
        for part in documents_of(row):
            outputs = reference(tokens[row : row + 1, part])
            total = total + (token_loss(outputs, labels[row : row + 1, part], objective) * mask[row, part]).sum()
    return total / mask.sum()


def compare(layout: Layout) -> Differences:
    """Runs on every rank of the layout; see `run_ranks`."""
    return compare_all([layout])[0]


def compare_all(layouts: list[Layout]) -> list[Differences]:
    """`compare` for layouts that differ only in what one set of process groups can run one after the other."""
    context = create_context(parallel_section(layouts[0]))
    try:
        return [_compare(layout, context) for layout in layouts]
    finally:
        context.close()


def _compare(layout: Layout, context: ParallelContext) -> Differences:
    model = model_section(layout, sum(layout.layers or (4,)))
    config = reference_config(model)
    reference = ReferenceLoopLM(config)
    fill_reference(reference)
    whole = batch(layout.microbatches * layout.data * MICROBATCH)
    if layout.packed:
        whole[2][:MICROBATCH] = 0.0  # one rank's first microbatch counts no token at all
    lm = LoopLM(
        model,
        context,
        recompute=layout.recompute,
        recompute_loops=layout.recompute_loops,
        layers_by_rank=layout.layers,
    )
    load(lm, to_megatron(dict(reference.state_dict()), config))
    objective = ObjectiveSection(kind=layout.kind, prior=layout.prior, eta=0.3, chunk_tokens=7)
    engine = Engine(lm, context, objective, OptimizerSection(lr=1e-3, eps=1e-4), loops=layout.loops)
    return _step_and_compare(layout, engine, reference, whole)


def load(lm: LoopLM, whole: dict[str, Tensor]) -> None:
    """Copies whole tensors into this rank's parameters."""
    with torch.no_grad():
        for name, parameter in lm.named_global_parameters():
            parameter.copy_(take_shard(name, whole[name], lm.context.tensor_rank, lm.context.tensor_size))


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Where Megatron's gradient buffer keeps the reduced gradient."""
    gradient = parameter.main_grad  # type: ignore[attr-defined]
    assert isinstance(gradient, Tensor)
    return gradient


def _step_and_compare(
    layout: Layout, engine: Engine, reference: ReferenceLoopLM, whole: tuple[Tensor, Tensor, Tensor]
) -> Differences:
    lm, context = engine.lm, engine.context
    config = reference.config
    reference.double()  # its own rounding must not blur the comparison
    if layout.kind != "expected_loss":
        for name, parameter in reference.named_parameters():
            parameter.requires_grad_(("early_exit" in name) == (layout.kind == "gate"))
    expected = expected_loss(
        layout, reference, whole, ReferenceObjective(kind=layout.kind, prior=layout.prior, eta=0.3)
    )
    expected.backward()
    for parameter in reference.parameters():
        if parameter.requires_grad and parameter.grad is None:  # one loop: the gate does not matter
            parameter.grad = torch.zeros_like(parameter)
    gradients = to_megatron(
        {name: p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None}, config
    )
    norm = ReferenceAdamW(lr=1e-3, eps=1e-4).step(reference)
    weights = to_megatron(dict(reference.state_dict()), config)
    mine = share(whole, layout, context.data_rank)
    evaluated = engine.evaluate(mine).means()
    engine.keep_whole_gradients = True
    means = engine.accumulate(mine)
    worst, worst_name, compared = 0.0, "", 0
    for name, parameter in lm.named_global_parameters():
        if not parameter.requires_grad:
            continue
        target = take_shard(name, gradients[name], context.tensor_rank, context.tensor_size)
        # Weight and bias of one linear map share a scale: the gate's bias is a sum in which most terms cancel.
        module = name.rpartition(".")[0] + "."
        scale = max(float(value.abs().max()) for other, value in gradients.items() if other.startswith(module)) or 1.0
        difference = float((gradient_of(parameter) - target).abs().max()) / scale
        compared += 1
        if difference >= worst:
            worst, worst_name = difference, name
    result = engine.update(means, 1e-3)
    drift = 0.0
    for name, parameter in lm.named_global_parameters():
        wanted = take_shard(name, weights[name], context.tensor_rank, context.tensor_size)
        drift = max(drift, float((parameter - wanted).abs().max()))
    return Differences(
        loss=abs(result.means.loss - float(expected)),
        ce=abs(evaluated.ce[-1] - result.means.ce[-1]),
        grad_norm=abs(result.grad_norm - norm) / max(norm, 1e-12),
        gradient=worst,
        gradient_name=worst_name,
        gradients_compared=compared,
        weight=drift,
        evaluation=abs(evaluated.loss - float(expected)),
    )
