"""What is wrong with a file of settings, a line for each problem: its place, and the nearest name that is known."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, file: Path, model: type[BaseModel]) -> str:
    """`model`: what the file was read as."""
    return "\n".join(dict.fromkeys(f"{file}: {_explain(item, model)}" for item in error.errors()))


def _explain(item: Any, model: type[BaseModel]) -> str:
    places, models = _walk(item["loc"], model)
    path = ".".join(places)
    if item["type"] == "extra_forbidden":
        names = sorted({name for each in models for name in each.model_fields})
        return f"unknown key {path}; {_nearest(places[-1], names)}"
    if item["type"] == "missing":
        return f"{path} is missing"
    if item["type"] == "union_tag_invalid":
        kinds = [kind.strip("' ") for kind in item["ctx"]["expected_tags"].split(",")]
        return f"{path}: no kind is called {item['ctx']['tag']!r}; {_nearest(item['ctx']['tag'], kinds)}"
    if item["type"] == "union_tag_not_found":
        return f"{path}.kind is missing"
    if item["type"] == "model_type" and not path:
        return "holds no settings: expected lines such as `output: data/mine`"
    message = item["msg"].removeprefix("Value error, ")
    simple = isinstance(item["input"], str | int | float) and repr(item["input"]) not in message
    shown = f" (got {item['input']!r})" if simple else ""
    return f"{path + ': ' if path else ''}{message[0].lower()}{message[1:]}{shown}"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _walk(loc: Sequence[Any], model: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """The place as the file writes it, without the kinds that pydantic puts between, and the sections it may be in."""
    models, places = [model], []
    for part in loc[:-1]:
        fields = [each.model_fields[part] for each in models if part in each.model_fields]
        of_kind = [each for each in models if _kind(each) == part]
        if fields:
            models = [found for field in fields for found in _models(field.annotation)]
            places.append(str(part))
        elif of_kind:
            models = of_kind
        else:  # a number in a list, or a name in a mapping
            places.append(str(part))
    return [*places, *map(str, loc[-1:])], models


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field and get_origin(field.annotation) is Literal else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in get_args(annotation):
        yield from _models(argument)
