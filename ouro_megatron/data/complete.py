"""What a recipe leaves to its data: weights by tokens, a budget in epochs, sources that lie in several pairs."""

from collections.abc import Sequence

from ouro_megatron.data.indexed import check_prefix, pairs_of
from ouro_megatron.recipe.schema import BlendEntry, Recipe
from ouro_megatron.recipe.spans import Span


def complete(recipe: Recipe) -> Recipe:
    """The recipe with weights and `budget.total` filled in from the sizes of its data; itself when nothing is missing.

    A blend without weights counts each source by its tokens, so that in `budget.epochs` passes all tokens are seen
    equally often. A source that was prepared as several pairs PATH-00000-of-NNNNN becomes one entry for each, with its
    weight shared out by their tokens. Raises DataError for data that is missing or unreadable.
    """
    data = recipe.data
    split = {"train": _split(recipe, data.train), "validation": _split(recipe, data.validation)}
    if split != {"train": data.train, "validation": data.validation}:
        data = data.model_copy(update=split)
        recipe = recipe.model_copy(update={"data": data})
    if all(entry.weight is not None for entry in [*data.train, *data.validation]) and recipe.budget.total is not None:
        return recipe
    train, validation = _weighted(recipe, data.train), _weighted(recipe, data.validation)
    budget = recipe.budget
    if budget.total is None and budget.epochs is not None:
        tokens = sum(check_prefix(entry.path, recipe.model.vocab).tokens for entry in data.train)
        budget = budget.model_copy(update={"total": Span(tokens=round(budget.epochs * tokens))})
    filled = data.model_copy(update={"train": train, "validation": validation})
    return recipe.model_copy(update={"data": filled, "budget": budget})


def _split(recipe: Recipe, entries: Sequence[BlendEntry]) -> list[BlendEntry]:
    """One entry for each pair."""
    found: list[BlendEntry] = []
    for entry in entries:
        pairs = pairs_of(entry.path)
        if pairs == [entry.path]:
            found.append(entry)
            continue
        tokens = [check_prefix(pair, recipe.model.vocab).tokens for pair in pairs]
        for number, (pair, count) in enumerate(zip(pairs, tokens, strict=True)):
            weight = None if entry.weight is None else entry.weight * count / sum(tokens)
            name = None if entry.name is None else f"{entry.name}-{number:05d}"
            found.append(entry.model_copy(update={"path": pair, "weight": weight, "name": name}))
    return found


def _weighted(recipe: Recipe, entries: Sequence[BlendEntry]) -> list[BlendEntry]:
    return [
        entry
        if entry.weight is not None
        else entry.model_copy(update={"weight": float(check_prefix(entry.path, recipe.model.vocab).tokens)})
        for entry in entries
    ]
