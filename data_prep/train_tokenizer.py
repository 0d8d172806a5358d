"""Trains the byte-level BPE tokenizer of a data recipe."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from data_prep.filters import text_of
from data_prep.recipe import DataRecipe, TrainTokenizer
from data_prep.safe_cuts import parts
from data_prep.sources.base import Document, Fault, Unit
from data_prep.sources.registry import AnySource
from ouro_megatron.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE


def train_tokenizer(
    recipe: DataRecipe, settings: TrainTokenizer, units: Mapping[str, Sequence[Unit]], folder: Path, key: str
) -> None:
    """Makes `folder` with tokenizer.json and tokenizer_config.json; it appears whole or not at all.

    Only documents of the training split are read, up to `sample_bytes` over all sources. What cannot be read is passed
    over: it is counted when the shards are made.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab,
        special_tokens=list(dict.fromkeys([settings.end_of_document, *settings.special_tokens])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(recipe, units, settings.sample_bytes), trainer)
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(str(partial / TOKENIZER_FILE))
    config = {"eos_token": settings.end_of_document, "tokenizer_class": "PreTrainedTokenizerFast", "made_from": key}
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


def _sample(recipe: DataRecipe, units: Mapping[str, Sequence[Unit]], sample_bytes: int) -> Iterator[str]:
    for source in recipe.sources:
        limit = sample_bytes // len(recipe.sources)
        yield from _sample_of(source, units[source.name], limit, recipe.validation_fraction)


def _sample_of(source: AnySource, units: Sequence[Unit], limit: int, held_out: float) -> Iterator[str]:
    """Every k-th unit, so that a small sample still sees all of the source."""
    stride = max(1, sum(unit.size for unit in units) // limit)
    seen = 0
    with TemporaryDirectory() as folder:
        source = source.with_scratch(Path(folder))
        for unit in units[::stride]:
            for document in source.read(unit, _overlook):
                if document.is_below(held_out):
                    continue
                for text in _texts(document):
                    try:
                        seen += len(text.encode())
                    except UnicodeEncodeError:
                        continue
                    if seen > limit:
                        return
                    yield text


def _texts(document: Document) -> Iterator[str]:
    """The document, cut where that changes no word when it is long."""
    if document.long_text is None:
        yield text_of(document)
    else:
        yield from parts(document.long_text.pieces())


def _overlook(fault: Fault) -> None:
    """Faults are the business of the shards."""
