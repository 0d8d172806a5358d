"""From sources to training data: tokenizer, shards in parallel, one pair of files a split, a manifest last.

Every piece of work leaves a mark when it is whole. A run that was killed goes on at the next shard; a run with nothing
to do reads a few small files and says so.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import ValidationError

from data_prep.recipe import DataRecipe, TrainTokenizer
from data_prep.shards import ShardTask, entropy_of, group_units, token_counts, tokenise_shard
from data_prep.sources.base import Unit
from data_prep.sources.registry import AnySource
from data_prep.train_tokenizer import train_tokenizer
from data_prep.writer import PairWriter, token_dtype
from ouro_megatron.data.indexed import read_manifest, sha256_of, with_suffix
from ouro_megatron.data.tokenizer import CONFIG_FILE, TextTokenizer, load_tokenizer
from ouro_megatron.errors import DataError

_VERSION = 1
"""Enters every key: raise it when the output for the same input changes."""


class Watcher(Protocol):
    """Is told how the work goes on."""

    def begin(self, what: str, total: int) -> None: ...

    def advance(self, amount: int) -> None: ...

    def say(self, line: str) -> None: ...


def load_data_recipe(path: Path) -> DataRecipe:
    """Raises DataError listing every problem with its key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return DataRecipe.model_validate(values)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise DataError("\n".join(lines)) from error


def prepare(recipe: DataRecipe, watcher: Watcher, *, workers: int, force: bool = False) -> list[Path]:
    """Makes all that is missing or out of date; returns the prefixes of the recipe, training and held out.

    Raises DataError naming the source and file that cannot be used, and on a full disk.
    """
    try:
        return _prepare(recipe, watcher, workers, force)
    except OSError as error:
        raise DataError(
            f"{error.filename or recipe.output}: {error.strerror or error}. What was finished is kept; run it again"
        ) from error


def _prepare(recipe: DataRecipe, watcher: Watcher, workers: int, force: bool) -> list[Path]:
    units = {source.name: source.units(recipe.shard_bytes) for source in recipe.sources}
    keys = {source.name: _source_key(source, units[source.name]) for source in recipe.sources}
    _tokenizer(recipe, keys, watcher, force)
    tokenizer = load_tokenizer(recipe.tokenizer_folder)
    jobs = [_Job(recipe, source, tokenizer, units[source.name], keys[source.name]) for source in recipe.sources]
    for job in jobs:
        if not force and job.is_current():
            watcher.say(f"{job.source.name}: up to date")
            continue
        if force:
            shutil.rmtree(job.parts, ignore_errors=True)
        _run_shards(job, watcher, workers)
        for prefix, split in job.outputs():
            _merge(job, prefix, split)
            watcher.say(_summary(prefix))
        shutil.rmtree(job.parts, ignore_errors=True)
    shutil.rmtree(recipe.output / ".parts", ignore_errors=True)
    return [prefix for job in jobs for prefix, _ in job.outputs()]


def _source_key(source: AnySource, units: Sequence[Unit]) -> str:
    """Changes when the source's settings or any of its units (path, range, size, stamp) do."""
    digest = hashlib.sha256(f"{_VERSION}\n{source!r}\n".encode())
    for unit in units:
        digest.update(f"{unit!r}\n".encode())
    return digest.hexdigest()


