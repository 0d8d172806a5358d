"""Emulated linears in one process: how far from exact ones, what they keep, when a weight is rounded."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ouro_megatron.model.fp8.emulation import AmaxHistory, EmulatedColumnParallelLinear, EmulatedRowParallelLinear
from ouro_megatron.model.fp8.scaling import Recipe
from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import Fp8Section, ModelSection, ObjectiveSection, OptimizerSection, ParallelSection
from ouro_megatron.training.engine import Engine, Microbatch

RECIPES = get_args(Recipe)
MODEL = ModelSection(layers=3, hidden=128, heads=4, ffn=128, vocab=64, loops=2, init_std=0.1)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    made = create_context(ParallelSection(), "cpu")
    yield made
    made.close()


def build(context: ParallelContext, recipe: str | None = "current", **settings: Any) -> LoopLM:
    fp8 = None if recipe is None else Fp8Section(recipe=recipe, emulate=True, **settings)
    lm = LoopLM(MODEL, context, fp8=fp8)
    initialise(lm, 1)
    return lm


def linears(lm: LoopLM) -> list[EmulatedColumnParallelLinear | EmulatedRowParallelLinear]:
    kinds = (EmulatedColumnParallelLinear, EmulatedRowParallelLinear)
    return [module for module in lm.modules() if isinstance(module, kinds)]


def batch() -> list[Microbatch]:
    tokens = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(2))
    return [Microbatch(tokens, tokens.roll(-1, 1), torch.ones(2, 64))]


def relative(mine: Tensor, target: Tensor) -> float:
    return float((mine - target).norm() / target.norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_errors_of_the_three_products(context: ParallelContext, recipe: Recipe) -> None:
    """Rounding E4M3 is wrong by up to 1/16 of a value and 2.6% in the mean square, E5M2 by twice as much; two rounded
    operands add up, and a sum over random signs keeps the ratio."""
    linear = linears(build(context, recipe))[0]
    generator = torch.Generator().manual_seed(0)
    for visit in range(2):  # the second one is delayed scaling's first with a history
        x = torch.randn(64, 2, 128, generator=generator).requires_grad_()
        d_y = torch.randn(64, 2, linear.weight.shape[0], generator=generator) * 1e-4
        linear.weight.grad = None
        y, _ = linear(x)
        y.backward(d_y)
        if visit == 0 and recipe == "delayed":
            linear.emulation.weights_changed()
    with torch.no_grad():
        exact = x @ linear.weight.t()
        flat = d_y.flatten(0, 1)
        d_x, d_w = flat @ linear.weight, flat.t() @ x.flatten(0, 1)
    assert x.grad is not None and linear.weight.grad is not None
    by_tensor = recipe in ("current", "delayed")
    assert 0.02 < relative(y, exact) < 0.05
    for gradient, target in ((x.grad, d_x.view_as(x)), (linear.weight.grad, d_w)):
        assert 0.02 < relative(gradient, target) < (0.08 if by_tensor else 0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_whole_model_stays_near_the_exact_one(context: ParallelContext, recipe: Recipe) -> None:
    gradients, losses = [], []
    for kind in (None, recipe):
        engine = Engine(build(context, kind), context, ObjectiveSection(), OptimizerSection(lr=1e-3), loops=2)
        engine.adopt_weights()
        for _ in range(2):
            losses.append(engine.accumulate(batch()).loss)
        parts = [p.main_grad.flatten() for p in engine.lm.decoder.layers.parameters() if p.dim() > 1]
        gradients.append(torch.cat(parts))
    assert losses[3] == pytest.approx(losses[1], rel=0.01) and losses[3] != losses[1]
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.95


def test_which_layers(context: ParallelContext) -> None:
    assert len(linears(build(context, None))) == 0
    assert len(linears(build(context))) == 3 * 4
    lm = build(context, first_layers_bf16=1, last_layers_bf16=1)
    assert {id(module) for module in linears(lm)} == {id(m) for m in linears_of(lm.decoder.layers[1])}
    exact = build(context, None)
    rotary = lm.rotary_of(64, None)
    h = lm.embed(batch()[0].tokens_bs)
    for index, same in ((0, True), (1, False), (2, True)):
        mine, target = (model.decoder.layers[index](h, None, rotary_pos_emb=rotary)[0] for model in (lm, exact))
        assert torch.equal(mine, target) is same


def linears_of(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attention, layer.mlp
    return [attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2]


def test_the_input_itself_is_kept_for_backward(context: ParallelContext) -> None:
    """So that selective recomputation, which recognises it by its storage, saves what it does without FP8."""
    linear = linears(build(context))[0]
    x = torch.randn(16, 1, 128, requires_grad=True)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x)
    copies, _ = linear.weight_copies(linear.weight, training=False)
    assert sorted(kept) == sorted([x.untyped_storage().data_ptr(), copies.untyped_storage().data_ptr()])


def test_when_a_weight_is_rounded(context: ParallelContext) -> None:
    linear = linears(build(context))[0]
    emulation, x = linear.emulation, torch.randn(16, 1, 128)
    before, _ = linear(x)
    assert emulation.weights_quantised == 1
    linear(x)
    assert emulation.weights_quantised == 1
    with torch.no_grad():
        linear.weight.mul_(2.0)  # what torch itself writes is seen
    torch.testing.assert_close(linear(x)[0], 2 * before)
    assert emulation.weights_quantised == 2
    linear.weight.data.mul_(2.0)  # as through Megatron's buffer: not seen, so it must be said
    emulation.weights_changed()
    torch.testing.assert_close(linear(x)[0], 4 * before)
    assert emulation.weights_quantised == 3


def test_the_gate_stage_rounds_each_weight_once(context: ParallelContext) -> None:
    lm = build(context, "mxfp8")
    engine = Engine(lm, context, ObjectiveSection(kind="gate"), OptimizerSection(lr=1e-2), loops=2)
    engine.adopt_weights()
    first = engine.train_step(batch() * 2, 1e-2).means.loss
    assert lm.fp8_emulation is not None and lm.fp8_emulation.weights_quantised == 12
    for _ in range(5):
        last = engine.train_step(batch() * 2, 1e-2).means.loss
    assert last < first


def test_delayed_scaling_takes_earlier_visits_maxima(context: ParallelContext) -> None:
    """An activation that doubles saturates on the first visit, and fits on the next."""
    linear = linears(build(context, "delayed", amax_history=2))[0]
    history = linear.histories["input"]
    assert isinstance(history, AmaxHistory)
    x = torch.ones(16, 1, 128)
    for factor, remembered in ((1.0, [1.0, 0.0]), (2.0, [2.0, 1.0]), (2.0, [2.0, 2.0]), (1.0, [1.0, 2.0])):
        linear(factor * x)
        assert history.amax_v.tolist() == remembered
    with torch.no_grad():
        linear(8 * x)  # an evaluation changes nothing
    assert history.amax_v.tolist() == [1.0, 2.0]
    saturated, _ = linear(8 * x)
    fits, _ = linear(8 * x)
    assert relative(4 * saturated, fits) < 1e-5  # scaled for 2, so 8 became 2
