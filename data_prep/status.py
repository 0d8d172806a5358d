"""How far the preparation of a recipe is, without doing anything."""

from dataclasses import dataclass

from data_prep.plan import SourceJob, list_units, source_jobs
from data_prep.prepare import tokenizer_is_current
from data_prep.recipe import DataRecipe
from data_prep.shards import read_result
from ouro_megatron.data.indexed import read_manifest
from ouro_megatron.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SourceStatus:
    name: str
    state: str
    """"ready", "to merge", "to tokenise"."""
    shards: int
    finished: int
    input_bytes: int
    documents: int
    """Of the pairs when ready, else of the finished shards."""
    tokens: int
    faults: int
    left_out: int


def status(recipe: DataRecipe) -> list[SourceStatus]:
    """One entry a source, in order. Raises DataError for sources that cannot be used."""
    units = list_units(recipe, saved=True)
    if not tokenizer_is_current(recipe, units):
        empty = (0, 0, 0, 0)
        return [
            SourceStatus(name, "needs the tokenizer", 0, 0, sum(unit.size for unit in found), *empty)
            for name, found in units.items()
        ]
    return [_of(job) for job in source_jobs(recipe, units, load_tokenizer(recipe.tokenizer_folder))]


def _of(job: SourceJob) -> SourceStatus:
    size = sum(task.size for task in job.tasks)
    shards = len(job.tasks)
    if job.is_current:
        manifests = [read_manifest(prefix) or {} for split in job.splits for prefix in job.prefixes(split)]
        counts = manifests[0]["source_counts"]
        documents = sum(item["documents"] for item in manifests)
        tokens = sum(item["tokens"] for item in manifests)
        left_out = sum(counts["left_out"].values())
        return SourceStatus(
            job.source.name, "ready", shards, shards, size, documents, tokens, counts["faults"], left_out
        )
    results = [read_result(task) for task in job.tasks if task.is_done]
    return SourceStatus(
        job.source.name,
        "to merge" if len(results) == shards else "to tokenise",
        shards,
        len(results),
        size,
        sum(result.work.documents for result in results),
        sum(result.work.tokens for result in results),
        sum(result.faults for result in results),
        sum(sum(result.left_out.values()) for result in results),
    )
