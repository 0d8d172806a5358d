"""Real text for benchmarks/tokenise.py: what a machine has on disk, cut into documents of the web's size."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOD = "<|endoftext|>"
_SUFFIXES = {".py", ".md", ".rst", ".txt", ".html", ".htm", ".json", ".js", ".css", ".c", ".h", ".pyi", ".po", ".yaml"}


def texts(folders: list[Path], seed: int = 0) -> Iterator[str]:
    """UTF-8 text files below the folders in a mixed order, without those that spell a special token.

    Those are left out because the tools do not agree on them: Megatron's script and datatrove turn the spelling into
    the special id, `ouro data prepare` keeps it text.
    """
    files = []
    for folder in folders:
        for place, _, names in os.walk(folder):
            files += [Path(place, name) for name in names if Path(name).suffix in _SUFFIXES]
    random.Random(seed).shuffle(sorted_files := sorted(files))
    for file in sorted_files:
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and "<|" not in text and len(text) < 2_000_000:
            yield text


def documents(folders: list[Path], megabytes: float, characters: int | None = None) -> Iterator[str]:
    """Documents of 1,000 to 8,000 characters cut at line ends, or of about `characters`, `megabytes` in all."""
    choose = random.Random(1)
    left = int(megabytes * 1e6)
    pieces: list[str] = []
    size, wanted = 0, characters or choose.randrange(1000, 8000)
    while left > 0:
        for text in texts(folders):
            for line in text.splitlines(keepends=True):
                pieces.append(line)
                size += len(line)
                if size < wanted:
                    continue
                document = "".join(pieces)
                yield document
                left -= len(document.encode())
                if left <= 0:
                    return
                pieces, size, wanted = [], 0, characters or choose.randrange(1000, 8000)


def write_corpus(
    folder: Path, folders: list[Path], megabytes: float, files: int = 2, characters: int | None = None
) -> list[Path]:
    """JSON lines in `files` files of about the same size; returns them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.jsonl" for number in range(files)]
    each, number, written = megabytes * 1e6 / files, 0, 0
    stream = paths[0].open("w", encoding="utf-8")
    for document in documents(folders, megabytes, characters):
        if written >= each * (number + 1) and number + 1 < files:
            stream.close()
            number += 1
            stream = paths[number].open("w", encoding="utf-8")
        stream.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        written += len(document.encode())
    stream.close()
    return paths


def train_tokenizer(folder: Path, folders: list[Path], vocab: int = 49_152, megabytes: float = 30) -> Path:
    """A byte-level BPE with isolated digits, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(folders, megabytes), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": EOD, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
