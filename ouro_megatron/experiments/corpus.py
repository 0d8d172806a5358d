"""The data of an experiment on disk: tokenizer, training pair, test sets, and a page of facts about them.

FOLDER/tokenizer/        one word a token
FOLDER/train.bin .idx .loss.bin    one example a document; the loss mask is on the answers
FOLDER/test.bin ..       all test sets as one pair, for the trainer's held-out loss
FOLDER/tests.json        test sets by name: prompts and answers as token ids
FOLDER/facts.json        counts, overlap, source
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.writer import PairWriter, token_dtype
from ouro_megatron.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE
from ouro_megatron.errors import DataError
from ouro_megatron.experiments.tasks.examples import BOS, Examples, batches
from ouro_megatron.experiments.tasks.registry import make_task
from ouro_megatron.experiments.tasks.task import Task

_AT_ONCE = 1 << 17
"""Examples drawn at one time."""
FACTS = "facts.json"


@dataclass(frozen=True)
class Corpus:
    """Where the data of some cells lies."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def test(self) -> Path:
        """All test sets; not there when the task has none."""
        return self.folder / "test"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def facts(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / FACTS).read_text(encoding="utf-8")))

    def tests(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """(prompt, answer) of every test example by test set."""
        return dict(json.loads((self.folder / "tests.json").read_text(encoding="utf-8")))


def corpus_folder(root: Path, task: dict[str, Any], examples: int, test_examples: int) -> Path:
    """Where the data of a task with these numbers belongs: other settings, another folder."""
    text = json.dumps([task, examples, test_examples], sort_keys=True)
    return root / f"{task.get('kind', 'task')}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def make_corpus(root: Path, values: dict[str, Any], examples: int, test_examples: int, seed: int = 0) -> Corpus:
    """The data of a task, generated when it is not there yet. Either all of it appears or nothing.

    The same values give the same bytes. Raises RecipeError for a task that cannot be, DataError when the disk is full.
    """
    folder = corpus_folder(root, values, examples, test_examples)
    if folder.exists():
        return Corpus(folder)
    task = make_task(values, str(folder))
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    try:
        _write_tokenizer(partial / "tokenizer", task.words)
        tests = draw_tests(task, test_examples, np.random.default_rng([seed, 1]))
        facts = _write_pairs(partial, task, tests, examples, np.random.default_rng([seed, 2]))
        listed = {name: [part.prompt_and_answer(row) for row in range(len(part))] for name, part in tests.items()}
        (partial / "tests.json").write_text(json.dumps(listed), encoding="utf-8")
        (partial / FACTS).write_text(json.dumps({"task": values, "seed": seed, **facts}, indent=1), encoding="utf-8")
        partial.chmod(0o755)
        partial.replace(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # else another process was first, and its files are the same
            raise DataError(f"{folder}: cannot be written: {os.strerror(error.errno or 0)}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Corpus(folder)


def draw_tests(task: Task, count: int, rng: np.random.Generator) -> dict[str, Examples]:
    """`count` different examples of each test set, fewer where there are not so many."""
    return {name: distinct(lambda size, name=name: task.draw_test(name, size, rng), count) for name in task.tests}


def distinct(draw: Any, count: int) -> Examples:
    """`count` different examples in the order of their first draw; fewer when ten times as many draws find no more."""
    parts, seen, found = list[Examples](), np.empty(0, np.uint64), 0
    for _ in range(10):
        drawn = draw(count)
        hashes = drawn.hashes()
        _, first = np.unique(hashes, return_index=True)
        first = np.sort(first)
        first = first[~np.isin(hashes[first], seen)][: count - found]
        parts.append(drawn[first])
        seen = np.concatenate((seen, hashes[first]))
        found += len(first)
        if found == count:
            break
    width = parts[0].tokens.shape[1]
    assert all(part.tokens.shape[1] == width for part in parts), "a test set's examples have one width"
    return Examples(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("tokens", "lengths", "prompts")))


def _write_pairs(
    folder: Path, task: Task, tests: dict[str, Examples], examples: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Writes both pairs; training leaves out every test example. Returns what there is to know about them."""
    held_out = np.unique(np.concatenate([np.empty(0, np.uint64), *(part.hashes() for part in tests.values())]))
    dtype = token_dtype(len(task.words))
    hashes, left_out = list[np.ndarray](), 0
    with PairWriter(folder / "train", dtype) as writer:
        if task.counts_all:  # whole rounds of one world: nothing is left out
            drawn = task.draw(examples, rng)
            hashes.append(drawn.hashes())
            _add(writer, task, drawn)
        else:
            while writer.documents < examples:
                wanted = next(batches(examples - writer.documents, _AT_ONCE))
                drawn = task.draw(wanted, rng)
                new = drawn.hashes()
                keep = ~np.isin(new, held_out)
                if not keep.any():
                    raise DataError(
                        f"{folder}: every training example drawn is also a test example: fewer test_examples"
                    )
                left_out += int((~keep).sum())
                hashes.append(new[keep])
                _add(writer, task, drawn[keep])
        tokens, documents = writer.tokens, writer.documents
    if tests:
        with PairWriter(folder / "test", dtype) as writer:
            for part in tests.values():
                _add(writer, task, part)
    together = np.unique(np.concatenate(hashes))
    overlap = int(np.isin(together, held_out).sum())
    if overlap:
        raise DataError(f"{folder}: {overlap} examples are in training and in a test set")
    return {
        "source": task.source,
        "vocabulary": len(task.words),
        "train_examples": documents,
        "train_tokens": tokens,
        "train_distinct": len(together),
        "left_out_because_tested": left_out,
        "test_examples": {name: len(part) for name, part in tests.items()},
        "possible_examples": {name: _shown_count(count) for name, count in task.possible.items()},
        "overlap": overlap,
    }


def _shown_count(count: int) -> int | str:
    return count if count < 10**15 else f"10^{math.log10(count):.1f}"


def _add(writer: PairWriter, task: Task, examples: Examples) -> None:
    places = examples.places
    counts = places if task.counts_all else examples.answers
    writer.add_many(examples.tokens[places], examples.lengths, counts[places])


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    """A word-level tokenizer: words are apart by spaces, and ids are the places in `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token=BOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([BOS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    (folder / CONFIG_FILE).write_text(json.dumps({"eos_token": BOS}), encoding="utf-8")
