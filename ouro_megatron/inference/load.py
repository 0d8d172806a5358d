"""From a checkpoint on disk to an engine, on one rank or several tensor-parallel ones."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ouro_megatron.checkpoint.folder import resolve
from ouro_megatron.checkpoint.huggingface.config import is_pretrained, model_section, read_config
from ouro_megatron.checkpoint.load import load_for_inference
from ouro_megatron.checkpoint.state import read_state
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import CheckpointError, InferenceError, OuroError, RequestError
from ouro_megatron.inference.engine import Engine, EngineSettings
from ouro_megatron.inference.ranks import Followers, Leader, follow, start_followers
from ouro_megatron.inference.runner import Runner
from ouro_megatron.inference.weights import ModelWeights, take_weights
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ModelSection, ParallelSection, Recipe

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """What to load and how; None takes the model's own value."""

    checkpoint: Path
    """A training checkpoint, a folder of them, a run folder, or an exported Hugging Face folder."""
    dtype: Dtype = "fp32"
    device: str = "cpu"
    tensor: int = 1
    """Tensor-parallel ranks."""
    max_loops: int | None = None
    context: int | None = None
    settings: EngineSettings = field(default_factory=EngineSettings)
    """`max_loops` and `context` in it are replaced."""


@dataclass(frozen=True)
class OpenModel:
    """An engine on rank 0, with what its requests need to be written and read."""

    engine: Engine
    leader: Leader
    tokenizer: TextTokenizer
    recipe: Recipe
    folder: Path
    bytes_a_position: int
    """Cache memory of one position of one sequence, on this rank."""

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({self.tokenizer.eod})


@contextmanager
def open_model(options: ModelOptions) -> Iterator[OpenModel]:
    """Loads the model and yields an engine; with `tensor` above 1, starts the other ranks on this machine.

    Raises RequestError for options that cannot be, CheckpointError and DataError as loading does, all before a rank is
    started where it can be seen then. Under torchrun, ranks other than 0 serve as followers and this raises SystemExit
    when rank 0 is done.
    """
    options.settings.check()
    _check_layout(options)
    followers: Followers | None = None
    if options.tensor > 1 and "RANK" not in os.environ:
        followers = start_followers(options.tensor, as_mapping(options))
    try:
        if followers is not None:
            followers.wait_ready()
        try:
            runner, context, recipe, tokenizer, folder, settings = _load(options)
        except RuntimeError as error:  # a collective whose peer is gone
            cause = followers.failure() if followers is not None else None
            if cause is None:
                raise
            raise InferenceError(cause) from error
        if context.rank > 0:
            follow(runner, context)
            context.close()
            raise SystemExit(0)
        leader = Leader(runner, context, followers)
        try:
            engine = Engine(leader, settings, tokenizer, recipe.model.vocab)
            yield OpenModel(engine, leader, tokenizer, recipe, folder, runner.cache.bytes_a_position)
        finally:
            leader.close()
            context.close()
    finally:
        if followers is not None:
            followers.close()


def _check_layout(options: ModelOptions) -> None:
    if options.tensor < 1:
        raise RequestError(f"--tensor {options.tensor}: at least 1", field="tensor")
    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else options.tensor
    if world != options.tensor:
        raise RequestError(
            f"{world} ranks were started for --tensor {options.tensor}. Decoding is tensor-parallel only: a pipeline "
            "would idle between the loops of one token. A checkpoint of any layout can be loaded, so start as many "
            "ranks as --tensor says",
            field="tensor",
        )
    model = _section(options.checkpoint)
    heads, groups = model.heads, model.kv_heads or model.heads
    if heads % options.tensor or groups % options.tensor or model.ffn % options.tensor or model.vocab % options.tensor:
        raise RequestError(
            f"--tensor {options.tensor} must divide {heads} heads, {groups} key/value heads, the feed-forward width "
            f"{model.ffn} and the vocabulary {model.vocab}",
            field="tensor",
        )


def _section(checkpoint: Path) -> ModelSection:
    """Shape of the model on disk. Raises CheckpointError when there is none."""
    if is_pretrained(checkpoint):
        if importlib.util.find_spec("safetensors") is None:
            raise CheckpointError(f"{checkpoint}: safetensors is needed to read it: pip install 'ouro-megatron[hf]'")
        return model_section(read_config(checkpoint), checkpoint)
    return Recipe.model_validate(read_state(resolve(checkpoint).folder).recipe).model


def _load(
    options: ModelOptions,
) -> tuple[Runner, ParallelContext, Recipe, TextTokenizer, Path, EngineSettings]:
    context = create_context(ParallelSection(tensor=options.tensor), options.device)
    try:
        # bf16 weights are made from fp32 ones layer by layer.
        model = load_for_inference(options.checkpoint, options.device, context)
        section = model.recipe.model
        settings = replace(
            options.settings,
            max_loops=options.max_loops or section.loops,
            context=options.context or model.recipe.data.sequence_length,
        )
        settings.check()
        weights = take_weights(model.lm, DTYPES[options.dtype], settings.slots)
        runner = make_runner(weights, settings, context)
    except OuroError:
        context.close()
        raise
    return runner, context, model.recipe, model.tokenizer, model.folder, settings


def make_runner(weights: ModelWeights, settings: EngineSettings, context: ParallelContext) -> Runner:
    """The runner that an engine with these settings needs."""
    return Runner(
        weights,
        policy=settings.cache,
        loops=settings.max_loops,
        slots=settings.slots,
        capacity=settings.context,
        group=context.groups.tp,
    )


def as_mapping(options: ModelOptions) -> dict[str, Any]:
    """Plain values for another process; see `from_mapping`."""
    values = {name: getattr(options, name) for name in ("dtype", "device", "tensor", "max_loops", "context")}
    return {**values, "checkpoint": str(options.checkpoint), "settings": vars(options.settings)}


def from_mapping(values: dict[str, Any]) -> ModelOptions:
    settings = EngineSettings(**values["settings"])
    return ModelOptions(**{**values, "checkpoint": Path(values["checkpoint"]), "settings": settings})
