"""From sources to training data: tokenizer, shards in parallel, pairs for Megatron, a manifest last.

Every piece of work leaves a mark when it is whole. A run that was killed goes on at the next shard; a run with nothing
to do reads a few small files and says so. One machine does it all with `prepare`; many machines share the shards with
`prepare(shard=(i, N))`, and one of them joins the result with `merge_all`.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_prep.dedup import find_duplicates
from data_prep.encode import open_tokenizer, why_slow
from data_prep.explain import explain
from data_prep.faults import FaultBudget, faults_file, write_faults
from data_prep.lock import locked
from data_prep.merge import merge, plan_merge
from data_prep.plan import FILES, SourceJob, digest_of, find_prefixes, list_units, share, source_jobs, stale_jobs
from data_prep.progress import Tracker, Watcher
from data_prep.recipe import DataRecipe, TrainTokenizer
from data_prep.shards import ShardResult, read_result, tokenise_shard
from data_prep.sources.base import Unit
from data_prep.train_tokenizer import train_tokenizer
from ouro_megatron.data.indexed import MAX_BLEND, read_manifest, with_suffix
from ouro_megatron.data.tokenizer import CONFIG_FILE
from ouro_megatron.errors import DataError

Units = dict[str, list[Unit]]


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
        raise DataError(explain(error, path, DataRecipe)) from error


def prepare(
    recipe: DataRecipe,
    watcher: Watcher,
    *,
    workers: int,
    force: bool = False,
    shard: tuple[int, int] | None = None,
) -> list[Path]:
    """Makes all that is missing or out of date; returns the prefixes of the recipe, training and held out.

    `shard`: (i, N) with 0 <= i < N, works on every N-th shard only and merges nothing; returns no prefixes then.
    Raises DataError naming the source and file that cannot be used, too many faults, or a full disk.
    """
    with _disk_errors(recipe), locked(recipe.output / ".parts", shared=shard is not None):
        if force and shard is None:
            shutil.rmtree(recipe.output / ".parts", ignore_errors=True)
        units = list_units(recipe, saved=shard is not None)
        if shard is None:
            make_tokenizer(recipe, units, watcher, force)
        elif recipe.tokenizer_folder.exists() and not tokenizer_is_current(recipe, units):
            watcher.say(f"{recipe.tokenizer_folder}: trained on other files or settings, used as it is")
        jobs = _jobs(recipe, units)
        stale = jobs if force else _stale(jobs, watcher)
        _tokenise(stale, watcher, workers, shard)
        if shard is not None:
            if stale:
                watcher.say(_after_share(stale, shard))
            return []
        _merge(jobs, stale, watcher, workers)
        _clean(recipe, jobs)
    return _prefixes(jobs)


def _after_share(stale: Sequence[SourceJob], shard: tuple[int, int]) -> str:
    """What is left to do after a share, of all that was to be made."""
    tasks = [task for job in stale for task in job.tasks]
    missing = sum(not task.is_done for task in tasks)
    rest = f"{missing:,} of {len(tasks):,} shards are not there yet" if missing else "all shards are there"
    return f"share {shard[0]} of {shard[1]} is done; {rest}" + ("" if missing else ": `ouro data merge` joins them")


def merge_all(recipe: DataRecipe, watcher: Watcher, *, workers: int) -> list[Path]:
    """Joins shards that were all made before. Raises DataError naming those that are missing."""
    with _disk_errors(recipe), locked(recipe.output / ".parts", shared=False):
        jobs = _jobs(recipe, list_units(recipe, saved=True))
        stale = _stale(jobs, watcher)
        missing = [task for job in stale for task in job.tasks if not task.is_done]
        if missing:
            shown = "".join(f"\n  {task.label}" for task in missing[:20]) + ("\n  ..." if len(missing) > 20 else "")
            raise DataError(
                f"{recipe.output}: {len(missing):,} of {sum(len(job.tasks) for job in stale):,} shards are not "
                f"tokenised yet. Run `ouro data prepare` with --slurm or the missing --shard again:{shown}"
            )
        _merge(jobs, stale, watcher, workers)
        _clean(recipe, jobs)
    return _prefixes(jobs)


def pending_shards(recipe: DataRecipe, units: Units, count: int) -> tuple[list[int], bool]:
    """(numbers i of the shares i of `count` that have work left, whether anything is left to merge)."""
    jobs = _jobs(recipe, units)
    stale = stale_jobs(jobs)
    tasks = [task for job in stale for task in job.tasks]
    left = [i for i in range(count) if any(not task.is_done for task in share(tasks, (i, count)))]
    return left, bool(stale)


def make_tokenizer(recipe: DataRecipe, units: Units, watcher: Watcher, force: bool = False) -> None:
    """Trains the recipe's tokenizer unless it is there and of the same sources; does nothing for an existing one."""
    settings, folder = recipe.tokenizer, recipe.tokenizer_folder
    if not isinstance(settings, TrainTokenizer):
        return
    if not force and tokenizer_is_current(recipe, units):
        watcher.say(f"{folder}: up to date")
        return
    watcher.say(f"training a tokenizer of {settings.vocab:,}")
    train_tokenizer(recipe, settings, units, folder, _tokenizer_key(recipe, units))
    watcher.say(f"{folder}: {settings.vocab:,} tokens")


