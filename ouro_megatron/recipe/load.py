"""Reads recipe files: YAML, `extends`, command-line overrides, and errors that name file, key and the nearest name."""

import copy
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ouro_megatron.errors import RecipeError
from ouro_megatron.recipe.schema import Recipe

SectionT = TypeVar("SectionT", bound=BaseModel)
Origins = dict[str, str]
"""Key path ("batch.global_tokens") -> where its value comes from ("stages/demo/base.yaml:12" or "command line")."""


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, and with 1e-4 as a number."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise RecipeError(
                f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}: {key!r} is set twice (first in line "
                f"{seen[key]})"
            )
        seen[key] = key_node.start_mark.line + 1
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)
# YAML 1.1 wants a dot in floats with an exponent; everybody writes 3e-4.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass
class _Layer:
    """Plain values of one or several merged files, and where each leaf came from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)

    def update(self, other: "_Layer") -> None:
        """Mappings merge key by key; anything else is replaced."""
        _merge(self.values, other.values)
        for path in other.origins:
            for old in [p for p in self.origins if p == path or p.startswith(path + ".")]:
                del self.origins[old]
        self.origins.update(other.origins)


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with `over` merged in as `extends` does: mappings key by key, all else replaced."""
    result = copy.deepcopy(dict(base))
    _merge(result, copy.deepcopy(dict(over)))
    return result


def _parse(text: str, origin: str) -> tuple[dict[str, Any], yaml.Node | None]:
    try:
        node = yaml.compose(text, Loader=_named(origin))
        loader = _named(origin)(text)
        values = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{origin}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {error}") from error
    if values is None:
        return {}, None
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of sections, this is a {type(values).__name__}")
    return values, node


def _named(origin: str) -> type[_StrictLoader]:
    """A loader whose error positions carry the file's name."""

    class Named(_StrictLoader):
        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.name = origin

    return Named


def _leaves(node: yaml.Node | None, origin: str, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _leaves(value, origin, f"{path}.{key.value}" if path else str(key.value))
    elif node is not None:
        yield path, f"{origin}:{node.start_mark.line + 1}"


def _read_file(path: Path, chain: tuple[Path, ...]) -> _Layer:
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(str(p) for p in [*chain[chain.index(resolved) :], resolved])
        raise RecipeError(f"extends: files extend each other in a circle: {names}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        by = f" (extended by {chain[-1]})" if chain else ""
        raise RecipeError(f"{path}: cannot be read: {error.strerror}{by}") from error
    values, node = _parse(text, str(path))
    extends = values.pop("extends", [])
    bases = [extends] if isinstance(extends, str) else extends
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: extends: a file name or a list of file names, relative to this file")
    layer = _Layer()
    for base in bases:
        layer.update(_read_file(path.parent / base, (*chain, resolved)))
    own = {key: origin for key, origin in _leaves(node, str(path)) if key.split(".")[0] != "extends"}
    layer.update(_Layer(values, own))
    return layer


def _override_layer(overrides: Sequence[str]) -> _Layer:
    layer = _Layer()
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"override {text!r}: write key.path=value, for example optimizer.lr=3e-4")
        path = key.strip()
        values: Any
        try:
            values = _named(f"override {text}")(value).get_single_data() if value.strip() else None
        except yaml.YAMLError as error:
            raise RecipeError(f"override {text!r}: the value is not valid YAML") from error
        for part in reversed(path.split(".")):
            values = {part: values}
        layer.update(_Layer(values, {path: f"override {text}"}))
    return layer


def load_with_origins(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Origins]:
    """`load_recipe`, and for each key path that was set, the file and line or override it was set in."""
    layer = _read_file(path, ())
    layer.update(_override_layer(overrides))
    return _validated(layer, str(path), Recipe), layer.origins


def load_section(path: Path | None, kind: type[SectionT], overrides: Sequence[str] = ()) -> SectionT:
    """Like `load_recipe` for another kind of file: the same YAML, `extends`, overrides and error messages. Without a
    path, of the overrides alone."""
    layer = _read_file(path, ()) if path is not None else _Layer()
    layer.update(_override_layer(overrides))
    return _validated(layer, str(path or "command line"), kind)


def recipe_from_values(values: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain values with `key.path=value` overrides on top. Raises RecipeError naming `origin`."""
    layer = _Layer(dict(values), {})
    layer.update(_override_layer(overrides))
    return _validated(layer, origin, Recipe)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` with everything it extends and `key.path=value` overrides on top.

    `extends` names files relative to the one that says so; later ones win, its own keys win over all. Mappings merge,
    lists are replaced. Raises RecipeError listing every problem with the file and line it comes from.
    """
    return load_with_origins(path, overrides)[0]


def recipe_from_text(text: str, origin: str) -> Recipe:
    """A recipe from YAML text without `extends`, such as `dump_recipe` makes. Raises RecipeError naming `origin`."""
    values, node = _parse(text, origin)
    return _validated(_Layer(values, dict(_leaves(node, origin))), origin, Recipe)


def dump_recipe(recipe: Recipe) -> str:
    """YAML that loads back to an equal recipe, every field written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def difference(before: Recipe, after: Recipe) -> list[tuple[str, Any, Any]]:
    """(key path, value before, value after) of every leaf that differs; lists are compared as a whole."""
    old, new = dict(leaves(before)), dict(leaves(after))
    paths = list(old) + [path for path in new if path not in old]
    return [(path, old.get(path), new.get(path)) for path in paths if old.get(path) != new.get(path)]


def leaves(recipe: Recipe) -> list[tuple[str, Any]]:
    """(key path, plain value) of every leaf; lists are leaves."""
    return list(_flat(recipe.model_dump(mode="json")))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, path + ".")
        else:
            yield path, value


def _validated(layer: _Layer, name: str, kind: type[SectionT]) -> SectionT:
    try:
        return kind.model_validate(layer.values)
    except ValidationError as error:
        lines = [_explain(item, layer.origins, name, kind) for item in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from error


def _explain(item: Any, origins: Origins, name: str, kind: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    origin = _origin_of(path, origins) or name
    if item["type"] == "extra_forbidden":
        names = _known_names(item["loc"][:-1], kind)
        near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(names))}"
        return f"{origin}: unknown key {path}; {hint}"
    if item["type"] == "missing":
        return f"{origin}: {path} is missing"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if "got " in message else f" (got {item['input']!r})"
    return f"{origin}: {path}: {message[0].lower()}{message[1:]}{shown}"


def _origin_of(path: str, origins: Origins) -> str | None:
    """Where the longest known prefix of `path`, or else something below it, was set."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in origins:
            return origins[prefix]
    below = [origin for key, origin in origins.items() if key.startswith(path + ".")]
    return below[0] if below else None


def _known_names(loc: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """Field names of the section at `loc` of `model`."""
    for part in loc:
        if isinstance(part, int):
            continue
        model = next(_models(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None or isinstance(annotation, types.UnionType | type(Union)):
        for argument in get_args(annotation):
            yield from _models(argument)