def _tokenizer(recipe: DataRecipe, keys: dict[str, str], watcher: Watcher, force: bool) -> None:
    settings, folder = recipe.tokenizer, recipe.tokenizer_folder
    if not isinstance(settings, TrainTokenizer):
        return
    text = json.dumps([settings.model_dump(), keys, recipe.validation_fraction], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    if not force and folder.is_dir() and _made_from(folder) == key:
        watcher.say(f"{folder}: up to date")
        return
    watcher.begin(f"training a tokenizer of {settings.vocab}", 0)
    train_tokenizer(recipe, settings, folder, key)
    watcher.say(f"{folder}: {settings.vocab} tokens")


def _made_from(folder: Path) -> str | None:
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("made_from")
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class _Job:
    """One source of a recipe."""

    recipe: DataRecipe
    source: AnySource
    tokenizer: TextTokenizer
    units: Sequence[Unit]
    source_key: str

    @property
    def key(self) -> str:
        parts = [self.source_key, self.tokenizer.sha256, repr(self.recipe.validation_fraction)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def parts(self) -> Path:
        """Work in progress; the key in its name keeps shards of other settings out."""
        return self.recipe.output / ".parts" / f"{self.source.name}-{self.key[:16]}-{self.recipe.shard_bytes}"

    def outputs(self) -> Iterator[tuple[Path, str]]:
        yield self.recipe.output / self.source.name, "train"
        if self.recipe.validation_fraction > 0:
            yield self.recipe.output / f"{self.source.name}-validation", "validation"

    def is_current(self) -> bool:
        return all(self._is_whole(prefix) for prefix, _ in self.outputs())

    def _is_whole(self, prefix: Path) -> bool:
        manifest = read_manifest(prefix)
        if manifest is None or manifest.get("key") != self.key:
            return False
        return all(
            with_suffix(prefix, suffix).is_file()
            and with_suffix(prefix, suffix).stat().st_size == manifest[suffix[1:]]["bytes"]
            for suffix in (".bin", ".idx")
        )

    def tasks(self) -> list[ShardTask]:
        groups = group_units(self.units, self.recipe.shard_bytes)
        return [
            ShardTask(
                self.source,
                group,
                self.parts / f"{number:06d}",
                self.recipe.tokenizer_folder,
                self.recipe.validation_fraction,
            )
            for number, group in enumerate(groups)
        ]


def _run_shards(job: _Job, watcher: Watcher, workers: int) -> None:
    tasks = job.tasks()
    left = [task for task in tasks if not task.is_done]
    watcher.begin(f"tokenising {job.source.name}", sum(_bytes(task) for task in tasks))
    watcher.advance(sum(_bytes(task) for task in tasks if task.is_done))
    if workers == 1 or len(left) <= 1:
        for task in left:
            tokenise_shard(task)
            watcher.advance(_bytes(task))
        return
    # Spawned, not forked: the tokenizer's threads of this process would be lost in a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(left)), mp_context=context) as pool:
        pending = {pool.submit(tokenise_shard, task): task for task in left}
        try:
            for future in as_completed(pending):
                future.result()
                watcher.advance(_bytes(pending[future]))
        except BrokenProcessPool as error:
            raise DataError(
                f"source {job.source.name}: a worker process was killed (out of memory? use fewer --workers or a "
                "smaller shard_bytes); finished shards are kept, run it again"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _bytes(task: ShardTask) -> int:
    return sum(unit.size for unit in task.units)


def _merge(job: _Job, prefix: Path, split: str) -> None:
    """Joins the shards into one pair; its manifest, written last, is what makes it current."""
    with_suffix(prefix, ".manifest.json").unlink(missing_ok=True)
    vocab = job.tokenizer.vocab_size
    dtype = token_dtype(vocab)
    with PairWriter(prefix, dtype) as writer:
        for task in job.tasks():
            writer.append(task.prefix(split))
    if not writer.lengths:
        raise DataError(f"{prefix}: no document fell into this split; change validation_fraction or add documents")
    counts = token_counts(prefix, dtype, vocab)
    manifest: dict[str, Any] = {
        "key": job.key,
        "source": job.source.name,
        "split": split,
        "documents": len(writer.lengths),
        "tokens": writer.tokens,
        "unigram_entropy": entropy_of(counts),
        "tokenizer": {"path": str(job.recipe.tokenizer_folder), "sha256": job.tokenizer.sha256, "vocab": vocab},
    }
    for suffix in (".bin", ".idx"):
        file = with_suffix(prefix, suffix)
        manifest[suffix[1:]] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    partial = with_suffix(prefix, ".manifest.json.part")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(with_suffix(prefix, ".manifest.json"))


def _summary(prefix: Path) -> str:
    manifest = read_manifest(prefix) or {}
    return (
        f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"unigram entropy {manifest['unigram_entropy']:.3f} nats"
    )
