"""Blends from token budgets: shares, epochs of a source over all stages, a recipe's data section, Megatron's file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from data_prep.explain import explain
from data_prep.plan import find_prefixes
from ouro_megatron.data.indexed import MAX_BLEND, check_prefix, with_suffix
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.spans import Amount, parse_amount

_ANY_VOCAB = 2**31


@dataclass(frozen=True)
class Share:
    """Per cent of a blend."""

    percent: float


def _parse_part(value: object) -> "int | Share":
    """Tokens such as "4404B", or a share such as "73.4%"."""
    if isinstance(value, int | Share) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", value)):
        return Share(float(match.group(1)))
    return parse_amount(value)


Part = Annotated[int | Share, BeforeValidator(_parse_part)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class BlendSettings(_Section):
    """What one stage reads: tokens of each source ("4404B"), or shares ("73.4%") of a budget."""

    budget: Amount | None = None
    """Tokens of the stage; the sum of the parts when they are tokens."""
    sources: dict[str, Part] = {}
    replay: dict[str, Part] = {}
    """Other blends of the file, each with its own shares inside."""

    @model_validator(mode="after")
    def _one_kind(self) -> "BlendSettings":
        parts = [*self.sources.values(), *self.replay.values()]
        if not parts:
            raise ValueError("names no source")
        shares = [part for part in parts if isinstance(part, Share)]
        if shares and len(shares) != len(parts):
            raise ValueError("give all parts as tokens or all as per cent")
        if any((part.percent if isinstance(part, Share) else part) <= 0 for part in parts):
            raise ValueError("every part must be above zero")
        if shares and self.budget is None:
            raise ValueError("shares need a budget, such as `budget: 6T`")
        if shares and abs(sum(part.percent for part in shares) - 100) > 0.5:
            raise ValueError(f"the shares add up to {sum(part.percent for part in shares):g}%, not 100%")
        if not shares and self.budget is not None and self.budget != sum(p for p in parts if isinstance(p, int)):
            raise ValueError("the parts do not add up to the budget; leave one of them out")
        return self

    @property
    def total(self) -> int:
        if self.budget is not None:
            return self.budget
        return sum(part for part in (*self.sources.values(), *self.replay.values()) if isinstance(part, int))


class BlendFile(_Section):
    """Blends of the stages of one training run, in their order."""

    available: dict[str, Amount] = {}
    """Tokens that a source has; prepared data says it better."""
    folder: Path = Path("data")
    """Where the pairs are."""
    max_epochs: Annotated[float, Field(gt=0)] = 4.0
    """Epochs of a source, over all stages, that are warned of."""
    blends: Annotated[dict[str, BlendSettings], Field(min_length=1)]


@dataclass(frozen=True)
class BlendRow:
    source: str
    origin: str
    """The blend that is replayed; "" for the stage's own sources."""
    tokens: float
    share: float
    """0 to 1."""
    available: int | None
    epochs: float | None
    """Of this stage."""
    epochs_so_far: float | None
    """Of this stage and those before it."""
    prefixes: tuple[tuple[Path, float], ...]
    """Pairs and their share of the blend; the plain name where nothing is prepared."""
    held_out: tuple[tuple[Path, float], ...]


@dataclass(frozen=True)
class Blend:
    name: str
    total: int
    rows: tuple[BlendRow, ...]
    warnings: tuple[str, ...]

    def recipe_text(self, tokenizer: Path | None = None) -> str:
        """The `data` section of a recipe as YAML."""
        data: dict[str, Any] = {} if tokenizer is None else {"tokenizer": str(tokenizer)}
        data["train"] = _entries(row.prefixes for row in self.rows)
        if held_out := _entries(row.held_out for row in self.rows):
            data["validation"] = held_out
        return f"# {self.name}: {self.total:,} tokens. Written by `ouro data blend`.\n" + yaml.safe_dump(
            {"data": data}, sort_keys=False
        )

    def megatron_text(self) -> str:
        """For Megatron's --data-args-path: weights and prefixes. Raises DataError for a path that it would cut."""
        lines = []
        for entry in _entries(row.prefixes for row in self.rows):
            if re.search(r"\s", entry["path"]):
                raise DataError(f"{entry['path']!r}: Megatron's file is cut at spaces; move the data")
            lines.append(f"{entry['weight']:.10g} {entry['path']}\n")
        return "".join(lines)


def _entries(parts: Any) -> list[dict[str, Any]]:
    """One entry a pair; a pair that is in several parts gets their sum."""
    weights: dict[Path, float] = {}
    for prefixes in parts:
        for path, share in prefixes:
            weights[path] = weights.get(path, 0.0) + share
    if len(weights) > MAX_BLEND:
        raise DataError(f"a blend of {len(weights):,} pairs; Megatron takes {MAX_BLEND:,} at most")
    return [{"path": str(path), "weight": float(f"{100 * share:.8g}")} for path, share in weights.items()]


def load_blends(path: Path) -> BlendFile:
    """Raises DataError listing every problem with its key."""
    try:
        return BlendFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        raise DataError(explain(error, path, BlendFile)) from error


def blends_of_parts(parts: Mapping[str, str], budget: str | None, folder: Path) -> BlendFile:
    """One blend from NAME=AMOUNT pairs. Shares without a budget are of all that is prepared.

    Raises DataError for amounts that cannot be read.
    """
    settings: dict[str, Any] = {"sources": dict(parts), "budget": budget}
    if budget is None and all(str(part).rstrip().endswith("%") for part in parts.values()):
        settings["budget"] = sum(_prepared(folder, name) or 0 for name in parts) or 100
    try:
        return BlendFile(folder=folder, blends={"blend": BlendSettings.model_validate(settings)})
    except ValidationError as error:
        raise DataError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from error


