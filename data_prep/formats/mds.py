"""MDS shards (mosaicml-streaming), read from the bytes: u32 count, u32 offsets[count + 1], then the rows.

A row is the u32 size of each column without a fixed one, then the values in the order of the columns. Only the columns
that are asked for are decoded; pickled ones never are.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from data_prep.formats.compression import Damaged, codec_of, inflate
from data_prep.formats.files import Options, is_url, open_file
from data_prep.sources.base import Fault, Report
from ouro_megatron.errors import DataError

_VALUE_TYPES = {
    8: "u1",
    9: "i1",
    16: "u2",
    17: "i2",
    18: "f2",
    32: "u4",
    33: "i4",
    34: "f4",
    64: "u8",
    65: "i8",
    66: "f8",
}
_SCALARS = {"int": "<i8", "int64": "<i8", "uint64": "<u8", "int32": "<i4", "uint32": "<u4", "uint8": "u1"}


@dataclass(frozen=True)
class Shard:
    """One entry of index.json."""

    folder: str
    basename: str
    zipped: str | None
    bytes: int
    samples: int
    names: Sequence[str]
    encodings: Sequence[str]
    sizes: Sequence[int | None]

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.basename}"


def read_index(path: str, options: Options) -> list[Shard]:
    """The shards that an index.json lists. Raises DataError when it is no index of MDS shards."""
    try:
        with open_file(path, options) as stream:
            content = json.load(stream)
        return [_shard(path.rpartition("/")[0], entry) for entry in content["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no index of MDS shards: {type(error).__name__}: {error}") from error


def _shard(folder: str, entry: dict[str, Any]) -> Shard:
    if entry["format"] != "mds":
        raise ValueError(f"format {entry['format']!r}")
    return Shard(
        folder,
        entry["raw_data"]["basename"],
        (entry.get("zip_data") or {}).get("basename"),
        int(entry["raw_data"]["bytes"]),
        int(entry["samples"]),
        tuple(entry["column_names"]),
        tuple(entry["column_encodings"]),
        tuple(entry["column_sizes"]),
    )


def read_mds(
    shard: Shard, start: int, stop: int, columns: Sequence[str], report: Report, options: Options
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values) of rows [start, stop) with those of `columns` that the shard has. Bad rows are reported."""
    try:
        with _open(shard, options) as stream:
            size = stream.seek(0, io.SEEK_END)
            offsets = _offsets(stream, shard)
            for row in range(start, min(stop, len(offsets) - 1)):
                begin, end = int(offsets[row]), int(offsets[row + 1])
                if end > size:
                    reason = f"the file has {size:,} bytes, its index says {shard.bytes:,}: cut off"
                    report(Fault(shard.path, f"row {row}", reason, ends_unit=True))
                    return
                try:
                    stream.seek(begin)
                    yield row, _values(stream.read(end - begin), shard, columns)
                except (ValueError, KeyError, IndexError) as error:
                    report(Fault(shard.path, f"row {row}", f"no valid row: {error}"))
    except Damaged as damage:
        report(Fault(shard.path, f"byte {damage.at}", damage.reason, ends_unit=True))


def _open(shard: Shard, options: Options) -> BinaryIO:
    """The shard's bytes; a compressed one is inflated in memory (shards are tens of MB)."""
    if shard.zipped is None or (not is_url(shard.folder) and _exists(shard.path, options)):
        return open_file(shard.path, options)
    with open_file(f"{shard.folder}/{shard.zipped}", options) as stream:
        return io.BytesIO(b"".join(inflate(stream, codec_of(shard.zipped) or "zstd")))


def _exists(path: str, options: Options) -> bool:
    try:
        open_file(path, options).close()
    except DataError:
        return False
    return True


def _offsets(stream: BinaryIO, shard: Shard) -> np.ndarray:
    stream.seek(0)
    head = stream.read(4)
    count = int.from_bytes(head, "little")
    table = stream.read(4 * (count + 1)) if count == shard.samples else b""
    if len(head) < 4 or len(table) < 4 * (shard.samples + 1):
        raise Damaged(f"no MDS shard of {shard.samples} rows: its head says {count}, or is cut off", 0)
    offsets = np.frombuffer(table, "<u4").astype(np.int64)
    if (np.diff(offsets) < 0).any() or offsets[0] < 4 * (count + 2):
        raise Damaged("the table of rows is broken", 4)
    return offsets


def _values(data: bytes, shard: Shard, columns: Sequence[str]) -> dict[str, Any]:
    at, sizes = 0, []
    for fixed in shard.sizes:
        if fixed is None:
            sizes.append(int.from_bytes(data[at : at + 4], "little"))
            at += 4
        else:
            sizes.append(fixed)
    if at + sum(sizes) != len(data):
        raise ValueError(f"its columns have {at + sum(sizes)} bytes, the row {len(data)}")
    values = {}
    for name, encoding, size in zip(shard.names, shard.encodings, sizes, strict=True):
        if name in columns:
            values[name] = _decode(data[at : at + size], encoding)
        at += size
    return values


def _decode(data: bytes, encoding: str) -> Any:
    kind, *settings = encoding.split(":")
    if kind == "str":
        return data.decode("utf-8")
    if kind == "bytes":
        return data
    if kind in _SCALARS:
        return int(np.frombuffer(data, _SCALARS[kind])[0])
    if kind == "ndarray":
        return _array(data, settings)
    raise ValueError(f"encoding {encoding!r} is not read here")


def _array(data: bytes, settings: Sequence[str]) -> np.ndarray:
    """[type: 1 byte, if not fixed] [ndim << 2 | log2 of a dimension's width: 1 byte] [dimensions] [values]."""
    at = 0
    if settings:
        dtype = np.dtype(settings[0]).newbyteorder("<")
    else:
        dtype, at = np.dtype(_VALUE_TYPES[data[0]]).newbyteorder("<"), 1
    if len(settings) > 1:
        shape = [int(size) for size in settings[1].split(",")]
    else:
        dimensions, width = data[at] >> 2, 1 << (data[at] & 3)
        end = at + 1 + dimensions * width
        shape = np.frombuffer(data[at + 1 : end], f"<u{width}").astype(int).tolist()
        at = end
    return np.frombuffer(data[at:], dtype).reshape(shape)
