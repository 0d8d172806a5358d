"""Packing plans on disk: written block by block, read memory-mapped."""

import json
from pathlib import Path

import numpy as np

from ouro_megatron.data.packing import LongDocuments, Packing, PackingReport, pack, report_as_json
from ouro_megatron.data.tokens import Stretch
from ouro_megatron.errors import DataError

_COLUMNS = ("document", "offset", "slots")
_STARTS = "starts"
_REPORT = "report.json"


class PackingPlan:
    """Which pieces of which documents each sequence of one source holds."""

    def __init__(self, folder: Path) -> None:
        columns = [np.memmap(folder / f"{name}.i4", dtype="<i4", mode="r") for name in _COLUMNS]
        self._document, self._offset, self._slots = columns
        self._starts = np.memmap(folder / f"{_STARTS}.i8", dtype="<i8", mode="r")
        self.report = PackingReport(**json.loads((folder / _REPORT).read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def stretches(self, sequence: int) -> list[Stretch]:
        """The pieces of one sequence; each has one token more than it has predictions."""
        pieces = slice(int(self._starts[sequence]), int(self._starts[sequence + 1]))
        columns = (column[pieces].tolist() for column in (self._document, self._offset, self._slots))
        return [Stretch(document, offset, slots + 1) for document, offset, slots in zip(*columns, strict=True)]


def write_plan(
    folder: Path, lengths: np.ndarray, sequence: int, packing: Packing, long: LongDocuments | None
) -> PackingReport:
    """Plans all of a source's documents (see `pack`) into `folder`, which exists and is empty."""
    total = PackingReport()
    pieces = 0
    files = [(folder / f"{name}.i4").open("wb") for name in _COLUMNS]
    with (folder / f"{_STARTS}.i8").open("wb") as starts:
        try:
            for block in pack(lengths, sequence, packing, long):
                for file, column in zip(files, (block.document, block.offset, block.slots), strict=True):
                    column.astype("<i4").tofile(file)
                (block.starts[:-1] + pieces).astype("<i8").tofile(starts)
                pieces += len(block.slots)
                total += block.report
        finally:
            for file in files:
                file.close()
        np.asarray([pieces], "<i8").tofile(starts)
    if not pieces:
        raise DataError(f"none of its {total.documents:,} documents can be packed: {total.describe(long)}")
    (folder / _REPORT).write_text(json.dumps(report_as_json(total), indent=1), encoding="utf-8")
    return total
