"""A recipe's layout on a number of GPUs, as plain numbers: what the other parts of the plan compute from."""

from dataclasses import dataclass

from ouro_megatron.recipe.layers import balanced_layers, fp8_layers
from ouro_megatron.recipe.schema import ModelSection, Recipe, Recompute
from ouro_megatron.recipe.validate import check_recipe, data_parallel_size


@dataclass(frozen=True)
class Layout:
    """One training step as the ranks see it."""

    model: ModelSection
    sequence: int
    """Tokens a sequence."""
    microbatch: int
    """Sequences a microbatch."""
    microbatches: int
    """A data-parallel rank's share of the global batch."""
    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    layers: tuple[int, ...]
    """Layers of each pipeline rank."""
    recompute: Recompute
    recompute_loops: int | None
    bytes_per_value: int
    """Of weights and activations: 2 in bf16, 4 in fp32."""
    chunk_tokens: int
    """Tokens whose logits exist at one time."""
    context: int = 1
    """Ranks that share a sequence."""
    on_gpu: bool = False
    """Whether the kernels for CUDA run; they keep less for backward than plain torch on a CPU."""
    fp8_share: float = 0.0
    """Of the layers, those whose matrix products run in FP8."""
    cuda_graphs: bool = False
    """Whether recorded visits of the layers are replayed, with nothing for the host to do."""
    trains_model: bool = True
    """False in the gate stage, whose model runs without a graph."""

    @property
    def world(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights and add up their gradients."""
        return self.context * self.data

    @property
    def tokens(self) -> int:
        """A rank's tokens of one microbatch."""
        return self.sequence * self.microbatch // self.context

    @property
    def loops(self) -> int:
        return self.model.loops

    @property
    def step_tokens(self) -> int:
        return self.tokens * self.context * self.microbatches * self.data

    @property
    def interleaved(self) -> bool:
        """Whether the loops are interleaved over the pipeline (`parallel/loop_pipeline.py`)."""
        return self.pipeline > 1 and self.loops > 1

    def recomputes(self, loop: int) -> Recompute:
        """Recomputation in this loop, counted from 0."""
        if self.recompute_loops is not None and loop >= self.recompute_loops:
            return "none"
        return self.recompute

    def describe(self) -> str:
        sequence = " + SP" if self.sequence_parallel else ""
        context = f" x CP {self.context}" if self.context > 1 else ""
        return f"TP {self.tensor}{sequence}{context} x PP {self.pipeline} x DP {self.data}"


def layout_of(recipe: Recipe, world: int) -> Layout:
    """The layout of a recipe on `world` ranks, with the first batch size of its ramp.

    Raises RecipeError with all problems when it cannot run there.
    """
    check_recipe(recipe, world)
    parallel, training = recipe.parallel, recipe.training
    data = data_parallel_size(recipe, world)
    length = recipe.data.sequence_length
    return Layout(
        model=recipe.model,
        sequence=length,
        microbatch=recipe.batch.microbatch,
        microbatches=recipe.batch.global_tokens // (length * recipe.batch.microbatch * data),
        tensor=parallel.tensor,
        context=parallel.context,
        pipeline=parallel.pipeline,
        data=data,
        sequence_parallel=parallel.sequence,
        layers=tuple(parallel.layers or balanced_layers(recipe.model, parallel.pipeline, length)),
        recompute=training.recompute,
        recompute_loops=training.recompute_loops,
        bytes_per_value=2 if recipe.precision.compute == "bf16" else 4,
        chunk_tokens=recipe.objective.chunk_tokens,
        on_gpu=training.device != "cpu",
        fp8_share=_fp8_share(recipe),
        cuda_graphs=training.cuda_graphs and recipe.objective.kind != "gate",
        trains_model=recipe.objective.kind != "gate",
    )


def _fp8_share(recipe: Recipe) -> float:
    fp8 = recipe.precision.fp8
    if fp8 is None or fp8.emulate:
        return 0.0
    return len(fp8_layers(recipe.model, fp8)) / recipe.model.layers
