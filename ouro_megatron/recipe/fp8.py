"""Rules of `precision.fp8`. Part of `validate.check_recipe`."""

from collections.abc import Iterator

from ouro_megatron.recipe.layers import fp8_layers
from ouro_megatron.recipe.schema import Fp8Section, Recipe

UNIT = {"current": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}
"""What every dimension of a product must be a multiple of: kernels take 16 values at a time, blocks share a scale."""


def check_fp8(recipe: Recipe) -> Iterator[str]:
    """One line a problem: fields, values and what would fit."""
    fp8 = recipe.precision.fp8
    if fp8 is None:
        return
    yield from _where_it_runs(recipe, fp8)
    if not fp8_layers(recipe.model, fp8):
        yield (
            f"precision.fp8.first_layers_bf16={fp8.first_layers_bf16} and last_layers_bf16={fp8.last_layers_bf16} "
            f"leave none of model.layers={recipe.model.layers} in FP8; lower them, or remove precision.fp8"
        )
    if fp8.recipe == "delayed":
        yield from _delayed(recipe, fp8)
    yield from _shapes(recipe, fp8)


def fp8_warning(recipe: Recipe) -> str | None:
    """What people should know before they train with these settings; None when there is nothing."""
    fp8 = recipe.precision.fp8
    if fp8 is None or fp8.recipe != "delayed" or recipe.model.loops == 1:
        return None
    return (
        f"precision.fp8.recipe=delayed: the {recipe.model.loops} visits of a layer share one history of maxima, so "
        "early loops are scaled by what later loops needed; `current` and `blockwise` scale each visit by itself"
    )


def _where_it_runs(recipe: Recipe, fp8: Fp8Section) -> Iterator[str]:
    local = recipe.model.implementation == "local"
    if fp8.emulate:
        if not local:
            yield (
                "precision.fp8.emulate=true rounds in plain torch, but model.implementation=transformer_engine has "
                "real FP8 kernels; set model.implementation=local, or emulate=false"
            )
        if fp8.parameters:
            yield "precision.fp8.parameters=true needs Transformer Engine's FP8 tensors, not emulate=true; remove one"
        return
    if local:
        yield (
            "precision.fp8 with model.implementation=local: FP8 kernels are Transformer Engine's; set "
            "model.implementation=transformer_engine, or precision.fp8.emulate=true for the numbers without the speed"
        )
    if recipe.precision.compute != "bf16":
        yield f"precision.fp8 needs precision.compute=bf16 for what stays out of FP8, not {recipe.precision.compute}"
    most = recipe.model.layers // recipe.parallel.pipeline
    for field, count in (("first", fp8.first_layers_bf16), ("last", fp8.last_layers_bf16)):
        if count > most:
            yield (
                f"precision.fp8.{field}_layers_bf16={count} is more than Megatron-Core takes, the {most} layers of a "
                "pipeline rank; lower it, or parallel.pipeline"
            )
    if fp8.parameters and recipe.objective.kind == "gate":
        yield "precision.fp8.parameters=true keeps trained weights in 8 bits; objective.kind=gate trains none"


def _delayed(recipe: Recipe, fp8: Fp8Section) -> Iterator[str]:
    if fp8.first_layers_bf16 + fp8.last_layers_bf16 and not fp8.emulate:
        yield (
            "precision.fp8.recipe=delayed keeps one FP8 context for all layers of a rank: first_layers_bf16 and "
            "last_layers_bf16 must be 0; use current or blockwise to leave layers out"
        )
    if recipe.training.recompute == "full":
        yield (
            "precision.fp8.recipe=delayed with training.recompute=full: a layer made again in backward would be scaled "
            "by another visit's maxima; use recompute=selective or none, or another FP8 recipe (current, blockwise)"
        )
    if recipe.objective.kind == "gate":
        yield (
            "precision.fp8.recipe=delayed with objective.kind=gate: histories fill in training only, and the model "
            "does not train here; use current or blockwise"
        )


def _shapes(recipe: Recipe, fp8: Fp8Section) -> Iterator[str]:
    model, parallel, unit = recipe.model, recipe.parallel, UNIT[fp8.recipe]
    tensor, groups = parallel.tensor, model.kv_heads or model.heads
    dim = model.head_dim or model.hidden // model.heads
    over = f" / parallel.context={parallel.context}" if parallel.context > 1 else ""
    sizes = {
        f"model.hidden={model.hidden}": model.hidden,
        f"model.ffn={model.ffn} / parallel.tensor={tensor}": model.ffn / tensor,
        f"model.heads={model.heads} x {dim} / parallel.tensor={tensor}": model.heads * dim / tensor,
        f"queries, keys and values of a rank, ({model.heads} + 2 x {groups}) x {dim} / {tensor}": (
            (model.heads + 2 * groups) * dim / tensor
        ),
        f"tokens of a microbatch, data.sequence_length={recipe.data.sequence_length} x batch.microbatch="
        f"{recipe.batch.microbatch}{over}": recipe.data.sequence_length * recipe.batch.microbatch / parallel.context,
    }
    for what, size in sizes.items():
        if size % unit:
            yield f"{what} is {size:g}, not a multiple of {unit}, which precision.fp8.recipe={fp8.recipe} needs"
