"""The mid-training mix: many SFT sets, each in its own layout, read as one corpus of conversations."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, field_validator

from data_prep.sources.base import Document, Report, SourceBase, Unit
from data_prep.sources.chat import ChatSource, ChatTable
from data_prep.sources.reasoning_sft import (
    AceReasonSft,
    DeepWriting,
    LlamaNemotronPostTraining,
    NemotronPostTraining,
    OO1Chat,
    OpenCodeReasoning,
    OpenThoughts3,
)
from ouro_megatron.errors import DataError

SftSet = Annotated[
    ChatTable
    | OpenThoughts3
    | AceReasonSft
    | OpenCodeReasoning
    | LlamaNemotronPostTraining
    | NemotronPostTraining
    | OO1Chat
    | DeepWriting,
    Field(discriminator="kind"),
]


class SftMix(SourceBase):
    """A mix of SFT sets, each with its own share (`take`): Ouro's mid-training took 90B tokens of 182B."""

    kind: Literal["sft_mix"]
    sets: Annotated[tuple[SftSet, ...], Field(min_length=1)]
    """Sources of conversations, written like any other; their names must differ."""
    take: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Multiplies the share of every set."""
    _owners: dict[str, int] = PrivateAttr(default_factory=dict)
    """Number of the set that each file belongs to."""

    @field_validator("sets")
    @classmethod
    def _differ(cls, sets: tuple[ChatSource, ...]) -> tuple[ChatSource, ...]:
        names = [member.name for member in sets]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two sets are called {twice[0]!r}")
        if filtered := [member.name for member in sets if "filters" in member.model_fields_set]:
            raise ValueError(f"set {filtered[0]!r} has filters of its own; give them to the mix")
        if limited := [member.name for member in sets if "max_document_memory" in member.model_fields_set]:
            raise ValueError(f"set {limited[0]!r} has a max_document_memory of its own; give it to the mix")
        return sets

    def units(self, target_bytes: int) -> list[Unit]:
        self._owners.clear()
        found: list[Unit] = []
        for number, member in enumerate(self.sets):
            for unit in member.units(target_bytes):
                self._own(unit.path, number)
                found.append(unit)
        return found

    def _own(self, path: str, number: int) -> None:
        other = self._owners.setdefault(path, number)
        if other != number:
            names = f"{self.sets[other].name} and {self.sets[number].name}"
            raise DataError(f"source {self.name}: {path} belongs to two sets, {names}")

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        if unit.path not in self._owners:  # a process of its own, which did not list the units
            for number, member in enumerate(self.sets):
                for file in member.files():
                    self._own(file.path, number)
        member = self.sets[self._owners[unit.path]]
        own = {"take": member.take * self.take, "max_document_memory": self.max_document_memory}
        yield from member.with_scratch(self._scratch).model_copy(update=own).read(unit, report)