def choose_blends(parts: Sequence[str], stage: str | None, folder: Path | None, budget: str | None) -> list[Blend]:
    """The blends of a file, or the one of NAME=AMOUNT parts.

    Raises DataError for a stage that is not in the file, a mixture of both, or as `make_blends` does.
    """
    if all("=" in part for part in parts):
        if stage is not None:
            raise DataError("--stage goes with a file of blends")
        named = dict(part.split("=", 1) for part in parts)
        return make_blends(blends_of_parts(named, budget, folder or Path("data")))
    if len(parts) != 1:
        raise DataError("give one file of blends, or only NAME=AMOUNT parts such as web=73.4% or web=4404B")
    if budget is not None:
        raise DataError("--budget goes with NAME=AMOUNT parts; a file of blends has its own budgets")
    settings = load_blends(Path(parts[0]))
    blends = make_blends(settings if folder is None else settings.model_copy(update={"folder": folder}))
    chosen = [blend for blend in blends if stage in (None, blend.name)]
    if not chosen:
        raise DataError(f"{parts[0]}: no blend {stage!r}; it has {', '.join(settings.blends)}")
    return chosen


def write_blend(blends: Sequence[Blend], recipe: Path | None, megatron: Path | None, tokenizer: Path | None) -> None:
    """Writes the one blend chosen as a recipe's data section and as Megatron's file. Raises DataError for several."""
    for path, text in (
        (recipe, lambda: blends[0].recipe_text(tokenizer)),
        (megatron, lambda: blends[0].megatron_text()),
    ):
        if path is None:
            continue
        if len(blends) != 1:
            raise DataError(
                f"{path}: one file holds one blend; choose it with --stage: {', '.join(b.name for b in blends)}"
            )
        path.write_text(text(), encoding="utf-8")


def make_blends(settings: BlendFile) -> list[Blend]:
    """The blends of a file, in order, with epochs counted from the first on.

    Raises DataError for a replay of what is not there, a source that is nowhere, or too many pairs.
    """
    used: dict[str, float] = {}
    made = []
    for name, blend in settings.blends.items():
        parts = _parts(settings, name, ())
        counts = {source: _available(settings, source) for _, source, _ in parts}
        stage: dict[str, float] = {}
        for _, source, tokens in parts:
            stage[source] = stage.get(source, 0.0) + tokens
        for source, tokens in stage.items():
            used[source] = used.get(source, 0.0) + tokens
        rows = [_row(settings, part, blend.total, counts[part[1]], stage, used) for part in parts]
        made.append(Blend(name, blend.total, tuple(rows), tuple(_warnings(settings, rows))))
    return made


def _parts(settings: BlendFile, name: str, above: tuple[str, ...]) -> list[tuple[str, str, float]]:
    """(origin, source, tokens) of a blend."""
    blend = settings.blends[name]
    parts = [("", source, _tokens(part, blend.total)) for source, part in blend.sources.items()]
    for other, part in blend.replay.items():
        if other not in settings.blends or other in (*above, name):
            raise DataError(f"blends.{name}.replay: {other!r} is not another blend of this file")
        inner = _parts(settings, other, (*above, name))
        scale = _tokens(part, blend.total) / sum(tokens for _, _, tokens in inner)
        parts += [(other, source, tokens * scale) for _, source, tokens in inner]
    return parts


def _tokens(part: int | Share, total: int) -> float:
    return total * part.percent / 100 if isinstance(part, Share) else float(part)


def _row(
    settings: BlendFile,
    part: tuple[str, str, float],
    total: int,
    available: int | None,
    stage: Mapping[str, float],
    used: Mapping[str, float],
) -> BlendRow:
    origin, source, tokens = part
    share = tokens / total
    return BlendRow(
        source=source,
        origin=origin,
        tokens=tokens,
        share=share,
        available=available,
        epochs=stage[source] / available if available else None,
        epochs_so_far=used[source] / available if available else None,
        prefixes=_split(settings.folder, source, "train", share) or ((settings.folder / source, share),),
        held_out=_split(settings.folder, source, "validation", share),
    )


def _warnings(settings: BlendFile, rows: list[BlendRow]) -> list[str]:
    lines = {}
    for row in rows:
        if row.epochs_so_far is None:
            lines[row.source] = f"{row.source}: nobody says how many tokens it has; its epochs are unknown"
        elif row.epochs_so_far > settings.max_epochs:
            lines[row.source] = (
                f"{row.source}: {row.epochs_so_far:.1f} epochs, more than {settings.max_epochs:g}: the model learns it "
                "by heart. Give it fewer tokens or find more of it"
            )
    return list(lines.values())


def _available(settings: BlendFile, source: str) -> int | None:
    prepared = _prepared(settings.folder, source)
    return settings.available.get(source) if prepared is None else prepared


def _prepared(folder: Path, source: str) -> int | None:
    """Tokens of a source's training pairs; None when there are none."""
    found = _tokens_of_pairs(folder, source, "train")
    return sum(found.values()) if found else None


def _split(folder: Path, source: str, split: str, share: float) -> tuple[tuple[Path, float], ...]:
    """A source's share over its pairs, by their tokens."""
    found = _tokens_of_pairs(folder, source, split)
    total = sum(found.values())
    return tuple((prefix, share * tokens / total) for prefix, tokens in found.items())


def _tokens_of_pairs(folder: Path, source: str, split: str) -> dict[Path, int]:
    prefixes = find_prefixes(folder, source, split)
    if not prefixes and split == "train" and with_suffix(folder / source, ".idx").is_file():
        prefixes = [folder / source]  # made by another tool
    return {prefix: check_prefix(prefix, _ANY_VOCAB).tokens for prefix in prefixes}
