"""One gzip stream that lies in several files, byte slices of it, to be inflated as if they were joined."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.formats.compression import Damaged, inflate_pieces
from data_prep.formats.files import File, open_file, pieces
from data_prep.formats.lines import Line, cut
from data_prep.sources.base import Fault, Report, Unit

_PIECE = 1 << 17


@dataclass(frozen=True)
class GzipParts:
    """`path`: name of the joined stream; `parts`: its files in their order."""

    path: str
    parts: Sequence[File]
    storage_options: Any

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def stamp(self) -> str:
        text = "\n".join(f"{part.name}\t{part.stamp}" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def units(self, target_bytes: int) -> list[Unit]:
        """The whole stream: it can be entered at its beginning only."""
        return [Unit(self.path, self.size, stamp=self.stamp)]

    def lines(self, unit: Unit, report: Report, cut_is_expected: bool = False) -> Iterator[Line]:
        """Lines that begin in the unit. `cut_is_expected`: the last parts are left out on purpose."""

        def told(fault: Fault) -> None:
            if not (cut_is_expected and fault.reason.endswith("cut off")):
                report(fault)

        yield from cut(self.path, self._inflated(), told)

    def _inflated(self) -> Iterator[bytes]:
        try:
            yield from inflate_pieces(self.compressed(0), "gzip")
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
