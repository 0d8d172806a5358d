"""Rules of `training.cuda_graphs`. Part of `validate.check_recipe`."""

from collections.abc import Iterator

from ouro_megatron.recipe.schema import Recipe

_BLOCK = 64
"""Tokens of a block of attention. A stage with 32 ended in illegal memory accesses (docs/results/gpu.md)."""


def check_cuda_graphs(recipe: Recipe) -> Iterator[str]:
    """One line a problem: what a graph, which repeats the same kernels on the same addresses, cannot go with."""
    if not recipe.training.cuda_graphs:
        return
    parallel, training, fp8 = recipe.parallel, recipe.training, recipe.precision.fp8
    graphs = "training.cuda_graphs=true"
    if training.device == "cpu":
        yield f"{graphs} needs CUDA, but training.device=cpu; remove one"
    for name, size in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("context", parallel.context)):
        if size > 1:
            yield (
                f"{graphs} with parallel.{name}={size}: graphs are recorded for ranks that have all layers and whole "
                f"sequences; set parallel.{name}=1 or remove cuda_graphs"
            )
    if recipe.data.sequence_length % _BLOCK:
        yield (
            f"{graphs} with data.sequence_length={recipe.data.sequence_length}: recorded attention wants a multiple of "
            f"{_BLOCK} tokens"
        )
    if parallel.overlap:
        yield f"{graphs} with parallel.overlap=true: gradients are added by graphs, which reduce none; remove one"
    if training.recompute == "full":
        yield (
            f"{graphs} with training.recompute=full: it sets states of random numbers, which no graph can; use "
            "selective or none"
        )
    if recipe.data.masks_documents:
        yield (
            f"{graphs} with a document mask (data.document_mask, data.packing): documents differ from microbatch to "
            "microbatch, a graph does not; remove one"
        )
    if fp8 is not None and (fp8.emulate or fp8.recipe == "delayed" or fp8.parameters):
        yield (
            f"{graphs} goes with Transformer Engine's FP8 in the recipes current, blockwise and mxfp8, whose copies of "
            "weights stay where they are; remove precision.fp8's emulate, parameters or recipe=delayed"
        )
