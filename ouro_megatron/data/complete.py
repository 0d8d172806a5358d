"""What a recipe leaves to its data: weights by size, a budget in epochs, sources that lie in several pairs."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from ouro_megatron.data.indexed import check_prefix, pairs_of, read_index
from ouro_megatron.data.packing import packing_report
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import BlendEntry, Recipe
from ouro_megatron.recipe.spans import Span


def complete(recipe: Recipe) -> Recipe:
    """The recipe with weights and `budget.total` filled in from the sizes of its data; itself when nothing is missing.

    A blend without weights counts each source by its tokens, padding included when it is packed, so that in
    `budget.epochs` passes everything is seen equally often. A source that was prepared as several pairs
    PATH-00000-of-NNNNN becomes one entry for each, with its weight shared out by the same sizes. Raises DataError for
    data that is missing, unreadable or cannot be packed.
    """

    @cache
    def size(path: Path) -> int:
        return _size(recipe, path)

    data = recipe.data
    split = {"train": _split(data.train, size), "validation": _split(data.validation, size)}
    if split != {"train": data.train, "validation": data.validation}:
        data = data.model_copy(update=split)
        recipe = recipe.model_copy(update={"data": data})
    if all(entry.weight is not None for entry in [*data.train, *data.validation]) and recipe.budget.total is not None:
        return recipe
    budget = recipe.budget
    if budget.total is None and budget.epochs is not None:
        tokens = sum(size(entry.path) for entry in data.train)
        budget = budget.model_copy(update={"total": Span(tokens=round(budget.epochs * tokens))})
    filled = {"train": _weighted(data.train, size), "validation": _weighted(data.validation, size)}
    return recipe.model_copy(update={"data": data.model_copy(update=filled), "budget": budget})


def _split(entries: Sequence[BlendEntry], size: Callable[[Path], int]) -> list[BlendEntry]:
    """One entry for each pair."""
    found: list[BlendEntry] = []
    for entry in entries:
        pairs = pairs_of(entry.path)
        if pairs == [entry.path]:
            found.append(entry)
            continue
        sizes = [size(pair) for pair in pairs]
        for number, (pair, count) in enumerate(zip(pairs, sizes, strict=True)):
            weight = None if entry.weight is None else entry.weight * count / sum(sizes)
            name = None if entry.name is None else f"{entry.name}-{number:05d}"
            found.append(entry.model_copy(update={"path": pair, "weight": weight, "name": name}))
    return found


def _weighted(entries: Sequence[BlendEntry], size: Callable[[Path], int]) -> list[BlendEntry]:
    return [
        entry if entry.weight is not None else entry.model_copy(update={"weight": float(size(entry.path))})
        for entry in entries
    ]


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
