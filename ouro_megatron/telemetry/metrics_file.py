"""metrics.jsonl: every record of a run as one JSON object a line, the source of the report.

Each line has a "kind" ("step", "evaluation" or "event") and the fields of that record. JSON knows no NaN or
infinity; such numbers are the strings "NaN", "Infinity" and "-Infinity".
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ouro_megatron.errors import MetricsError
from ouro_megatron.telemetry.records import EvalRecord, EventRecord, LoopStats, RankSpread, Record, StepRecord
from ouro_megatron.telemetry.sink import Notify, RunInfo

METRICS_NAME = "metrics.jsonl"
_KINDS: dict[str, type[StepRecord] | type[EvalRecord] | type[EventRecord]] = {
    "step": StepRecord,
    "evaluation": EvalRecord,
    "event": EventRecord,
}
_NAMES = {record_type: kind for kind, record_type in _KINDS.items()}
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def _encode_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return _encode_number(value) if isinstance(value, float) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return float(value) if value in _NOT_FINITE else value


def to_line(record: Record) -> str:
    """One line of metrics.jsonl, its newline included."""
    return json.dumps({"kind": _NAMES[type(record)], **_encode(dataclasses.asdict(record))}, allow_nan=False) + "\n"


def from_line(line: str | bytes) -> Record:
    """Inverse of `to_line`. Fields this version does not know are passed over.

    Raises ValueError for anything that is not a whole record.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or fields.get("kind") not in _KINDS:
        raise ValueError("not a record: no known 'kind'")
    record_type = _KINDS[fields["kind"]]
    known = {field.name for field in dataclasses.fields(record_type)}
    values = {key: value for key, value in fields.items() if key in known}
    if record_type is not EventRecord:
        values = _decode(values)
        values["loops"] = LoopStats(**values["loops"]) if isinstance(values.get("loops"), dict) else None
        if values["loops"] is None:
            raise ValueError("a record without 'loops'")
        if isinstance(values.get("ranks"), dict):
            values["ranks"] = RankSpread(**values["ranks"])
    try:
        return record_type(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def read_records(path: Path) -> list[Record]:
    """All records of a metrics file in order.

    A last line that was cut short, as a killed run leaves it, is passed over. Raises MetricsError when the file is
    missing or any other line cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read: {error.strerror}. Is this the folder of a run?") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(from_line(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # no newline after it: the write was cut short
                break
            raise MetricsError(f"{path}: line {number} is not a record ({error}); remove that line") from error
    return records


def _lines_until(source: BinaryIO, step: int) -> Iterator[bytes]:
    """Whole lines whose step is not after `step`. Lines that cannot be read are left out."""
    for line in source:
        try:
            if from_line(line).step <= step:
                yield line if line.endswith(b"\n") else line + b"\n"
        except (ValueError, TypeError):
            continue


def drop_after(path: Path, step: int) -> None:
    """Removes what a killed run wrote after `step`, the step its checkpoint holds.

    The file is replaced in one move: it is either the old or the new one at any time.
    """
    temporary = path.with_name(path.name + ".part")
    with path.open("rb") as source, temporary.open("wb") as target:
        target.writelines(_lines_until(source, step))
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)


class MetricsFile:
    """Appends to run_folder/metrics.jsonl; each record is in the file when `write` returns.

    A run that starts afresh in a folder with an older file keeps that one as metrics.previous.jsonl. When the disk is
    full, training goes on: one warning is given, the lines that do not fit are lost, no half line stays behind.
    """

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._file: BinaryIO | None = None
        self._end = 0
        self._lost = False

    def start(self, run: RunInfo) -> None:
        path = run.run_folder / METRICS_NAME
        run.run_folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if run.resumed:
                drop_after(path, run.start_step)
            else:
                path.replace(path.with_name("metrics.previous.jsonl"))
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        if self._file is None:
            return
        line = to_line(record).encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError("the line did not fit")
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._end)
            if not self._lost:
                self._lost = True
                self._notify("warning", f"{self._file.name}: {error}; lines are missing from here on")
            return
        self._end += len(line)
        self._lost = False

    def close(self, summary: str | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
