"""How many bad records and cut files a source may have, and the list of them."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.plan import SourceJob
from data_prep.shards import ShardResult, ShardTask
from ouro_megatron.data.indexed import with_suffix
from ouro_megatron.errors import DataError

_SHOWN = 20
"""Faults that an error message shows."""


class FaultBudget:
    """Counts a source's faults while its shards come in."""

    def __init__(self, job: SourceJob) -> None:
        self._rate = job.recipe.max_fault_rate
        self._name = job.source.name
        self._list = faults_file(job)
        self._bytes = sum(task.size for task in job.tasks)
        self._files = len({unit.path for unit in job.units})
        self._seen: list[ShardTask] = []
        self._seen_bytes = 0
        self.records = 0
        self.faults = 0
        self.cut: set[str] = set()

    def add(self, task: ShardTask, result: ShardResult) -> None:
        """Raises DataError with the list once the source cannot end within its budget any more."""
        self._seen.append(task)
        self._seen_bytes += task.size
        self.records += sum(unit["documents"] for unit in result.units)
        self.cut.update(result.cut_files)
        # A file's cut is counted among files, not among records.
        self.faults += result.faults - len(result.cut_files)
        self._check()

    def _check(self) -> None:
        share = min(1.0, self._seen_bytes / self._bytes) if self._bytes else 1.0
        expected = (self.records + self.faults) / share if share > 0 else float("inf")
        if self.faults <= self._rate * expected and len(self.cut) <= self._rate * self._files:
            return
        write_faults(self._list, self._seen)
        records = f"{self.faults:,} of {self.records + self.faults:,} records read so far cannot be used"
        files = f"{len(self.cut):,} of {self._files:,} files cannot be read to their end"
        lines = "\n".join(f"  {line}" for line in _first_lines(self._list))
        raise DataError(
            f"source {self._name}: {records}, {files}; max_fault_rate is {self._rate:g}. What was finished is kept. "
            f"Mend the files or raise max_fault_rate, and run it again. All faults are in {self._list}:\n{lines}"
        )


def faults_file(job: SourceJob) -> Path:
    """Where a source's faults are written down, one JSON object a line."""
    return with_suffix(job.recipe.output / job.source.name, ".faults.jsonl")


def write_faults(path: Path, tasks: Iterable[ShardTask]) -> None:
    """The shards' faults in one file, in order; no file when there are none."""
    partial = with_suffix(path, ".part")
    with partial.open("wb") as file:
        for task in tasks:
            found = task.folder / "faults.jsonl"
            if found.is_file():
                file.write(found.read_bytes())
        file.flush()
        os.fsync(file.fileno())
        empty = file.tell() == 0
    if empty:
        partial.unlink()
        path.unlink(missing_ok=True)
    else:
        partial.replace(path)


def _first_lines(path: Path) -> Sequence[str]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        faults = [json.loads(line) for line, _ in zip(file, range(_SHOWN + 1), strict=False)]
    lines = [f"{fault['path']}, {fault['where']}: {fault['reason']}" for fault in faults[:_SHOWN]]
    return lines if len(faults) <= _SHOWN else [*lines, "..."]
