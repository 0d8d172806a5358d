"""Held-out loss of a checkpoint, by loop."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ouro_megatron.checkpoint.load import InferenceModel, load_for_inference
from ouro_megatron.data.dataset import build_dataset
from ouro_megatron.data.sampler import GlobalBatchSampler, MicrobatchReader
from ouro_megatron.errors import DataError
from ouro_megatron.model.documents import DocumentBounds
from ouro_megatron.model.looplm import LoopLM
from ouro_megatron.objective.head import HeadGroup
from ouro_megatron.objective.loop_loss import LoopLoss, LossParts
from ouro_megatron.objective.losses import LoopMeans, LoopSums
from ouro_megatron.recipe.schema import ObjectiveSection


@dataclass(frozen=True)
class HeldOut:
    """One evaluation of one checkpoint."""

    folder: Path
    layers: int
    loops: int
    sequences: int
    means: LoopMeans


def evaluate_checkpoint(path: Path, *, loops: int | None = None, sequences: int = 64, device: str = "cpu") -> HeldOut:
    """Loss by loop of the checkpoint at `path` on its recipe's validation blend, always the same first sequences.

    `loops` may be more than the model was trained with. Raises CheckpointError, and DataError without validation data.
    """
    model = load_for_inference(path, device)
    try:
        return evaluate_model(model, loops=loops, sequences=sequences)
    finally:
        model.context.close()


def evaluate_model(model: InferenceModel, *, loops: int | None = None, sequences: int = 64) -> HeldOut:
    """`evaluate_checkpoint` for a model that is loaded already."""
    recipe = model.recipe
    if not recipe.data.validation:
        raise DataError(f"{model.folder}: its recipe names no data.validation to evaluate on")
    loops = loops or recipe.model.loops
    with tempfile.TemporaryDirectory(prefix="ouro-indices-") as cache:
        dataset = build_dataset(
            recipe.data,
            samples=sequences,
            seed=recipe.training.seed,
            tokenizer=model.tokenizer,
            cache=Path(cache),
            split_name="validation",
        )
        reader = MicrobatchReader(dataset, GlobalBatchSampler(1), model.context.device)
        sums = LoopSums.zeros(loops, model.context.device)
        try:
            for batch in reader.step(0, sequences):
                sums = sums + loop_losses(model.lm, recipe.objective, batch, loops)
        finally:
            reader.close()
    return HeldOut(model.folder, recipe.model.layers, loops, sequences, sums.means())


@torch.inference_mode()
def loop_losses(lm: LoopLM, objective: ObjectiveSection, batch: dict[str, torch.Tensor], loops: int) -> LoopSums:
    """Sums of one microbatch without a pipeline, as the reader gives it."""
    context = lm.context
    assert lm.output_layer is not None and context.pipeline_size == 1
    head = HeadGroup(context.groups.tp, context.tensor_rank, context.tensor_size, context.sequence_parallel)
    loss = LoopLoss(
        LossParts(lm.gate_logits, lm.output_layer.weight, head),
        objective,
        loops,
        batch["labels_bs"],
        batch["loss_mask_bs"],
        training=False,
    )
    tokens_bs = batch["tokens_bs"]
    documents = DocumentBounds.of(batch["positions_bs"], context.device) if "positions_bs" in batch else None
    positions = torch.arange(tokens_bs.shape[1], device=context.device) if documents is None else documents.positions_sb
    rotary = lm.rotary(positions)
    h_sbh = lm.embed(tokens_bs)
    for _ in range(loops):
        h_sbh = lm.run_layers(h_sbh, rotary, documents=documents)
        loss.add_loop(h_sbh)
    return loss.finish()[2]
