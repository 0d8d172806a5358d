"""A look at a recipe's sources before any tokenising: what there is to read, the first documents, the first faults."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from data_prep.recipe import DataRecipe
from data_prep.sources.base import Document, Fault
from data_prep.sources.registry import AnySource
from ouro_megatron.errors import DataError


@dataclass(frozen=True)
class Preview:
    name: str
    kind: str
    files: int
    units: int
    bytes: int
    documents: Sequence[Document]
    faults: Sequence[Fault]


def preview(recipe: DataRecipe, source: str | None, count: int) -> Iterator[Preview]:
    """The first `count` documents of each source, or of the one that is named.

    Raises DataError for a source that cannot be used, or a name that the recipe does not have.
    """
    names = [entry.name for entry in recipe.sources]
    if source is not None and source not in names:
        raise DataError(f"no source is called {source!r}; the recipe has {', '.join(names)}")
    for entry in recipe.sources:
        if source in (None, entry.name):
            yield _look(entry, count, recipe.shard_bytes)


def _look(source: AnySource, count: int, target_bytes: int) -> Preview:
    units = source.units(target_bytes)
    faults: list[Fault] = []
    documents = (document for unit in units for document in source.read(unit, faults.append))
    first = list(islice(documents, count))
    files = len({unit.path for unit in units})
    return Preview(source.name, source.kind, files, len(units), sum(unit.size for unit in units), first, faults)
