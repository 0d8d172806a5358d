"""Attention over a cut sequence: values and gradients in fp64, what a rank keeps, how often it gathers."""

import itertools
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ouro_megatron.model.context_attention as context_attention_module
from ouro_megatron.model.context_attention import ContextPart, attend_slices, context_attention
from ouro_megatron.parallel.context import create_context
from ouro_megatron.parallel.sequence_slices import own_positions, own_tokens, places_in_gathered
from ouro_megatron.recipe.schema import ParallelSection
from tests.distributed.ranks import run_ranks
from tests.planning.test_memory import Storages

LENGTH, ROWS, HEADS, DIM = 32, 2, 4, 8
DOCUMENTS = {"plain": [32, 32], "packed": [3, 1, 17, 11, 16, 1, 15], "short": [1] * 32 + [2] * 16}
CPU = torch.device("cpu")


def test_slices_are_the_known_order() -> None:
    assert own_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert own_positions(8, 1, 2).tolist() == [2, 3, 4, 5]
    tokens_bs = torch.arange(16).view(2, 8)
    assert own_tokens(tokens_bs, 1, 2).tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    gathered = torch.cat([own_tokens(tokens_bs, rank, 4) for rank in range(4)], dim=1)
    assert torch.equal(gathered[:, places_in_gathered(8, 4)], tokens_bs)


