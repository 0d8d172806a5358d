"""What `ouro data prepare` is told: the tokenizer, the sources, the held-out share. Strict YAML."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.sources.registry import SourceSettings


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
    """Input files are grouped into shards of about this size: the unit of parallel work and of resuming."""

    @model_validator(mode="after")
    def _names_differ(self) -> "DataRecipe":
        names = [source.name for source in self.sources]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two sources are called {sorted(twice)[0]!r}")
        clash = {f"{name}-validation" for name in names} & set(names)
        if clash:
            raise ValueError(f"the name {sorted(clash)[0]!r} is taken by another source's held-out part")
        return self

    @property
    def tokenizer_folder(self) -> Path:
        return self.tokenizer.path if self.tokenizer.kind == "existing" else self.output / "tokenizer"
