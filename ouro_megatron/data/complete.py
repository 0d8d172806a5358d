"""What a recipe leaves to its data: weights by size, a budget in epochs."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ouro_megatron.data.indexed import check_prefix, read_index
from ouro_megatron.data.packing import packing_report
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import BlendEntry, Recipe
from ouro_megatron.recipe.spans import Span


def complete(recipe: Recipe) -> Recipe:
    """The recipe with weights and `budget.total` filled in from the sizes of its data; itself when nothing is missing.

    A blend without weights counts each source by its tokens, padding included when it is packed, so that in
    `budget.epochs` passes everything is seen equally often. Raises DataError for data that is missing, unreadable or
    cannot be packed.
    """
    data = recipe.data
    if all(entry.weight is not None for entry in [*data.train, *data.validation]) and recipe.budget.total is not None:
        return recipe

    @cache
    def size(path: Path) -> int:
        return _size(recipe, path)

    def weighted(entries: Sequence[BlendEntry]) -> list[BlendEntry]:
        return [
            entry if entry.weight is not None else entry.model_copy(update={"weight": float(size(entry.path))})
            for entry in entries
        ]

    budget = recipe.budget
    if budget.total is None and budget.epochs is not None:
        tokens = sum(size(entry.path) for entry in data.train)
        budget = budget.model_copy(update={"total": Span(tokens=round(budget.epochs * tokens))})
    filled = data.model_copy(update={"train": weighted(data.train), "validation": weighted(data.validation)})
    return recipe.model_copy(update={"data": filled, "budget": budget})


def _size(recipe: Recipe, path: Path) -> int:
    """Tokens of one pass over a source: as they are, or as sequences that packing fills up."""
    settings = recipe.data
    tokens = check_prefix(path, recipe.model.vocab).tokens
    if settings.packing == "none":
        return tokens
    lengths, length = read_index(path).lengths, settings.sequence_length
    try:
        report = packing_report(lengths, length, settings.packing, settings.long_documents)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not report.sequences:
        raise DataError(f"{path}: nothing of it can be packed: {report.describe(settings.long_documents)}")
    return report.sequences * length
