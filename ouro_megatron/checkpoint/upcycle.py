"""A deeper model from a trained one, by using its layers more than once (arXiv 2510.25741: 1.4B -> 2.6B, 24 -> 48)."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.save import describe
from ouro_megatron.checkpoint.state import RunState, StageRecord, history_with, read_state
from ouro_megatron.checkpoint.write import write_plain
from ouro_megatron.errors import CheckpointError

LayerMap = Literal["stack", "interleave"]
_LAYER = re.compile(r"^(\w+\.decoder\.layers\.)(\d+)(\..+)$")
_POST_NORM = re.compile(r"^weight\.decoder\.layers\.\d+\.(post_attention_norm|post_mlp_norm)\.weight$")


def layer_map(kind: LayerMap, layers: int, new_layers: int) -> list[int]:
    """Which old layer each new layer copies. `stack`: 0 1 2 0 1 2; `interleave`: 0 0 1 1 2 2.

    Raises CheckpointError when `new_layers` is not a multiple of `layers` greater than it.
    """
    if new_layers <= layers or new_layers % layers:
        raise CheckpointError(
            f"--layers {new_layers}: the checkpoint has {layers} layers; give a multiple of it, such as {2 * layers}"
        )
    times = new_layers // layers
    if kind == "stack":
        return [index % layers for index in range(new_layers)]
    return [index // times for index in range(new_layers)]


def upcycle(
    source: Path, target: Path, layers: int, kind: LayerMap, *, optimizer: bool, residual_scale: float = 1.0
) -> None:
    """Writes a checkpoint of `layers` layers to `target` from the complete checkpoint folder `source`.

    One process, inside an initialised context; the whole model is in memory once. With `optimizer` Adam's moments are
    copied like the weights. `residual_scale` multiplies the gains of the norms after each sub-layer, and with them what
    a layer adds to its input: layers / new layers keeps the sum of a loop's additions, and most of the loss.
    Raises CheckpointError when `target` exists, or the layers do not fit.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another --out")
    state = read_state(source)
    chosen = layer_map(kind, state.recipe["model"]["layers"], layers)
    try:
        tensors = dist_checkpointing.load_plain_tensors(str(source))
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{source} cannot be read: {describe(error)}") from error
    if optimizer and not any(name.startswith("exp_avg.") for name in tensors):
        raise CheckpointError(f"{source} holds no optimizer state to carry over; leave out --optimizer")
    renamed = deepen(tensors, chosen, (lambda _: True) if optimizer else (lambda name: name.startswith("weight.")))
    if residual_scale != 1.0:
        renamed = {
            name: tensor * residual_scale if _POST_NORM.match(name) else tensor for name, tensor in renamed.items()
        }
    write_plain(renamed, _new_state(state, source, layers, kind, optimizer, residual_scale), target)


def deepen(tensors: dict[str, Tensor], chosen: list[int], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Tensors of the deeper model by name: layer j's are those of old layer chosen[j], others stay."""
    result = {}
    for name, tensor in tensors.items():
        if not wanted(name):
            continue
        match = _LAYER.match(name)
        if match is None:
            result[name] = tensor
            continue
        for new, old in enumerate(chosen):
            if old == int(match.group(2)):
                result[f"{match.group(1)}{new}{match.group(3)}"] = tensor
    return result


def _new_state(
    state: RunState, source: Path, layers: int, kind: LayerMap, optimizer: bool, residual_scale: float
) -> RunState:
    recipe: dict[str, Any] = {**state.recipe, "model": {**state.recipe["model"], "layers": layers}}
    scaled = "" if residual_scale == 1.0 else f", residual scale {residual_scale:g}"
    carried = "carried" if optimizer else "fresh"
    detail = f"{state.recipe['model']['layers']} -> {layers} layers, optimizer {carried}{scaled}"
    record = StageRecord(f"{kind} to {layers} layers", "upcycle", 0, 0, detail)
    return replace(
        state,
        step=0,
        tokens=0,
        samples=0,
        first_sample=state.next_sample,
        optimizer_steps=state.optimizer_steps if optimizer else 0,
        skipped_steps=0,
        seconds=0.0,
        health={},
        pending_evaluation=False,
        recipe=recipe,
        history=[*history_with(state, source), record],
        origin="upcycle",
    )
