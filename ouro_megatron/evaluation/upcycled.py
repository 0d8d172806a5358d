"""Upcycling with the loss before and after, as `ouro upcycle` reports it."""

from pathlib import Path

from ouro_megatron.checkpoint.folder import resolve
from ouro_megatron.checkpoint.load import load_for_inference
from ouro_megatron.checkpoint.upcycle import LayerMap, upcycle
from ouro_megatron.evaluation.held_out import HeldOut, evaluate_model


def upcycle_and_compare(
    source: Path,
    target: Path,
    layers: int,
    kind: LayerMap,
    *,
    optimizer: bool,
    residual_scale: float = 1.0,
    sequences: int = 64,
) -> tuple[HeldOut, HeldOut] | None:
    """Upcycles the checkpoint at `source`; returns the held-out losses of both, None without validation data."""
    before = load_for_inference(resolve(source).folder)
    try:
        upcycle(before.folder, target, layers, kind, optimizer=optimizer, residual_scale=residual_scale)
        if not before.recipe.data.validation:
            return None
        after = load_for_inference(target, context=before.context)
        return evaluate_model(before, sequences=sequences), evaluate_model(after, sequences=sequences)
    finally:
        before.context.close()
