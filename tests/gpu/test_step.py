"""A training step on a GPU, of both layer implementations, against the fp64 reference."""

import pytest
import torch

from ouro_megatron.recipe.schema import Fp8Section, Recompute
from tests.gpu.steps import MODEL, engine_of, microbatches, needs_transformer_engine, on_gpu, reference_step, step_of

IMPLEMENTATIONS = ["local", "transformer_engine"]


def prepare(implementation: str) -> None:
    if implementation == "transformer_engine":
        needs_transformer_engine()


def test_fp32_equals_the_reference() -> None:
    with on_gpu() as context:
        found = step_of(engine_of(context, "local", torch.float32))
    wanted = reference_step()
    assert found.loss == pytest.approx(wanted.loss, abs=1e-5)
    assert found.worst(wanted)[1] < 1e-4, found.worst(wanted)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_is_near_the_reference(implementation: str, packed: bool) -> None:
    prepare(implementation)
    with on_gpu() as context:
        found = step_of(engine_of(context, implementation), packed)
    wanted = reference_step(packed)
    assert found.loss == pytest.approx(wanted.loss, rel=2e-3)
    assert found.distance(wanted) < 2e-2
    assert found.worst(wanted)[1] < 6e-2, found.worst(wanted)


def test_both_implementations_agree_in_bf16() -> None:
    needs_transformer_engine()
    with on_gpu() as context:
        local = step_of(engine_of(context, "local"))
        engine = step_of(engine_of(context, "transformer_engine"))
    assert engine.loss == pytest.approx(local.loss, rel=1e-2)
    assert engine.distance(local) < 2e-2


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("fp8", [None, "current", "blockwise"])
def test_recomputation_changes_nothing(recompute: Recompute, fp8: str | None) -> None:
    needs_transformer_engine()
    section = None if fp8 is None else Fp8Section(recipe=fp8)
    with on_gpu() as context:
        kept = step_of(engine_of(context, "transformer_engine", fp8=section))
        made_again = step_of(engine_of(context, "transformer_engine", fp8=section, recompute=recompute))
    assert made_again.loss == pytest.approx(kept.loss, rel=1e-5)
    assert made_again.distance(kept) < 1e-3


@pytest.mark.parametrize(("recipe", "first"), [("current", 0), ("current", 1), ("blockwise", 0), ("delayed", 0)])
def test_fp8_stays_within_bounds(recipe: str, first: int) -> None:
    """Delayed scaling begins without a history: its second pass is what counts."""
    needs_transformer_engine()
    with on_gpu() as context:
        engine = engine_of(context, "transformer_engine", fp8=Fp8Section(recipe=recipe, first_layers_bf16=first))
        step_of(engine)
        found = step_of(engine)
    wanted = reference_step()
    assert found.loss == pytest.approx(wanted.loss, rel=1e-2)
    assert found.distance(wanted) < 0.25
    assert found.distance(wanted) > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_weight_copies_are_made_once_a_step_and_never_stale(recipe: str) -> None:
    """Three updates with copies kept over loops and microbatches, and with copies made in every visit: equal losses."""
    needs_transformer_engine()
    runs = []
    with on_gpu() as context:
        for every_visit in (False, True):
            engine = engine_of(context, "transformer_engine", fp8=Fp8Section(recipe=recipe), lr=1e-2)
            linears = [m for m in engine.lm.modules() if hasattr(m, "is_first_microbatch")]
            assert len(linears) == 4 * MODEL.layers
            if every_visit:
                for linear in linears:
                    linear.register_forward_pre_hook(lambda module, _: module._fp8_workspaces.clear())
            losses = []
            for _ in range(3):
                means = engine.accumulate(microbatches(context.device))
                assert all(len(linear._fp8_workspaces) == 1 for linear in linears)
                losses.append(engine.update(means, 1e-2).means.loss)
                assert not any(linear._fp8_workspaces for linear in linears), "an update must ask for new copies"
            losses.append(engine.evaluate(microbatches(context.device)).means().loss)
            runs.append(losses)
    kept, made = runs
    assert kept == pytest.approx(made, rel=1e-3)
    assert kept[-1] < kept[0] - 0.05


def test_fp8_parameters_train() -> None:
    """Weights stored in 8 bits are what FP8 products see anyway; their updates go through fp32 copies as before."""
    needs_transformer_engine()
    runs = []
    with on_gpu() as context:
        for parameters in (True, False):
            fp8 = Fp8Section(recipe="current", parameters=parameters)
            engine = engine_of(context, "transformer_engine", fp8=fp8, lr=1e-2)
            runs.append([engine.train_step(microbatches(context.device), 1e-2).means.loss for _ in range(4)])
    stored, plain = runs
    assert stored == pytest.approx(plain, rel=2e-2)
    assert stored[-1] < stored[0] - 0.5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_deterministic_mode_repeats_bit_for_bit(implementation: str) -> None:
    prepare(implementation)
    from ouro_megatron.parallel.platform import make_deterministic

    make_deterministic()
    try:
        with on_gpu() as context:
            runs = []
            for _ in range(2):
                engine = engine_of(context, implementation)
                losses = [engine.train_step(microbatches(context.device), 1e-3).means.loss for _ in range(3)]
                runs.append((losses, {n: p.detach().cpu() for n, p in engine.lm.named_global_parameters()}))
    finally:
        torch.use_deterministic_algorithms(False)
    (first_losses, first), (second_losses, second) = runs
    assert first_losses == second_losses
    assert all(torch.equal(first[name], second[name]) for name in first)
