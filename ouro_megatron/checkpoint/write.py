"""Writes a checkpoint that no run saved: a deepened or averaged one."""

import tempfile
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ouro_megatron.checkpoint.folder import mark_complete
from ouro_megatron.checkpoint.save import describe
from ouro_megatron.checkpoint.state import RunState, write_state
from ouro_megatron.errors import CheckpointError
from ouro_megatron.parallel.platform import write_checkpoints_without_helpers


def write_plain(tensors: dict[str, Tensor], state: RunState, target: Path) -> None:
    """Whole fp32 tensors by checkpoint name to `target`: written beside it and moved there when whole. One process,
    inside an initialised context. Raises CheckpointError."""
    write_checkpoints_without_helpers()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as partial:
            folder = Path(partial) / "checkpoint"
            folder.mkdir()
            sharded = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
            dist_checkpointing.save(sharded, str(folder))
            write_state(folder, state)
            mark_complete(folder)
            folder.replace(target)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{target} could not be written: {describe(error)}") from error
