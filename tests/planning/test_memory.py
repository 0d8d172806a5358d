"""The planner's bytes against the storages that autograd holds in a real layer, and golden totals."""

import gc
import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.planning.layout import Layout
from ouro_megatron.planning.memory import gather_buffer, layer_bytes
from ouro_megatron.recipe.schema import ModelSection, ParallelSection, Recompute
from ouro_megatron.training.microbatch import context_part
from tests.distributed.ranks import run_ranks

MODEL = ModelSection(layers=1, hidden=64, heads=4, kv_heads=2, ffn=176, vocab=128, loops=2)


def layout(**changes: object) -> Layout:
    plain = Layout(
        model=MODEL,
        sequence=48,
        microbatch=2,
        microbatches=4,
        tensor=1,
        pipeline=1,
        data=1,
        sequence_parallel=False,
        layers=(1,),
        recompute="none",
        recompute_loops=None,
        bytes_per_value=4,
        chunk_tokens=1024,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def kept_by_a_layer(wanted: list[Layout]) -> list[int]:
    """Bytes of the storages a layer's forward keeps for backward, parameters apart; run on the layouts' ranks."""
    first = wanted[0]
    sizes = ParallelSection(tensor=first.tensor, context=first.context, sequence=first.sequence_parallel)
    context = create_context(sizes)
    try:
        return [_kept(each, context) for each in wanted]
    finally:
        context.close()


class Storages(TorchDispatchMode):
    """Remembers every storage that an operation made, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive(self, without: list[torch.Tensor]) -> int:
        gc.collect()
        known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in without}
        return sum(
            size for cdata, (reference, size) in self.made.items() if cdata not in known and not reference.expired()
        )


def _kept(wanted: Layout, context: ParallelContext) -> int:
    dtype = torch.bfloat16 if wanted.bytes_per_value == 2 else torch.float32
    lm = LoopLM(wanted.model, context, dtype=dtype, recompute=wanted.recompute)
    initialise(lm, 0)
    rows = wanted.sequence // wanted.context // (wanted.tensor if wanted.sequence_parallel else 1)
    h_sbh = torch.randn(rows, wanted.microbatch, wanted.model.hidden).to(dtype).requires_grad_()
    rotary, part = lm.rotary(context.own_positions(wanted.sequence)), None
    if wanted.context > 1:
        rows_of = [wanted.sequence] * wanted.microbatch
        part = context_part(rows_of, wanted.microbatch, wanted.sequence, context)
    lm.decoder.post_layer_norm, lm.decoder.final_layernorm = False, None
    with Storages() as storages:
        result = lm.run_layers(h_sbh, rotary, documents=part)
    # The result is the next layer's input and counted there.
    without = [*lm.parameters(), rotary, h_sbh, result]
    if part is not None:  # masks are the same for all layers
        without += [mask for sight in part.sights for mask in sight.masks]
    own = h_sbh.untyped_storage().nbytes()
    deadline = time.monotonic() + 5.0
    # Gloo's threads let go of the tensors of a finished collective a little later.
    while (kept := storages.alive(without) + own) > expected(wanted) and time.monotonic() < deadline:
        time.sleep(0.05)
    return kept


def expected(wanted: Layout) -> float:
    return layer_bytes(wanted, wanted.recompute) + gather_buffer(wanted)


@pytest.mark.parametrize(("tensor", "sequence", "context"), [(1, False, 1), (2, False, 1), (2, True, 1), (1, False, 2)])
def test_a_layer_keeps_what_the_plan_says(tensor: int, sequence: bool, context: int) -> None:
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    wanted = [
        layout(tensor=tensor, context=context, sequence_parallel=sequence, recompute=mode, bytes_per_value=size)
        for mode, size in itertools.product(modes, (2, 4))
    ]
    for measured in run_ranks(kept_by_a_layer, tensor * context, wanted):
        assert measured == [expected(each) for each in wanted]
