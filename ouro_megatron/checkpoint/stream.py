"""Checkpoints read and written one tensor at a time, by one process, whatever layout they were saved at."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ouro_megatron.checkpoint.save import describe
from ouro_megatron.errors import CheckpointError

Shape = tuple[int, ...]


class _CachedReader(FileSystemReader):
    """Reads the metadata file once, not once a tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


class TensorReader:
    """The tensors of a complete checkpoint folder. Opening reads the metadata only; raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = _CachedReader(folder)
        try:
            stored = self._reader.read_metadata().state_dict_metadata
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be read: {describe(error)}") from error
        self.shapes: dict[str, Shape] = {
            name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor `name` on the CPU in fp32, put together from the parts of all ranks."""
        tensor = torch.empty(self.shapes[name], dtype=torch.float32)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that it works in one process
                dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{self._folder} cannot be read: {name}: {describe(error)}") from error
        return tensor


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors that exist in name and shape only, and makes each when its turn to be written comes."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._make = make

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._make(index.fqn)


def write_tensors(folder: Path, shapes: dict[str, Shape], make: Callable[[str], Tensor]) -> None:
    """Writes the tensor part of a checkpoint into the empty `folder`: one file a tensor, fp32, in order.

    `make(name)` returns a contiguous fp32 CPU tensor; one is alive at a time. What it raises comes out as it is.
    """
    template = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    # One file a tensor: torch keeps the tensors of a file until it is closed.
    writer = FileSystemWriter(str(folder), single_file_per_rank=False, thread_count=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(template, storage_writer=writer, planner=_LazyPlanner(make), no_dist=True)
    except CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        if isinstance(failure, CheckpointError):
            raise failure from error
        raise CheckpointError(f"{folder} could not be written: {describe(error)}") from error
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(folder))
