"""Proof on a user's own text that the fast encoder gives the ids of `tokenizers`."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.encode import BatchEncoder, Encoded, PlainEncoder, choose_encoder, same_ids
from data_prep.long_text import decode
from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from ouro_megatron.errors import DataError

_PIECE = 1 << 23
"""Bytes of a file that are one text, at most."""
_BATCH_CHARACTERS = 500_000


Progress = Callable[[int, int], None]
"""Is told the bytes of text compared so far, and the bytes of all files."""


@dataclass
class Compared:
    """What was compared, and the processor time of each side in seconds."""

    files: int = 0
    bytes: int = 0
    tokens: int = 0
    not_text: int = 0
    """Files that are not UTF-8, which were passed over."""
    fast_seconds: float = 0.0
    plain_seconds: float = 0.0


def check_tokenizer(tokenizer_folder: Path, paths: Iterable[Path], progress: Progress, limit: int | None = None) -> str:
    """Encodes every UTF-8 file below `paths`, up to `limit` bytes, each as one text or a few, with both encoders.

    Returns a summary; one line with the reason when the tokenizer takes the slow path, where there is nothing to
    compare. Raises DataError for a path without text, and with file and place at the first id that differs.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the rates are those of one core
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder, why = choose_encoder(tokenizer)
    if why is not None:
        return f"{tokenizer_folder}: takes the slow path, which is `tokenizers` itself: {why}"
    files = [file for path in paths for file in _files(path)]
    total = sum(file.stat().st_size for file in files)
    total = total if limit is None else min(total, limit)
    found = Compared()
    for batch in _batches(files, limit, found):
        _compare(tokenizer, encoder, batch, found)
        progress(found.bytes, total)
    if not found.bytes:
        raise DataError(f"no UTF-8 text in {len(files)} files")
    return _summary(tokenizer_folder, found)


def _files(path: Path) -> list[Path]:
    """All files below a folder in order, without links and hidden ones, or the file itself."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        entries = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        found += [entry for entry in entries if entry.is_file() and not entry.is_symlink()]
    return found


def _batches(files: list[Path], limit: int | None, found: Compared) -> Iterator[list[tuple[Path, str]]]:
    batch: list[tuple[Path, str]] = []
    characters = 0
    for file in files:
        try:
            for text, size in _texts(file, None if limit is None else limit - found.bytes):
                found.bytes += size
                batch.append((file, text))
                characters += len(text)
                if characters >= _BATCH_CHARACTERS:
                    yield batch
                    batch, characters = [], 0
            found.files += 1
        except UnicodeDecodeError:
            found.not_text += 1
        if limit is not None and found.bytes >= limit:
            break
    if batch:
        yield batch


def _texts(file: Path, limit: int | None) -> Iterator[tuple[str, int]]:
    """A file's text and bytes, up to `limit` bytes; a large one in pieces that end with a line where there is one.

    Raises UnicodeDecodeError at the first piece that is not UTF-8.
    """
    rest, left = b"", file.stat().st_size if limit is None else limit
    with file.open("rb") as stream:
        while block := stream.read(min(_PIECE, left)):
            left -= len(block)
            data = rest + block
            end = data.rfind(b"\n") + 1 or len(data)
            text, cut = decode(data[:end])
            rest = cut + data[end:]
            yield text, end - len(cut)
    text, cut = decode(rest)
    if cut and limit is None:
        cut.decode("utf-8")
    yield text, len(rest) - len(cut)


def _compare(tokenizer: TextTokenizer, encoder: BatchEncoder, batch: list[tuple[Path, str]], found: Compared) -> None:
    texts = [text for _, text in batch]
    started = time.process_time()
    fast = encoder.encode_batch(texts)
    middle = time.process_time()
    plain = PlainEncoder(tokenizer).encode_batch(texts)
    found.fast_seconds += middle - started
    found.plain_seconds += time.process_time() - middle
    found.tokens += len(plain.ids)
    if not same_ids(fast, plain):
        raise DataError(_difference(tokenizer, batch, fast, plain))


def _difference(tokenizer: TextTokenizer, batch: list[tuple[Path, str]], fast: Encoded, plain: Encoded) -> str:
    for (file, text), ours, theirs in zip(batch, _each(fast), _each(plain), strict=True):
        if ours.tolist() == theirs.tolist():
            continue
        shared = min(len(ours), len(theirs))
        at = int(np.argmin(np.append(ours[:shared] == theirs[:shared], False)))
        place = len(tokenizer.decode(theirs[:at].tolist()))
        near = text[max(0, place - 20) : place + 20]
        return (
            f"{file}: ids differ from token {at} on, near character {place}: {near!r}\n"
            f"fast path:  {ours[at : at + 8].tolist()}\ntokenizers: {theirs[at : at + 8].tolist()}"
        )
    raise AssertionError("no text differs")


def _each(encoded: Encoded) -> list[np.ndarray]:
    return np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])


def _summary(folder: Path, found: Compared) -> str:
    passed_over = f"; {found.not_text:,} files that are not UTF-8 were passed over" if found.not_text else ""
    fast, plain = (found.bytes / 1e6 / max(seconds, 1e-9) for seconds in (found.fast_seconds, found.plain_seconds))
    return (
        f"{folder}: all {found.tokens:,} ids are equal in {found.files:,} files, {found.bytes / 1e6:,.2f} MB"
        f"{passed_over}\n"
        f"on one core: {fast:,.1f} MB/s, `encode_batch_fast` {plain:,.1f} MB/s: {fast / plain:,.1f} times as fast"
    )
