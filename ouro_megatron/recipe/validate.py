"""Rules that tie a recipe's fields together. Checked before any rank starts; all problems are listed at once."""

import math
from collections.abc import Iterator

from ouro_megatron.errors import RecipeError
from ouro_megatron.recipe.cuda_graphs import check_cuda_graphs
from ouro_megatron.recipe.fp8 import check_fp8
from ouro_megatron.recipe.layers import balanced_layers
from ouro_megatron.recipe.schedule import BatchPlan
from ouro_megatron.recipe.schema import ModelSection, Recipe
from ouro_megatron.recipe.spans import Span


def check_recipe(recipe: Recipe, world_size: int | None = None) -> None:
    """Raises RecipeError with one line a problem: fields, values and what would fit.

    With `world_size`, the number of ranks, the layout and the batch are checked against it. No file is touched.
    """
    problems = [*_model(recipe.model), *_layout(recipe, world_size), *_sequence(recipe), *_packing(recipe)]
    problems += _context(recipe)
    problems += _objective(recipe)
    problems += [*check_fp8(recipe), *check_cuda_graphs(recipe)]
    problems += _health(recipe)
    batch_problems = list(_batch(recipe, world_size))
    problems += [*batch_problems, *_data(recipe)]
    if not batch_problems and recipe.budget.total is not None:  # the plan below divides by the batch
        problems += _schedule(recipe)
    if problems:
        raise RecipeError(f"recipe {recipe.name!r} cannot run:\n" + "\n".join(f"  {line}" for line in problems))


