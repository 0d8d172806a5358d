"""Loads a checkpoint into any layout: to resume a run, to start a stage from, or to generate with."""

from dataclasses import dataclass
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.folder import TOKENIZER_FOLDER, resolve
from ouro_megatron.checkpoint.huggingface.config import is_pretrained
from ouro_megatron.checkpoint.save import describe
from ouro_megatron.checkpoint.state import RunState, check_same_model, read_state
from ouro_megatron.checkpoint.tensors import (
    amax_template,
    moment_template,
    put_amax,
    put_optimizer,
    put_weights,
    weight_template,
)
from ouro_megatron.checkpoint.verify import check_contents
from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from ouro_megatron.errors import CheckpointError
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ParallelSection, Recipe
from ouro_megatron.training.engine import Engine


def load_run(engine: Engine, folder: Path, recipe: Recipe, *, optimizer: bool) -> RunState:
    """Fills weights and, with `optimizer`, Adam's state from a complete checkpoint. All ranks call it together.

    Raises CheckpointError when it holds another model, was cut, or has no optimizer state though one is asked for.
    """
    engine.position.phase = f"loading {folder.name}"
    state = read_state(folder)
    check_same_model(state.recipe, recipe.model_dump(mode="json"), folder)
    template = weight_template(engine.lm)
    if optimizer:
        template |= moment_template(engine)
        _check_moments(folder, template)
    histories = amax_template(engine.lm)
    if histories:
        stored = stored_names(folder)
        template |= {name: tensor for name, tensor in histories.items() if name in stored}
    tensors = read_tensors(template, folder, engine.context)
    put_weights(engine.lm, tensors)
    put_amax(engine.lm, tensors)
    put_optimizer(engine, tensors, moments=optimizer, optimizer_steps=state.optimizer_steps)
    return state


def _check_moments(folder: Path, template: ShardedStateDict) -> None:
    stored = stored_names(folder)
    missing = sorted(name for name in template if name not in stored)
    if missing:
        raise CheckpointError(
            f"{folder} has no optimizer state for {missing[0].split('.', 1)[1]} and {len(missing) - 1} more tensors; "
            "set init.optimizer=false to start the optimizer afresh"
        )


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in a checkpoint."""
    try:
        return set(dist_checkpointing.load_tensors_metadata(str(folder)))
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {describe(error)}") from error


def read_tensors(template: ShardedStateDict, folder: Path, context: ParallelContext) -> dict[str, Tensor]:
    """This rank's part of the tensors that `template` names. All ranks call it together."""
    try:
        return dict(dist_checkpointing.load(template, str(folder)))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{context.describe_rank()} could not load {folder}: {describe(error)}") from error


@dataclass(frozen=True)
class InferenceModel:
    """A model ready to generate or to be evaluated, with what it was trained by."""

    lm: LoopLM
    context: ParallelContext
    recipe: Recipe
    state: RunState
    folder: Path
    tokenizer: TextTokenizer


def tokenizer_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the tokenizer of a checkpoint is: an imported one carries its own."""
    own = folder / TOKENIZER_FOLDER
    return own if own.is_dir() else recipe.data.tokenizer


def load_for_inference(path: Path, device: str = "cpu", context: ParallelContext | None = None) -> InferenceModel:
    """The model at `path` (a checkpoint, a folder of them, a run folder, or a folder in the published layout) in fp32.

    In one process, or at the layout of `context`, whose ranks all call this together.
    Its files are read against their hashes first. Raises CheckpointError as `resolve` does, or when a file has changed,
    and DataError when its tokenizer has moved.
    """
    if is_pretrained(path):
        from ouro_megatron.checkpoint.huggingface.load import load_pretrained

        lm, context, recipe, state, tokenizer = load_pretrained(path, device, context)
        return InferenceModel(lm, context, recipe, state, path, tokenizer)
    found = resolve(path)
    if context is None:
        check_contents(found.folder)
    else:
        check_contents(found.folder, context.rank, context.world_size)
    state = read_state(found.folder)
    recipe = Recipe.model_validate(state.recipe)
    tokenizer = load_tokenizer(tokenizer_folder(found.folder, recipe), model_vocab=recipe.model.vocab)
    context = context or create_context(ParallelSection(), device, recipe.training.seed)
    # The local layers have the same parameters as Transformer Engine's, and the cache that decoding needs.
    lm = LoopLM(recipe.model.model_copy(update={"implementation": "local"}), context)
    put_weights(lm, read_tensors(weight_template(lm), found.folder, context))
    lm.eval()
    return InferenceModel(lm, context, recipe, state, found.folder, tokenizer)
