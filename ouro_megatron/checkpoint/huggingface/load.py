"""A folder in the published layout, loaded straight into this project's model at any tensor-parallel layout."""

from pathlib import Path

import torch

from ouro_megatron.checkpoint.huggingface.importer import Pretrained
from ouro_megatron.checkpoint.huggingface.layout import tensor_groups
from ouro_megatron.checkpoint.state import RunState
from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from ouro_megatron.model.layout import take_shard
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.parallel.context import ParallelContext, create_context
from ouro_megatron.recipe.schema import ParallelSection, Recipe


@torch.no_grad()
def load_pretrained(
    folder: Path, device: str, context: ParallelContext | None
) -> tuple[LoopLM, ParallelContext, Recipe, RunState, TextTokenizer]:
    """What `load_for_inference` puts together, from config.json, safetensors and tokenizer in `folder`.

    Every rank reads its own part tensor by tensor. Raises CheckpointError and DataError as `Pretrained` does.
    """
    pretrained = Pretrained(folder)
    recipe = pretrained.recipe(folder.resolve().name, folder)
    context = context or create_context(ParallelSection(), device, recipe.training.seed)
    lm = LoopLM(recipe.model, context)
    parameters = dict(lm.named_global_parameters())
    for group in tensor_groups(recipe.model):
        if group.ours in parameters:
            whole = pretrained.tensor(group)
            parameters[group.ours].copy_(take_shard(group.ours, whole, context.tensor_rank, context.tensor_size))
    lm.eval()
    tokenizer = load_tokenizer(folder, model_vocab=recipe.model.vocab)
    return lm, context, recipe, pretrained.state(recipe), tokenizer