def data_parallel_size(recipe: Recipe, world_size: int | None) -> int:
    """Data-parallel ranks: from the world size, else `parallel.data`, else 1."""
    parallel = recipe.parallel
    if world_size is not None:
        return max(1, world_size // ranks_of_a_sample(recipe))
    return parallel.data or 1


def ranks_needed(recipe: Recipe) -> int:
    """The smallest number of ranks the recipe can run on."""
    return ranks_of_a_sample(recipe) * (recipe.parallel.data or 1)


def ranks_of_a_sample(recipe: Recipe) -> int:
    """Ranks that work on the same samples."""
    return recipe.parallel.tensor * recipe.parallel.context * recipe.parallel.pipeline


def _model(model: ModelSection) -> Iterator[str]:
    groups = model.kv_heads or model.heads
    if model.head_dim is None and model.hidden % model.heads:
        yield f"model.hidden={model.hidden} is not a multiple of model.heads={model.heads}; set model.head_dim"
    if model.heads % groups:
        yield f"model.heads={model.heads} is not a multiple of model.kv_heads={groups}"
    dim = model.head_dim or model.hidden // model.heads
    if dim % 2:
        yield f"the head dimension {dim} is odd: RoPE turns pairs (model.head_dim, or model.hidden / model.heads)"


def _layout(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    model, parallel = recipe.model, recipe.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    for field, value in (
        ("model.heads", model.heads),
        ("model.kv_heads", model.kv_heads or model.heads),
        ("model.ffn", model.ffn),
        ("model.vocab", model.vocab),
    ):
        if value % tensor:
            fits = [size for size in range(1, tensor + 1) if value % size == 0]
            yield f"{field}={value} is not a multiple of parallel.tensor={tensor}; {fits[-1]} would fit"
    if model.layers < pipeline:
        yield (
            f"model.layers={model.layers} are fewer than parallel.pipeline={pipeline}: every pipeline rank holds one "
            f"layer at least; {model.layers} or less would fit"
        )
    elif parallel.layers is not None and (len(parallel.layers) != pipeline or sum(parallel.layers) != model.layers):
        yield (
            f"parallel.layers={parallel.layers} names {len(parallel.layers)} ranks with {sum(parallel.layers)} layers; "
            f"it needs parallel.pipeline={pipeline} numbers that add up to model.layers={model.layers}, for example "
            f"{balanced_layers(model, pipeline, recipe.data.sequence_length)}"
        )
    if parallel.sequence and tensor == 1:
        yield "parallel.sequence=true splits activations over tensor-parallel ranks: it needs parallel.tensor > 1"
    if model.implementation == "transformer_engine" and recipe.training.device == "cpu":
        yield "model.implementation=transformer_engine needs CUDA, but training.device=cpu; use `local`"
    if world_size is None:
        return
    unit = ranks_of_a_sample(recipe)
    sizes = f"parallel.tensor={tensor} x parallel.pipeline={pipeline}"
    if parallel.context > 1:
        sizes += f" x parallel.context={parallel.context}"
    if world_size % unit:
        yield f"{world_size} ranks are not a multiple of {sizes} = {unit}"
    elif parallel.data is not None and world_size != unit * parallel.data:
        yield f"{world_size} ranks, but {sizes} x parallel.data={parallel.data} = {unit * parallel.data}"


def _context(recipe: Recipe) -> Iterator[str]:
    """What cutting sequences over ranks needs: two equal slices a rank, each whole under sequence parallelism."""
    parallel, length, size = recipe.parallel, recipe.data.sequence_length, recipe.parallel.context
    if size == 1:
        return
    if length % (2 * size):
        fits = [number for number in range(1, size) if number == 1 or length % (2 * number) == 0]
        yield (
            f"data.sequence_length={length} is not a multiple of 2 x parallel.context={size}: each rank holds two "
            f"slices of a sequence; parallel.context={fits[-1]} would fit"
        )
    elif parallel.sequence and (length // size) % parallel.tensor:
        yield (
            f"data.sequence_length={length} over parallel.context={size} ranks leaves {length // size} tokens, not a "
            f"multiple of parallel.tensor={parallel.tensor}, which parallel.sequence=true needs"
        )
    if recipe.model.implementation == "transformer_engine" and recipe.data.masks_documents:
        yield (
            f"parallel.context={size} with model.implementation=transformer_engine cannot keep documents apart: it "
            "cuts each document over the ranks, here each sequence is cut; set model.implementation=local, "
            "data.document_mask=false or parallel.context=1"
        )


def slowest_wavelength(model: ModelSection) -> float:
    """Positions after which RoPE's slowest pair has turned once: 2 pi base^((d - 2) / d)."""
    dim = model.head_dim or model.hidden // model.heads
    return 2 * math.pi * model.rope_base ** ((dim - 2) / dim)


def _sequence(recipe: Recipe) -> Iterator[str]:
    model, length = recipe.model, recipe.data.sequence_length
    if recipe.parallel.context == 1 and recipe.parallel.sequence and length % recipe.parallel.tensor:
        yield (
            f"data.sequence_length={length} is not a multiple of parallel.tensor={recipe.parallel.tensor}, "
            "which parallel.sequence=true needs"
        )
    reach = slowest_wavelength(model)
    if length > reach:
        # Beyond it even the slowest pair repeats: positions can no longer be told apart by any single pair.
        yield (
            f"model.rope_base={model.rope_base:g} reaches {reach:.0f} positions (its slowest pair turns once in them), "
            f"data.sequence_length={length} is longer; raise model.rope_base"
        )


def _packing(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if data.packing == "none" and data.long_documents is not None:
        yield (
            f"data.long_documents={data.long_documents} says what packing does with documents longer than the "
            "sequence, but data.packing is none, which cuts all; set data.packing to best_fit or in_order, or remove it"
        )
    fp32 = recipe.precision.compute == "fp32"
    if data.masks_documents and recipe.model.implementation == "transformer_engine" and fp32:
        yield (
            "a document mask (data.document_mask, data.packing) needs precision.compute=bf16 with "
            "model.implementation=transformer_engine, whose attention over packed documents has no fp32; or use local"
        )


def _objective(recipe: Recipe) -> Iterator[str]:
    training = recipe.training
    if training.recompute_loops is not None:
        if training.recompute == "none":
            yield "training.recompute_loops chooses loops for training.recompute, which is none; use selective or full"
        elif training.recompute_loops > recipe.model.loops:
            yield f"training.recompute_loops={training.recompute_loops} is more than model.loops={recipe.model.loops}"
    if recipe.objective.kind == "gate":
        if recipe.model.loops < 2:
            yield "objective.kind=gate compares loops: model.loops must be at least 2"
        if not recipe.init.is_set:
            yield "objective.kind=gate trains the gate of a finished model: set init.stage or init.checkpoint"
    yield from _init(recipe)
    if recipe.optimizer.lr < recipe.schedule.min_lr:
        yield f"schedule.min_lr={recipe.schedule.min_lr:g} is above optimizer.lr={recipe.optimizer.lr:g}"


def _health(recipe: Recipe) -> Iterator[str]:
    health, limit = recipe.health, recipe.training.max_skipped_steps
    if health.min_steps > health.window:
        yield f"health.min_steps={health.min_steps} is more than health.window={health.window} ever holds"
    if health.rollback_after is not None and health.rollback_after > limit:
        yield (
            f"health.rollback_after={health.rollback_after} is never reached: training.max_skipped_steps={limit} "
            "stops the run before"
        )
    if health.skip_spikes and health.loss_deviations is None and health.grad_norm_deviations is None:
        yield "health.skip_spikes=true looks at nothing: set health.loss_deviations or health.grad_norm_deviations"


def _init(recipe: Recipe) -> Iterator[str]:
    init = recipe.init
    if init.stage is not None and init.checkpoint is not None:
        yield f"init.stage={init.stage} and init.checkpoint={init.checkpoint} both name where to start from; keep one"
    if init.stage == recipe.name:
        yield f"init.stage={init.stage} is this stage itself"
    for field, wanted, what in (
        ("init.optimizer", init.optimizer, "the optimizer"),
        ("init.data_position", init.data_position, "the data position"),
    ):
        if wanted and not init.is_set:
            yield f"{field}=true carries {what} of an earlier stage over: set init.stage or init.checkpoint"


def _batch(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    parallel, length = recipe.parallel, recipe.data.sequence_length
    data = data_parallel_size(recipe, world_size)
    # The interleaved schedule hands microbatches round in groups of the pipeline's size.
    loops = max([recipe.model.loops, *(early.loops for early in recipe.training.early_loops)])
    group = parallel.pipeline if parallel.pipeline > 1 and loops > 1 else 1
    unit = length * recipe.batch.microbatch * data * group
    why = f"data.sequence_length {length} x batch.microbatch {recipe.batch.microbatch} x {data} data-parallel ranks"
    if group > 1:
        why += f" x parallel.pipeline {group} (the looped pipeline takes microbatches in groups of that size)"
    sizes = [("batch.global_tokens", recipe.batch.global_tokens)]
    sizes += [(f"batch.ramp.{i}.global_tokens", point.global_tokens) for i, point in enumerate(recipe.batch.ramp)]
    for field, value in sizes:
        if value == 0 or value % unit:
            below, above = value // unit * unit, (value // unit + 1) * unit
            fits = f"{below} or {above}" if below else str(above)
            yield f"{field}={value} is not a multiple of {unit} = {why}; {fits} would fit"


def _data(recipe: Recipe) -> Iterator[str]:
    if recipe.budget.total is None and recipe.budget.epochs is None:
        yield "budget.total is missing: the stage's length in tokens or steps (or budget.epochs)"
    for field, entries in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        without = [str(entry.path) for entry in entries if entry.weight is None]
        if without and len(without) < len(entries):
            yield f"data.{field}: {without[0]} has no weight, others do; give all a weight or none"


def _schedule(recipe: Recipe) -> Iterator[str]:
    schedule = recipe.schedule
    plan = BatchPlan(recipe)
    if plan.total_steps == 0:
        yield "budget.total is 0: nothing to train"
        return
    yield from _ramp(recipe, plan)
    yield from _early_loops(recipe, plan)
    if schedule.kind == "wsd" and schedule.decay is None:
        yield "schedule.kind=wsd needs schedule.decay, the length of its final decay"
    if schedule.kind != "wsd" and schedule.decay is not None:
        yield f"schedule.decay is for schedule.kind=wsd, this one is {schedule.kind}; remove it or change the kind"
    warmup = plan.tokens_of(schedule.warmup)
    decay = _length_from_end(plan, schedule.decay) if schedule.decay else 0
    if warmup + decay > plan.total_tokens:
        yield (
            f"schedule.warmup ({schedule.warmup}) and schedule.decay ({schedule.decay or 'none'}) are longer than "
            f"budget.total ({recipe.budget.total}) together"
        )
    for field, span in (
        ("checkpoint.every", recipe.checkpoint.every),
        ("checkpoint.permanent_every", recipe.checkpoint.permanent_every),
        ("evaluation.every", recipe.evaluation.every),
        ("training.check_every", recipe.training.check_every),
    ):
        if span is not None and span.is_zero:
            yield f"{field} is 0; give a length, for example '100 steps'"
    if recipe.evaluation.every is not None and not recipe.data.validation:
        yield "evaluation.every is set, but data.validation names no source"


def _length_from_end(plan: BatchPlan, span: Span) -> int:
    if span.tokens is not None:
        return span.tokens
    assert span.steps is not None
    return plan.total_tokens - plan.at(max(0, plan.total_steps - span.steps)).consumed_tokens


def _ramp(recipe: Recipe, plan: BatchPlan) -> Iterator[str]:
    previous = 0
    for index, point in enumerate(recipe.batch.ramp):
        position = plan.tokens_of(point.after)
        if position <= previous:
            yield f"batch.ramp.{index}.after={point.after} does not come after the point before it"
        if position >= plan.total_tokens:
            yield f"batch.ramp.{index}.after={point.after} lies beyond budget.total ({recipe.budget.total})"
        previous = position


def _early_loops(recipe: Recipe, plan: BatchPlan) -> Iterator[str]:
    previous = 0
    for index, early in enumerate(recipe.training.early_loops):
        step = plan.first_step_at(early.until)
        if step <= previous:
            yield f"training.early_loops.{index}.until={early.until} does not come after the point before it"
        if step >= plan.total_steps:
            yield (
                f"training.early_loops.{index}.until={early.until} is not before the end of budget.total "
                f"({recipe.budget.total}): set model.loops={early.loops} instead, or lengthen the budget"
            )
        previous = step
    if recipe.training.early_loops and recipe.objective.kind == "gate":
        yield "training.early_loops: the gate is trained at one number of loops; remove it"
