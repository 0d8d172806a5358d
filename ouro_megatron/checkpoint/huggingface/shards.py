"""Safetensors shards, written and read tensor by tensor: memory never holds more than one of them.

`safetensors.torch.save_file` wants all tensors of a file in memory at once, so writing is done here; the format is a
header of names, dtypes, shapes and offsets in front of the raw bytes. Reading uses the library.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ouro_megatron.checkpoint.huggingface.layout import Shape
from ouro_megatron.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CODES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class _Place:
    file: str
    start: int
    """Byte at which the tensor begins in its file."""
    bytes: int


class ShardWriter:
    """Writes the tensors of `shapes` in any order, each once, into as few files of at most `shard_bytes` as in order
    they fit (a larger tensor has a file of its own)."""

    def __init__(self, folder: Path, shapes: dict[str, Shape], dtype: torch.dtype, shard_bytes: int) -> None:
        self._folder = folder
        self._shapes = shapes
        self._dtype = dtype
        files = _assign(shapes, dtype, shard_bytes)
        self._places: dict[str, _Place] = {}
        for file, names in files.items():
            self._begin(file, names)
        self.files = list(files)
        self._waiting = set(shapes)
        if len(files) > 1:
            total = sum(place.bytes for place in self._places.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: place.file for name, place in self._places.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _begin(self, file: str, names: list[str]) -> None:
        """Writes a file's header and makes room for its tensors."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + math.prod(self._shapes[name]) * self._dtype.itemsize
            header[name] = {
                "dtype": _CODES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self._folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little"))
            stream.write(text)
            stream.truncate(8 + len(text) + offset)
        for name in names:
            first, last = header[name]["data_offsets"]
            self._places[name] = _Place(file, 8 + len(text) + first, last - first)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, converted to the shards' dtype (rounded to nearest even from fp32 to bf16)."""
        assert tuple(tensor.shape) == self._shapes[name], f"{name}: {tuple(tensor.shape)} is not {self._shapes[name]}"
        self._waiting.remove(name)
        place = self._places[name]
        flat = tensor.to(self._dtype).contiguous().flatten().view(torch.uint8)
        with (self._folder / place.file).open("r+b") as stream:
            stream.seek(place.start)
            stream.write(flat.numpy().data)

    def close(self) -> None:
        """Flushes all files to disk; every tensor must have been written."""
        assert not self._waiting, f"never written: {sorted(self._waiting)}"
        for file in self.files:
            descriptor = os.open(self._folder / file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _assign(shapes: dict[str, Shape], dtype: torch.dtype, shard_bytes: int) -> dict[str, list[str]]:
    """File name -> its tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": names for number, names in enumerate(shards, start=1)}


class ShardReader:
    """The tensors of a folder of safetensors files. Opening reads headers only.

    Raises CheckpointError when files or tensors are missing, cut, or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        for file, listed in _files(folder).items():
            self._open(folder / file, listed)

    def _open(self, path: Path, listed: set[str] | None) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                for name in names:
                    view = file.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()
                    self._file_of[name] = path
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if listed is not None and names != listed:
            odd = sorted(names ^ listed)
            raise CheckpointError(
                f"{path} and {INDEX} disagree on {len(odd)} tensors: {odd[0]} is "
                f"{'only in the index' if odd[0] in listed else 'not in the index'}"
            )

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype; the file is closed again, so that no pages of it stay mapped."""
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name).clone()


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Files of a folder -> the tensors its index lists for each, None without an index."""
    index = folder / INDEX
    if index.is_file():
        try:
            places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            found: dict[str, set[str] | None] = {}
            for name, file in places.items():
                listed = found.setdefault(file, set())
                assert listed is not None
                listed.add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}") from error
        missing = [file for file in found if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {missing[0]} is missing; {INDEX} names {len(found)} files")
        return found
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors files there")
    if len(files) > 1:
        raise CheckpointError(f"{folder}: {len(files)} safetensors files but no {INDEX}")
    return {files[0]: None}