def test_work_is_balanced() -> None:
    """Pairs of query and key that are computed, of a plain row, on each of 8 ranks."""
    pairs = set()
    for rank in range(8):
        part = ContextPart.of([64], 1, 64, rank, 8, CPU)
        runs = [(q, k) for sight in part.sights for q, k in zip(sight.queries, sight.keys, strict=True)]
        pairs.add(sum(q * k - q * (q - 1) // 2 for q, k in runs))
    assert pairs == {64 * 65 // 2 // 8}


def test_documents_must_fill_the_rows() -> None:
    with pytest.raises(ValueError, match="do not fill 2 rows of 8"):
        ContextPart.of([8, 7], 2, 8, 0, 2, CPU)


def tensors(kv_heads: int) -> tuple[Tensor, ...]:
    """query, key, value and the gradient of the result, whole, fp64."""
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(torch.randn(LENGTH, ROWS, n, DIM, generator=generator, dtype=torch.float64) for n in heads)


def whole_attention(documents: list[int], kv_heads: int) -> tuple[Tensor, ...]:
    """Result and gradients of query, key, value from a plain masked softmax."""
    *inputs, d_out = tensors(kv_heads)
    q, k, v = (x.requires_grad_() for x in inputs)
    document = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents)).view(ROWS, LENGTH)
    same = document[:, :, None] == document[:, None, :]
    mask = (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]
    key, value = (x.repeat_interleave(HEADS // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, key) / DIM**0.5
    out = torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)


def worst_difference(cases: list[tuple[str, int]]) -> float:
    context = create_context(ParallelSection(context=int(os.environ["WORLD_SIZE"])))
    try:
        own = context.own_positions(LENGTH)
        worst = 0.0
        for name, kv_heads in cases:
            documents = DOCUMENTS[name]
            part = ContextPart.of(documents, ROWS, LENGTH, context.context_rank, context.context_size, CPU)
            *inputs, d_out = (x[own] for x in tensors(kv_heads))
            q, k, v = (x.requires_grad_() for x in inputs)
            out = context_attention(q, k, v, part, context.groups.cp)
            found = (out.detach(), *torch.autograd.grad(out, (q, k, v), d_out))
            for mine, whole in zip(found, whole_attention(documents, kv_heads), strict=True):
                worst = max(worst, float((mine - whole[own]).abs().max()))
        return worst
    finally:
        context.close()


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients(size: int) -> None:
    cases = list(itertools.product(DOCUMENTS, (HEADS, 2, 1)))
    assert max(run_ranks(worst_difference, size, cases)) < 1e-13


DEVICES = [
    pytest.param("cpu", torch.float64, 1e-13, id="cpu"),
    pytest.param("cuda", torch.bfloat16, 3e-2, id="cuda-bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, 1e-3, id="cuda-fp32", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("name", list(DOCUMENTS))
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_every_ranks_part_on_one_device(
    device: str, dtype: torch.dtype, tolerance: float, name: str, kv_heads: int
) -> None:
    """The kernels of all ranks of a group of 4, one after the other, on whole keys and values in gathered order."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA")
    size, documents = 4, DOCUMENTS[name]
    gathered = torch.cat([own_positions(LENGTH, rank, size) for rank in range(size)])
    *inputs, d_out = (x.to(device, dtype) for x in tensors(kv_heads))
    q, k, v = (x.requires_grad_() for x in inputs)
    tokens = torch.stack((k, v), dim=2)[gathered].flatten(0, 1)
    results = []
    for rank in range(size):
        part = ContextPart.of(documents, ROWS, LENGTH, rank, size, torch.device(device))
        seen = tuple(tokens.index_select(0, sight.where) for sight in part.sights)
        results.append(attend_slices(q[own_positions(LENGTH, rank, size)], seen, part))
    out = torch.cat(results)[places_in_gathered(LENGTH, size)]
    found = (out.detach(), *torch.autograd.grad(out, (q, k, v), d_out))
    for mine, whole in zip(found, whole_attention(documents, kv_heads), strict=True):
        assert float((mine.cpu().double() - whole).abs().max()) < tolerance * float(whole.abs().max())


def test_long_runs_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_attention_module, "BLOCK", 3)
    for name, kv_heads in itertools.product(DOCUMENTS, (HEADS, 2)):
        test_every_ranks_part_on_one_device("cpu", torch.float64, 1e-13, name, kv_heads)


class Communication(TorchDispatchMode):
    """Names of the collectives that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._schema.name.removeprefix("c10d::").strip("_"))
        return func(*args, **(kwargs or {}))


def kept_and_communication(recompute: bool) -> tuple[int, list[str]]:
    """Bytes kept between forward and backward beyond the inputs and masks; the collectives of both."""
    context = create_context(ParallelSection(context=2))
    try:
        part = ContextPart.of(DOCUMENTS["plain"], ROWS, LENGTH, context.context_rank, 2, CPU)
        own = context.own_positions(LENGTH)
        inputs = tuple(x[own].requires_grad_() for x in tensors(HEADS)[:3])

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return context_attention(query, key, value, part, context.groups.cp)

        with Communication() as communication:
            with Storages() as storages:
                out = checkpoint(attend, *inputs, use_reentrant=True) if recompute else attend(*inputs)
            masks = [mask for sight in part.sights for mask in sight.masks]
            deadline = time.monotonic() + 5.0
            # Gloo's threads let go of the tensors of a finished collective a little later.
            while storages.alive([*inputs, *masks]) >= GATHERED and time.monotonic() < deadline:
                time.sleep(0.05)
            kept = storages.alive([*inputs, *masks])
            out.sum().backward()
        return kept, communication.names
    finally:
        context.close()


OWN = LENGTH // 2 * ROWS * HEADS * DIM * 8
"""Bytes of a rank's queries, of its keys, or of its values."""
GATHERED = 2 * 2 * OWN
"""Bytes of all keys and values."""


@pytest.mark.distributed
def test_gathered_keys_are_not_kept() -> None:
    softmax = LENGTH // 2 * ROWS * HEADS * 8
    for kept, communication in run_ranks(kept_and_communication, 2, False):
        assert kept == 3 * OWN + softmax  # queries by slice, results by slice, the whole result
        assert communication == ["allgather_base", "allgather_base", "reduce_scatter_base"]
    for kept, communication in run_ranks(kept_and_communication, 2, True):
        assert kept == OWN
        # The recomputed forward gathers for its backward.
        assert communication == ["allgather_base", "allgather_base", "reduce_scatter_base"]
