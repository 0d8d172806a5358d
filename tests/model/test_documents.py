"""Documents in one sequence are as alone: values, gradients, memory."""

import itertools
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_megatron.model.attention import transformer_engine_core
from ouro_megatron.model.documents import DocumentBounds, document_attention
from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ModelSection, ObjectiveSection, OptimizerSection, ParallelSection
from ouro_megatron.training.engine import Engine, Microbatch
from tests.distributed.ranks import run_ranks

LENGTHS = [(5, 1, 10), (16,), (1, 1, 14)]
ALIKE: list[tuple[int, ...]] = [(3, 5, 3, 5), (5, 3, 5, 3), (3, 3, 5, 5), (5, 5, 3, 3)]
"""Few lengths, not in order: attention takes all documents of one length together."""
CPU = torch.device("cpu")


def positions(rows: list[tuple[int, ...]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def states_and_gradients(
    lm: LoopLM, tokens_bs: Tensor, documents: DocumentBounds | None
) -> tuple[list[Tensor], dict[str, np.ndarray]]:
    """h_t [b, s, h] of three loops, and the gradients of a function that treats each token otherwise."""
    lm.zero_grad()
    rotary = lm.rotary(torch.arange(tokens_bs.shape[1]) if documents is None else documents.positions_sb)
    h_sbh, states = lm.embed(tokens_bs), []
    for _ in range(3):
        h_sbh = lm.run_layers(h_sbh, rotary, documents=documents)
        states.append(h_sbh.transpose(0, 1))
    total = sum(((state * tokens_bs[..., None]).sin().sum() for state in states), torch.zeros((), dtype=lm.dtype))
    total.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in lm.named_parameters() if p.grad is not None}
    return [state.detach() for state in states], gradients


def difference_from_alone(rows: list[tuple[int, ...]], kv_heads: int, recompute: str) -> tuple[float, float, float]:
    """Largest differences, relative, of states and gradients in fp64; what other documents change in one's states."""
    context = create_context(ParallelSection())
    model = ModelSection(layers=2, hidden=32, heads=4, kv_heads=kv_heads, ffn=48, vocab=64, loops=3)
    lm = LoopLM(model, context, dtype=torch.float64, recompute=recompute)  # type: ignore[arg-type]
    initialise(lm, seed=1)
    lm.train()
    tokens_bs = torch.randint(0, 64, (len(rows), 16), generator=torch.Generator().manual_seed(2))
    bounds = DocumentBounds.of(positions(rows), CPU)
    together, gradients = states_and_gradients(lm, tokens_bs, bounds)
    worst, summed = 0.0, {name: np.zeros_like(value) for name, value in gradients.items()}
    for row, lengths in enumerate(rows):
        for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
            alone, part = states_and_gradients(lm, tokens_bs[row : row + 1, begin:end], None)
            for whole, own in zip(together, alone, strict=True):
                worst = max(worst, float((whole[row, begin:end] - own[0]).abs().max()))
            summed = {name: value + part[name] for name, value in summed.items()}
    gap = max(float(abs(gradients[name] - summed[name]).max() / abs(summed[name]).max()) for name in gradients)
    other = tokens_bs.clone()
    first = rows[0][0]
    other[0, :first] = (other[0, :first] + 1) % 64
    changed, _ = states_and_gradients(lm, other, bounds)
    leak = max(float((a[0, first:] - b[0, first:]).abs().max()) for a, b in zip(together, changed, strict=True))
    context.close()
    return worst, gap, leak


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("rows", "kv_heads"), [(LENGTHS, 4), (ALIKE, 2), (LENGTHS, 2)])
def test_packed_documents_are_as_alone_to_the_last_digits(
    rows: list[tuple[int, ...]], kv_heads: int, recompute: str
) -> None:
    worst, gap, leak = run_ranks(difference_from_alone, 1, rows, kv_heads, recompute)[0]
    assert worst < 1e-12
    assert gap < 1e-12
    assert leak == 0.0


