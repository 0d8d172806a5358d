"""What `ouro data prepare` is told: the tokenizer, the sources, the held-out share. Strict YAML."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.filters import Filters
from data_prep.sources.registry import SourceSettings
from ouro_megatron.data.indexed import MAX_SEQUENCES

PART_NAME = re.compile(r"-\d{5}-of-\d{5}$")
"""How the names of several pairs of one source end."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainTokenizer(Section):
    """Byte-level BPE trained on the sources' training documents; digits stay single."""

    kind: Literal["train"] = "train"
    vocab: Annotated[int, Field(ge=300, le=2**31 - 1)]
    """Size with the 256 bytes and the end-of-document token."""
    sample_bytes: Annotated[int, Field(ge=1000)] = 200_000_000
    """Text it learns from at most, taken evenly from the sources."""
    end_of_document: str = "<|endoftext|>"
    special_tokens: tuple[str, ...] = ()
    """Further ones; conversations in ChatML need "<|im_start|>" and "<|im_end|>"."""


class ExistingTokenizer(Section):
    """A folder with tokenizer.json and tokenizer_config.json (which names eos_token)."""

    kind: Literal["existing"]
    path: Path


class DataRecipe(Section):
    """One run of data preparation. Each source gives OUTPUT/NAME and OUTPUT/NAME-validation."""

    output: Path
    tokenizer: Annotated[TrainTokenizer | ExistingTokenizer, Field(discriminator="kind")]
    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    """Share of the documents that is held out, chosen by a hash of each document's key."""
    shard_bytes: Annotated[int, Field(ge=1000)] = 64_000_000
    """Input is cut and grouped into shards of about this size: the unit of parallel work and of resuming."""
    chat_template: str | None = None
    """For conversations: Jinja text, or the name of one of the tokenizer's templates; its default one when absent."""
    filters: Filters = Filters()
    max_fault_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.001
    """Share of a source's records that may be unreadable, and of its files that may be cut short."""
    max_prefix_tokens: Annotated[int, Field(ge=1)] = 50_000_000_000
    """A source with more tokens becomes several pairs."""
    max_prefix_documents: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] = 2**28
    """The same for documents: Megatron counts documents times epochs in int32."""
    keep_parts: bool = False
    """Keeps the shards beside the pairs: twice the disk, but a source that grew reads its new files only."""

    @model_validator(mode="after")
    def _names_differ(self) -> "DataRecipe":
        names = [source.name for source in self.sources]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two sources are called {sorted(twice)[0]!r}")
        parted = [name for name in names if PART_NAME.search(name)]
        if parted:
            raise ValueError(f"the name {parted[0]!r} ends like one of several pairs; choose another")
        clash = {f"{name}-validation" for name in names} & set(names)
        if clash:
            raise ValueError(f"the name {sorted(clash)[0]!r} is taken by another source's held-out part")
        return self

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer.path if self.tokenizer.kind == "existing" else self.output / "tokenizer"
