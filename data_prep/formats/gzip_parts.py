"""One gzip stream that lies in several files, byte slices of it, to be inflated as if they were joined."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.formats.compression import Damaged, inflate_pieces
from data_prep.formats.files import File, is_url, open_file, pieces
from data_prep.formats.gzip_index import GzipIndex, build_index, index_file, read_index
from data_prep.formats.lines import Line, cut
from data_prep.formats.seekable import SeekableFile
from data_prep.sources.base import Fault, Report, Unit
from ouro_megatron.errors import DataError

_PIECE = 1 << 17


@dataclass(frozen=True)
class GzipParts:
    """`path`: name of the joined stream; `parts`: its files in their order."""

    path: str
    parts: Sequence[File]
    storage_options: Any
    index_folder: str | None = None
    """Where its index is looked for; beside the parts when None."""

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def stamp(self) -> str:
        text = "\n".join(f"{part.name}\t{part.stamp}" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def _named(self) -> list[tuple[str, int]]:
        return [(part.name, part.size) for part in self.parts]

    def index(self) -> GzipIndex | None:
        """Raises DataError when there is one for other parts."""
        return read_index(index_file(self.path, self.index_folder), self._named)

    def make_index(self, advance: Callable[[int], None], spacing: int | None = None) -> GzipIndex:
        """Reads the stream once; `advance` is told the bytes read so far. Raises DataError as `build_index` does."""
        if is_url(self.path) and self.index_folder is None:
            raise DataError(
                f"{self.path}: an index is a local file and cannot lie beside a URL. For MAP-CC set "
                "`index` to a folder; of other kinds only local files can have one"
            )
        with io.BufferedReader(_Joined(self)) as stream:
            path = index_file(self.path, self.index_folder)
            return build_index(path, stream, self._named, advance, spacing)

    def units(self, target_bytes: int, stamp: str | None = None) -> list[Unit]:
        """Ranges of the content that begin where the index says; without one the whole stream.

        `stamp`: of the units; made from the parts' own ones when None.
        """
        stamp = stamp or self.stamp
        index = self.index()
        if index is None or self.size <= target_bytes:
            return [Unit(self.path, self.size, stamp=stamp)]
        step = target_bytes * index.content // self.size
        bounds = [0]
        for point in index.points:
            if point.content - bounds[-1] >= step:
                bounds.append(point.content)
        bounds.append(index.content)
        share = self.size / max(1, index.content)
        return [
            Unit(self.path, round((stop - start) * share), start, stop, stamp)
            for start, stop in pairwise(bounds)
            if stop > start
        ]

    def lines(
        self,
        unit: Unit,
        report: Report,
        cut_is_expected: bool = False,
        scratch: Path | None = None,
        memory: int | None = None,
    ) -> Iterator[Line]:
        """Lines that begin in the unit. `cut_is_expected`: the last parts are left out on purpose.

        `scratch` and `memory` are those of `read_lines`.
        """

        def told(fault: Fault) -> None:
            if not (cut_is_expected and fault.reason.endswith("cut off")):
                report(fault)

        begin, content = 0, self._placed(lambda: inflate_pieces(self.compressed(0), "gzip"))
        if unit.start > 0:
            index = self.index()
            if index is not None:
                # From the byte before the unit: a line that begins exactly at its start is its own.
                begin, inflated = index.read(unit.start - 1, self.compressed)
                content = self._placed(lambda: inflated)
        yield from cut(unit, content, told, begin, scratch, memory)

    def _placed(self, inflated: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        """Damage with the part it is in."""
        try:
            yield from inflated()
        except Damaged as damage:
            name, at = self.place(damage.at)
            raise Damaged(f"{name}, byte {at}: {damage.reason}", damage.at) from damage

    def compressed(self, start: int) -> Iterator[bytes]:
        """Bytes of the joined stream from `start`."""
        skip = start
        for part in self.parts:
            if skip >= part.size:
                skip -= part.size
                continue
            with open_file(part.path, self.storage_options) as stream:
                stream.seek(skip)
                skip = 0
                yield from pieces(stream, _PIECE)

    def place(self, at: int) -> tuple[str, int]:
        """The part that holds byte `at` of the joined stream, and the byte in it."""
        for part in self.parts:
            if at <= part.size:
                return part.name, at
            at -= part.size
        return self.parts[-1].name, self.parts[-1].size


class _Joined(SeekableFile):
    """The parts as one seekable file."""

    def __init__(self, source: GzipParts) -> None:
        super().__init__(source.size)
        self._source = source
        self._pieces: Iterator[bytes] | None = None
        self._held = b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = self.at
        if super().seek(offset, whence) != before:
            self._pieces, self._held = None, b""
        return self.at

    def readinto(self, buffer: Any) -> int:
        if self._pieces is None:
            self._pieces = self._source.compressed(self.at)
        if not self._held:
            self._held = next(self._pieces, b"")
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        self.at += count
        return count
