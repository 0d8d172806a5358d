"""What there is to do: the shards of each source, keys that change with what they are made from, names of the results.

The plan is a function of the recipe, the files it names and the tokenizer. Every machine that works on one recipe comes
to the same plan, or reads it from the file that `save_units` left.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.recipe import PART_NAME, DataRecipe
from data_prep.shards import SPLITS, ShardTask, group_units
from data_prep.sources.base import Unit
from data_prep.sources.registry import AnySource
from data_prep.writer import LOSS_SUFFIX
from ouro_megatron.data.indexed import read_manifest, with_suffix
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import DataError

VERSION = 2
"""Enters every key: raise it when the output for the same input changes."""
FILES = {".bin": "bin", ".idx": "idx", LOSS_SUFFIX: "loss"}
"""Suffixes of a pair's files and their names in the manifest."""


def digest_of(*parts: object) -> str:
    """Hexadecimal SHA-256 of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class SourceJob:
    """One source of a recipe."""

    recipe: DataRecipe
    source: AnySource
    tokenizer: TextTokenizer
    units: Sequence[Unit]
    before: tuple[str, ...] = ()
    """Keys of the sources before it, which matter when duplicates are looked for across sources."""

    @property
    def parts(self) -> Path:
        """Shards of this source; each is called by its key."""
        return self.recipe.output / ".parts" / self.source.name

    @cached_property
    def _settings(self) -> list[Any]:
        """All that decides what becomes of a unit."""
        recipe = self.recipe
        filters = recipe.filters.model_dump(mode="json")
        if recipe.filters.decontaminate is not None:
            filters["files"] = [_content(file) for file in recipe.filters.decontaminate.files]
        tokenizer = [self.tokenizer.sha256, self.tokenizer.eod, recipe.chat_template]
        return [VERSION, self.source.model_dump(mode="json"), filters, tokenizer, recipe.validation_fraction]

    @cached_property
    def tasks(self) -> list[ShardTask]:
        """In the order of the source's units."""
        recipe = self.recipe
        tasks = []
        for group in group_units(self.units, recipe.shard_bytes):
            key = digest_of(self._settings, [asdict(unit) for unit in group])[:32]
            hashes = recipe.output / ".hashes" / f"{key}.hashes" if recipe.filters.exact_dedup else None
            tasks.append(
                ShardTask(
                    self.source,
                    group,
                    self.parts / key,
                    recipe.tokenizer_folder,
                    recipe.validation_fraction,
                    recipe.filters,
                    recipe.chat_template,
                    hashes,
                )
            )
        return tasks

    @cached_property
    def key(self) -> str:
        """Changes when the source's settings, any of its files, the filters, the tokenizer or the limits do.

        Not with the size of shards: it does not change the result.
        """
        limits = [self.recipe.max_prefix_tokens, self.recipe.max_prefix_documents]
        before = self.before if self.recipe.filters.exact_dedup else ()
        files = list(dict.fromkeys((unit.path, unit.stamp) for unit in self.units))
        return digest_of(self._settings, before, limits, files)

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS if self.recipe.validation_fraction > 0 else SPLITS[:1]

    @property
    def is_current(self) -> bool:
        """All its pairs are there, of the size they were made with, from what the recipe says now."""
        return all(_is_whole(self.prefixes(split), self.key) for split in self.splits)

    @property
    def has_hashes(self) -> bool:
        """Those of its documents, which a search for duplicates in other sources needs, are there or not asked for."""
        return all(task.hashes is None or task.hashes.is_file() for task in self.tasks)

    def prefixes(self, split: str) -> list[Path]:
        """Those of this source and split that have a manifest, in order."""
        return find_prefixes(self.recipe.output, self.source.name, split)


def base_name(source: str, split: str) -> str:
    return source if split == "train" else f"{source}-validation"


def find_prefixes(output: Path, source: str, split: str) -> list[Path]:
    """Prefixes below `output` whose manifest says that they are of this source and split, in order."""
    base = base_name(source, split)
    found = []
    for path in sorted(output.glob(f"{base}*.manifest.json")):
        name = path.name.removesuffix(".manifest.json")
        if name == base or (name.startswith(base) and PART_NAME.fullmatch(name, len(base))):
            found.append(output / name)
    return found


def _is_whole(prefixes: list[Path], key: str) -> bool:
    manifests = [read_manifest(prefix) or {} for prefix in prefixes]
    count = len(prefixes)
    if not count or any(item.get("key") != key or item.get("of") != count for item in manifests):
        return False
    return all(is_whole(prefix, manifest) for prefix, manifest in zip(prefixes, manifests, strict=True))


def is_whole(prefix: Path, manifest: dict[str, Any]) -> bool:
    """Whether the files of a prefix have the sizes its manifest says; content is `ouro data verify`'s."""
    for suffix, name in FILES.items():
        file = with_suffix(prefix, suffix)
        size = file.stat().st_size if file.is_file() else None
        if size != (manifest[name]["bytes"] if name in manifest else None):
            return False
    return True


def list_units(recipe: DataRecipe, *, saved: bool = False) -> dict[str, list[Unit]]:
    """Units of each source. `saved`: those of the plan file, when it was made from this recipe.

    Raises DataError for a source that cannot be used.
    """
    path = _plan_file(recipe)
    if saved and path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            return {source.name: [Unit(**unit) for unit in listed[source.name]] for source in recipe.sources}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); remove it and run `ouro data plan` again") from error
    units = {source.name: source.units(recipe.shard_bytes) for source in recipe.sources}
    for name, found in units.items():
        if not found:
            raise DataError(f"source {name}: nothing to read")
    return units


def save_units(recipe: DataRecipe, units: dict[str, list[Unit]]) -> Path:
    """Writes the plan file, so that many machines need not list the same files. Returns its path."""
    path = _plan_file(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps({name: [asdict(unit) for unit in found] for name, found in units.items()}))
    partial.replace(path)
    return path


def _plan_file(recipe: DataRecipe) -> Path:
    key = digest_of([source.model_dump(mode="json") for source in recipe.sources], recipe.shard_bytes)[:16]
    return recipe.output / ".parts" / f"plan-{key}.json"


def source_jobs(recipe: DataRecipe, units: dict[str, list[Unit]], tokenizer: TextTokenizer) -> list[SourceJob]:
    """In the order of the recipe."""
    jobs: list[SourceJob] = []
    for source in recipe.sources:
        before = tuple(job.key for job in jobs) if recipe.filters.exact_dedup else ()
        jobs.append(SourceJob(recipe, source, tokenizer, units[source.name], before))
    return jobs


def stale_jobs(jobs: Sequence[SourceJob]) -> list[SourceJob]:
    """Those to be made: out of date, or finished but needed again to find duplicates in one that is out of date."""
    stale = [job for job in jobs if not job.is_current]
    return [job for job in jobs if job in stale or not job.has_hashes] if stale else []


def share(tasks: Sequence[ShardTask], shard: tuple[int, int] | None) -> Iterator[ShardTask]:
    """The tasks of share i of N: every N-th; all of them for None."""
    return iter(tasks) if shard is None else iter(tasks[shard[0] :: shard[1]])


def _content(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"filters.decontaminate: {file} cannot be read: {error.strerror}") from error