def tokenizer_is_current(recipe: DataRecipe, units: Units) -> bool:
    """Whether the tokenizer that the recipe asks for is there. An existing one always is."""
    if not isinstance(recipe.tokenizer, TrainTokenizer):
        return True
    try:
        config = json.loads((recipe.tokenizer_folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("made_from") == _tokenizer_key(recipe, units))


def _tokenizer_key(recipe: DataRecipe, units: Units) -> str:
    files = {name: list(dict.fromkeys((unit.path, unit.stamp) for unit in found)) for name, found in units.items()}
    sources = [source.model_dump(mode="json") for source in recipe.sources]
    return digest_of(recipe.tokenizer.model_dump(mode="json"), sources, files, recipe.validation_fraction)


def _jobs(recipe: DataRecipe, units: Units) -> list[SourceJob]:
    if isinstance(recipe.tokenizer, TrainTokenizer) and not recipe.tokenizer_folder.exists():
        raise DataError(
            f"{recipe.tokenizer_folder}: not trained yet. Shares of one recipe need one tokenizer: run "
            "`ouro data tokenizer` with the recipe once, before them"
        )
    return source_jobs(recipe, units, open_tokenizer(recipe.tokenizer_folder)[0])


def _stale(jobs: Sequence[SourceJob], watcher: Watcher) -> list[SourceJob]:
    stale = stale_jobs(jobs)
    for job in jobs:
        if job not in stale:
            watcher.say(f"{job.source.name}: up to date")
    return stale


def _tokenise(jobs: Sequence[SourceJob], watcher: Watcher, workers: int, shard: tuple[int, int] | None) -> None:
    owners = {task.folder: job for job in jobs for task in job.tasks}
    tasks = list(share([task for job in jobs for task in job.tasks], shard))
    budgets = {job.source.name: FaultBudget(job) for job in jobs}

    def add(task: Any, result: ShardResult) -> None:
        budgets[owners[task.folder].source.name].add(task, result)

    for task in tasks:
        if task.is_done:
            add(task, read_result(task))
    left = [task for task in tasks if not task.is_done]
    if left:
        _say_when_slow(owners[left[0].folder].recipe.tokenizer_folder, watcher)
        tracker = Tracker("tokenising", watcher, total=sum(task.size for task in tasks))
        tracker.skip(sum(task.size for task in tasks) - sum(task.size for task in left))
        tracker.run(tokenise_shard, left, workers, add)


def _say_when_slow(tokenizer: Path, watcher: Watcher) -> None:
    why = why_slow(tokenizer)
    if why is not None:
        watcher.say(f"{tokenizer}: `tokenizers` does the work, not the much faster path: {why}")


def _merge(jobs: Sequence[SourceJob], stale: Sequence[SourceJob], watcher: Watcher, workers: int) -> None:
    if not stale:
        return
    duplicates = _duplicates(jobs, watcher)
    starts = [0, *accumulate(len(job.tasks) for job in jobs)]
    tasks = []
    for job, first in zip(jobs, starts, strict=False):
        if job not in stale:
            continue
        results = [read_result(task) for task in job.tasks]
        budget = FaultBudget(job)
        for task, result in zip(job.tasks, results, strict=True):
            budget.add(task, result)
        planned = plan_merge(job, results, duplicates, first)
        write_faults(faults_file(job), job.tasks)
        _remove_stale(job, {task.prefix for task in planned})
        tasks.extend(planned)
    count = len(tasks) + sum(len(job.prefixes(split)) for job in jobs if job not in stale for split in job.splits)
    if count > MAX_BLEND:
        raise DataError(
            f"{jobs[0].recipe.output}: {count:,} pairs; a blend takes {MAX_BLEND:,} at most. "
            "Raise max_prefix_tokens or max_prefix_documents"
        )
    left = [task for task in tasks if not task.is_done]
    tracker = Tracker("merging", watcher, total=sum(task.size for task in left))
    tracker.run(merge, left, workers, lambda task, manifest: watcher.say(_summary(task.prefix, manifest)))
    for job in stale:
        if job.recipe.keep_parts:
            _remove_old_parts(job)
        else:
            shutil.rmtree(job.parts, ignore_errors=True)


def _duplicates(jobs: Sequence[SourceJob], watcher: Watcher) -> Path | None:
    """The folder that says which documents are duplicates; None when nobody asked."""
    recipe = jobs[0].recipe
    if not recipe.filters.exact_dedup:
        return None
    hashes = [task.hashes for job in jobs for task in job.tasks if task.hashes is not None]
    folder = recipe.output / ".parts" / f"duplicates-{digest_of([path.name for path in hashes])[:16]}"
    if not (folder / "counts.json").is_file():
        watcher.say("looking for duplicates")
        find_duplicates(hashes, folder)
    counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    watcher.say(f"{sum(counts.values()):,} duplicates left out")
    return folder


def _remove_stale(job: SourceJob, wanted: set[Path]) -> None:
    """Pairs of this source under names that it does not have any more."""
    for split in ("train", "validation"):
        for prefix in find_prefixes(job.recipe.output, job.source.name, split):
            if prefix not in wanted and (read_manifest(prefix) or {}).get("source") == job.source.name:
                for suffix in (".manifest.json", *FILES):
                    with_suffix(prefix, suffix).unlink(missing_ok=True)


def _remove_old_parts(job: SourceJob) -> None:
    """Shards that are not of the source any more, and what killed processes left behind."""
    wanted = {task.folder.name for task in job.tasks}
    for folder in job.parts.iterdir():
        if folder.name not in wanted:
            shutil.rmtree(folder, ignore_errors=True)


def _clean(recipe: DataRecipe, jobs: Sequence[SourceJob]) -> None:
    """Shards of sources that are not in the recipe any more, plans, hashes nobody asks for."""
    if not recipe.keep_parts:
        shutil.rmtree(recipe.output / ".parts", ignore_errors=True)
    wanted = {task.hashes for job in jobs for task in job.tasks}
    folder = recipe.output / ".hashes"
    for file in list(folder.iterdir()) if folder.is_dir() else []:
        if file not in wanted:
            file.unlink(missing_ok=True)
    if folder.is_dir() and not recipe.filters.exact_dedup:
        folder.rmdir()


def _prefixes(jobs: Sequence[SourceJob]) -> list[Path]:
    return [prefix for job in jobs for split in job.splits for prefix in job.prefixes(split)]


def _summary(prefix: Path, manifest: dict[str, Any]) -> str:
    counts = manifest["source_counts"]
    lost = [f"{count:,} {name}" for name, count in counts["left_out"].items()]
    lost += [f"{counts['faults']:,} with faults"] if counts["faults"] else []
    of_source = f" (of its source left out: {', '.join(lost)})" if lost else ""
    return (
        f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"unigram entropy {manifest['unigram_entropy']:.3f} nats{of_source}"
    )


@contextmanager
def _disk_errors(recipe: DataRecipe) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or recipe.output}: {error.strerror or error}. What was finished is kept; run it again"
        ) from error
