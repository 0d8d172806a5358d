"""Describes the kinds of sources to people: their fields, and a recipe to begin with."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_prep.sources.registry import AnySource
from ouro_megatron.errors import DataError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
_FIRST = ("name", "kind", "path")


@dataclass(frozen=True)
class Setting:
    name: str
    type: str
    default: str
    """ "required" when there is none."""
    meaning: str


@dataclass(frozen=True)
class Kind:
    name: str
    about: str
    settings: Sequence[Setting]

    @property
    def recipe(self) -> Path | None:
        """A recipe to begin with, where the project ships one."""
        path = RECIPES / f"{self.name.replace('_', '-')}.yaml"
        return path if path.is_file() else None


def all_kinds() -> list[Kind]:
    """In the order of the registry."""
    return [_kind(model) for model in get_args(AnySource)]


def find_kind(name: str) -> Kind:
    """Raises DataError listing the kinds there are."""
    kinds = all_kinds()
    found = next((kind for kind in kinds if kind.name == name), None)
    if found is None:
        raise DataError(f"no kind of source is called {name!r}; there are {', '.join(kind.name for kind in kinds)}")
    return found


def recipe_text(name: str) -> str:
    """The recipe that the project ships for a kind. Raises DataError when there is none."""
    kind = find_kind(name)
    if kind.recipe is None:
        raise DataError(f"no recipe is shipped for kind {name!r}: see `ouro data sources {name}` for its fields")
    return kind.recipe.read_text(encoding="utf-8")


def _kind(model: Any) -> Kind:
    fields: dict[str, FieldInfo] = model.model_fields
    ordered = [name for name in _FIRST if name in fields] + [name for name in fields if name not in _FIRST]
    settings = [_setting(name, fields[name], _meaning(model, name)) for name in ordered if name != "kind"]
    return Kind(get_args(fields["kind"].annotation)[0], " ".join((inspect.getdoc(model) or "").split()), settings)


def _meaning(model: Any, name: str) -> str:
    """What is said of a field where it is declared last, or where it was declared first."""
    for parent in model.__mro__:
        field = getattr(parent, "model_fields", {}).get(name)
        if field is not None and field.description:
            return " ".join(field.description.split())
    return ""


def _setting(name: str, field: FieldInfo, meaning: str) -> Setting:
    if field.is_required():
        default = "required"
    elif field.default is PydanticUndefined:
        default = "none"
    elif isinstance(field.default, tuple):
        default = ", ".join(map(str, field.default)) or "none"
    else:
        simple = isinstance(field.default, str | int | float) and field.default != ""
        default = str(field.default) if simple else "none"
    return Setting(name, _type_name(field.annotation), default, meaning)


def _type_name(annotation: Any) -> str:
    """As a person would say it."""
    text = getattr(annotation, "__name__", str(annotation)) if not get_args(annotation) else str(annotation)
    for long, short in (("typing.", ""), ("collections.abc.", ""), (" | None", ""), ("pathlib._local.", "")):
        text = text.replace(long, short)
    if "Literal[" in text:
        choices = text[text.index("Literal[") + 8 : text.index("]", text.index("Literal["))].replace("'", "")
        return f"{'list of ' if text.startswith('tuple') else ''}{choices.replace(', ', ' | ')}"
    plain = {"str": "text", "Path": "path", "float": "number", "bool": "true | false"}
    if text.startswith("tuple[str"):
        return "list of texts"
    if text.startswith(("Mapping", "dict")):
        return "mapping"
    if text.startswith("tuple"):
        return "list"
    return plain.get(text, text)