def test_bounds_come_from_positions() -> None:
    bounds = DocumentBounds.of(positions(LENGTHS), CPU)
    assert bounds.lengths == (5, 1, 10, 16, 1, 1, 14)
    assert bounds.cu_seqlens.tolist() == [0, 5, 6, 16, 32, 33, 34, 48]
    assert bounds.longest == 16
    assert bounds.groups == [(length, 1) for length in bounds.lengths] and bounds.order is None
    alike = DocumentBounds.of(positions(ALIKE[:2]), CPU)
    assert alike.groups == [(3, 4), (5, 4)] and alike.order is not None
    assert alike.order.tolist()[:6] == [0, 1, 2, 8, 9, 10]
    assert alike.order[alike.back].tolist() == list(range(32))
    with pytest.raises(ValueError, match="begins with a document"):
        DocumentBounds.of(torch.arange(1, 9)[None], CPU)


class EndToEnd(nn.Module):
    """What Megatron's TEDotProductAttention does with "thd" and "sbhd" input, on torch's operators."""

    def __init__(self, context_parallel: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_parallel_size=context_parallel)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str, bias: None, packed: object
    ) -> Tensor:
        assert (mask, kind, bias) == (None, "causal", None)
        if packed is None:
            assert self.config.context_parallel_size > 1, "whole rows are torch's"
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)
        bounds = packed.cu_seqlens_q.tolist()  # type: ignore[attr-defined]
        assert packed.qkv_format == "thd"  # type: ignore[attr-defined]
        assert query.dim() == 3
        found = []
        for begin, end in itertools.pairwise(bounds):
            q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
            found.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
        return torch.cat(found).flatten(1)


def test_transformer_engines_attention_gets_documents_end_to_end() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(16, len(LENGTHS), 4, 8) for _ in range(3))
    bounds = DocumentBounds.of(positions(LENGTHS), CPU)
    core = transformer_engine_core(EndToEnd)(1)
    expected = document_attention(query, key, value, bounds).flatten(2)
    found = core(query, key, value, None, attn_mask_type="causal", attention_bias=None, packed_seq_params=bounds)
    torch.testing.assert_close(found, expected)
    plain = core(query, key, value, None, attn_mask_type="causal", attention_bias=None, packed_seq_params=None)
    cut = transformer_engine_core(EndToEnd)(2)
    torch.testing.assert_close(
        plain, cut(query, key, value, None, attn_mask_type="causal", attention_bias=None, packed_seq_params=None)
    )
    one = DocumentBounds.of(torch.arange(16).repeat(len(LENGTHS), 1), CPU)
    torch.testing.assert_close(plain, document_attention(query, key, value, one).flatten(2))


LONG = 65_536


def peak_of_a_long_step(lengths: tuple[int, ...]) -> tuple[float, float]:
    """MiB that one training step on 64K tokens adds to the process at most, and its loss."""
    context = create_context(ParallelSection())
    model = ModelSection(layers=1, hidden=32, heads=2, ffn=32, vocab=64, loops=2, rope_base=1e6)
    lm = LoopLM(model, context)
    initialise(lm, seed=1)
    engine = Engine(lm, context, ObjectiveSection(), OptimizerSection(lr=1e-3), loops=2)
    engine.adopt_weights()
    tokens = torch.randint(0, 64, (1, LONG), generator=torch.Generator().manual_seed(2))
    documents = DocumentBounds.of(positions([lengths]), CPU)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = engine.train_step([Microbatch(tokens, tokens.roll(-1), torch.ones(1, LONG), documents)], 1e-3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    context.close()
    return (peak - before) / 1024, result.means.loss


@pytest.mark.slow
def test_64k_tokens_need_no_mask() -> None:
    """A boolean mask alone would take 4 GiB; activations of this model are about 8 MiB a tensor."""
    (packed, loss), *_ = run_ranks(peak_of_a_long_step, 1, (24_000, 1, 20_000, 21_535), timeout=290)
    assert np.isfinite(loss)
    assert packed < 1024
