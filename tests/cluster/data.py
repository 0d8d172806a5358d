"""Tiny data wherever a pipeline's recipes look for theirs."""

from pathlib import Path

from ouro_megatron.cluster.pipeline import Pipeline
from tests.tiny import write_corpus, write_tokenizer


def write_data(pipeline: Pipeline, documents: int = 12) -> None:
    """Corpora and tokenizers at every path that the pipeline's recipes name, relative to the current folder."""
    for job in pipeline.jobs:
        if job.recipe is None:
            continue
        data = job.recipe.data
        if not data.tokenizer.exists():
            write_tokenizer(data.tokenizer)
        for number, entry in enumerate([*data.train, *data.validation]):
            if not Path(f"{entry.path}.idx").exists():
                write_corpus(entry.path, documents=documents, seed=number)
