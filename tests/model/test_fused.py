"""Which fused pieces are used, and that a CPU uses none, whatever is installed."""

import sys
from types import ModuleType

import pytest
import torch

from ouro_megatron.model.fused import FusedPieces, fused_pieces, fuses_weight_gradients
from ouro_megatron.parallel.context import create_context
from ouro_megatron.recipe.schema import ObjectiveSection, OptimizerSection, ParallelSection
from tests.distributed.ranks import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KERNEL = "fused_weight_gradient_mlp_cuda"


def test_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, KERNEL, None)  # importing it raises ImportError
    assert fuses_weight_gradients("local", CUDA) is None
    assert fuses_weight_gradients("transformer_engine", CUDA) == "Transformer Engine"
    monkeypatch.setitem(sys.modules, KERNEL, ModuleType(KERNEL))
    assert fuses_weight_gradients("local", CUDA) == "apex"
    assert fuses_weight_gradients("transformer_engine", CUDA) == "Transformer Engine"
    assert fuses_weight_gradients("local", CPU) is None


def test_one_line_for_people() -> None:
    line = FusedPieces("apex", "Transformer Engine", None).describe()
    assert (
        line == "weight gradients are added inside the product by apex; Adam: Transformer Engine; gradient norm: torch"
    )
    assert "by a hook (torch); Adam: torch" in FusedPieces(None, None, None).describe()


class FusedAdam:
    """Stands for Transformer Engine's, which takes GPU tensors only."""

    __module__ = "transformer_engine.pytorch.optimizers.fused_adam"

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("a GPU tensor is needed")


def norm_of(*args: object) -> None:
    raise RuntimeError("a GPU tensor is needed")


norm_of.__module__ = "amp_C"


def step_where_gpu_kernels_are_installed() -> tuple[FusedPieces, FusedPieces, float]:
    """What Megatron chose on import, what is used on the CPU, and the gradient norm of a step."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    from ouro_megatron.model.looplm import LoopLM, initialise
    from ouro_megatron.training.engine import Engine
    from tests.distributed.parity import Layout, batch, model_section, share

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = False, True
    clip_grads.l2_norm_impl = norm_of
    chosen = fused_pieces("local", CPU)
    context = create_context(ParallelSection(), "cpu")
    try:
        lm = LoopLM(model_section(Layout()), context)
        initialise(lm, 1)
        engine = Engine(lm, context, ObjectiveSection(), OptimizerSection(lr=1e-3), loops=2)
        engine.adopt_weights()
        return chosen, fused_pieces("local", CPU), engine.train_step(share(batch(4), Layout(), 0), 1e-3).grad_norm
    finally:
        context.close()


@pytest.mark.distributed
def test_a_cpu_takes_none_of_what_megatron_found() -> None:
    chosen, used, norm = run_ranks(step_where_gpu_kernels_are_installed, 1)[0]
    assert chosen == FusedPieces(None, "Transformer Engine", "apex")
    assert used == FusedPieces(None, None, None)
    assert 0 < norm < 100
