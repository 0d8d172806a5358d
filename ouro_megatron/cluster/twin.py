"""A pipeline's small twin: the same stages and files with everything divided."""

import math
from typing import Any

from ouro_megatron.cluster.settings import Divide, Twin
from ouro_megatron.recipe.load import merged, recipe_from_values
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.recipe.spans import Span

_TOKEN_SPANS = ("schedule.warmup", "schedule.decay", "checkpoint.permanent_every")


def twin_of(recipe: Recipe, twin: Twin) -> Recipe:
    """The recipe divided and overridden as `twin` says. Raises RecipeError when the result is no valid recipe."""
    divide, values = twin.divide, recipe.model_dump(mode="json")
    _divide(values, "model.layers", divide.layers)
    _divide(values, "data.sequence_length", divide.sequence_length)
    _divide(values, "batch.global_tokens", divide.batch_tokens)
    epochs = values["budget"]["epochs"]
    if values["budget"]["total"] is None and epochs is not None:
        values["budget"] = {"total": round(epochs * twin.epoch_tokens)}
    else:
        _shorten(values, "budget.total", divide)
    for path in _TOKEN_SPANS:
        _shorten(values, path, divide)
    for point in values["batch"]["ramp"]:
        _divide(point, "global_tokens", divide.batch_tokens)
        _shorten(point, "after", divide)
    for early in values["training"]["early_loops"]:
        _shorten(early, "until", divide)
    return recipe_from_values(merged(values, twin.recipe), f"twin of {recipe.name}")


def _find(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *sections, key = path.split(".")
    for section in sections:
        values = values[section]
    return values, key


def _divide(values: dict[str, Any], path: str, divisor: int) -> None:
    where, key = _find(values, path)
    where[key] = max(1, where[key] // divisor)


def _shorten(values: dict[str, Any], path: str, divide: Divide) -> None:
    """Spans in tokens are divided and rounded up, so that nothing becomes empty; spans in steps stay."""
    where, key = _find(values, path)
    if where[key] is None:
        return
    span = Span.parse(where[key])
    if span.tokens is not None:
        where[key] = math.ceil(span.tokens / divide.tokens)
