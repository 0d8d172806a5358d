"""Reads a source as the pipeline does, without it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_prep.sources.base import Document, Fault
from data_prep.sources.registry import AnySource, SourceSettings

_ADAPTER: TypeAdapter[AnySource] = TypeAdapter(SourceSettings)


def source_of(settings: Mapping[str, Any]) -> AnySource:
    return _ADAPTER.validate_python({"name": "x", **settings})


def read_all(settings: Mapping[str, Any], target_bytes: int = 1 << 26) -> tuple[list[Document], list[Fault]]:
    """Documents of all units, each unit read by a source of its own as worker processes do."""
    faults: list[Fault] = []
    documents: list[Document] = []
    for unit in source_of(settings).units(target_bytes):
        documents.extend(source_of(settings).read(unit, faults.append))
    return documents, faults


def read_apart(settings: Mapping[str, Any], scratch: Path) -> tuple[list[tuple[str, bool]], list[Fault]]:
    """Texts, and whether each was kept in a file, of a source that keeps long ones in a folder."""
    faults: list[Fault] = []
    found: list[tuple[str, bool]] = []
    for unit in source_of(settings).units(1 << 26):
        for document in source_of(settings).with_scratch(scratch).read(unit, faults.append):
            long = document.long_text
            found.append((document.text if long is None else long.whole(), long is not None))
    return found, faults
