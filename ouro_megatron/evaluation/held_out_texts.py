"""Sequences to evaluate on: a recipe's validation blend, other .bin/.idx pairs, or plain text; and what tokens are."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ouro_megatron.checkpoint.load import InferenceModel
from ouro_megatron.data.dataset import build_dataset
from ouro_megatron.data.sampler import GlobalBatchSampler, MicrobatchReader
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import DataError
from ouro_megatron.evaluation.scores import Batch
from ouro_megatron.recipe.schema import BlendEntry

TOKEN_CLASSES = ("word start", "word rest", "number", "punctuation", "indent or newline", "other", "end of document")


def held_out_batches(
    model: InferenceModel, sequences: int, *, data: list[Path], text: list[Path], length: int | None
) -> Iterator[Batch]:
    """One sequence at a time, always the same first ones.

    From `data` (prefixes of .bin/.idx pairs) or `text` (UTF-8 files, each a document), else from the validation blend
    of the model's recipe. Raises DataError when there is nothing to evaluate on.
    """
    length = length or model.recipe.data.sequence_length
    if data and text:
        raise DataError("give --data or --text, not both")
    if text:
        return _from_text(model.tokenizer, text, sequences, length, model.context.device)
    blend = [BlendEntry(path=path, weight=1.0) for path in data] or list(model.recipe.data.validation)
    if not blend:
        raise DataError(
            f"{model.folder}: its recipe names no data.validation; give --data PREFIX (a .bin/.idx pair) or --text FILE"
        )
    return _from_pairs(model, blend, sequences, length)


def _from_pairs(model: InferenceModel, blend: list[BlendEntry], sequences: int, length: int) -> Iterator[Batch]:
    recipe = model.recipe
    with tempfile.TemporaryDirectory(prefix="ouro-indices-") as cache:
        dataset = build_dataset(
            recipe.data.model_copy(update={"validation": blend, "sequence_length": length}),
            samples=sequences,
            seed=recipe.training.seed,
            tokenizer=model.tokenizer,
            cache=Path(cache),
            split_name="validation",
        )
        reader = MicrobatchReader(dataset, GlobalBatchSampler(1), model.context.device)
        try:
            yield from reader.step(0, sequences)
        finally:
            reader.close()


def _from_text(
    tokenizer: TextTokenizer, files: list[Path], sequences: int, length: int, device: torch.device
) -> Iterator[Batch]:
    """Documents one after the other, each ended, cut into sequences; the last, short one is padded and masked."""
    ids: list[int] = []
    for file in files:
        try:
            ids += [*tokenizer.encode(file.read_text(encoding="utf-8")), tokenizer.eod]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        if len(ids) > sequences * length:
            break
    if len(ids) < 2:
        raise DataError(f"{files[0]}: no text to evaluate on")
    ids = ids[: sequences * length + 1]
    for start in range(0, len(ids) - 1, length):
        piece = ids[start : start + length + 1]
        counted = len(piece) - 1
        tokens = torch.full((1, length + 1), tokenizer.eod)
        tokens[0, : len(piece)] = torch.tensor(piece)
        mask = (torch.arange(length) < counted).float()[None]
        yield {
            "tokens_bs": tokens[:, :-1].to(device),
            "labels_bs": tokens[:, 1:].to(device),
            "loss_mask_bs": mask.to(device),
        }


def token_bytes(tokenizer: TextTokenizer, labels_n: np.ndarray) -> int:
    """Bytes of UTF-8 text that these labels stand for together; the end of a document is none."""
    used, counts = np.unique(labels_n, return_counts=True)
    return int(sum(len(_raw(tokenizer, int(token))) * int(count) for token, count in zip(used, counts, strict=True)))


def token_classes(tokenizer: TextTokenizer, labels_n: np.ndarray) -> np.ndarray:
    """Index into TOKEN_CLASSES of each label, int64 [n]."""
    used, where = np.unique(labels_n, return_inverse=True)
    kinds = np.array([TOKEN_CLASSES.index(_kind(tokenizer, int(token))) for token in used])
    return kinds[where]


def _raw(tokenizer: TextTokenizer, token: int) -> bytes:
    """The bytes of one token. Exact for byte-level vocabularies, where each letter of a token is a byte."""
    if token == tokenizer.eod:
        return b""
    piece = tokenizer.piece(token)
    if piece is not None and all(letter in _BYTE_OF for letter in piece):
        return bytes(_BYTE_OF[letter] for letter in piece)
    return tokenizer.decode([token]).encode()


def _kind(tokenizer: TextTokenizer, token: int) -> str:
    if token == tokenizer.eod:
        return "end of document"
    text = _raw(tokenizer, token).decode("utf-8", errors="replace")
    core = text.strip()
    if not core:
        return "indent or newline" if text else "other"
    if core.replace(".", "").replace(",", "").isdigit():
        return "number"
    if core[0].isalpha() or core[0] == "_":
        return "word start" if text[0].isspace() else "word rest"
    if core.isascii() and not any(letter.isalnum() for letter in core):
        return "punctuation"
    return "other"


def _byte_letters() -> dict[str, int]:
    """Letter -> byte in the byte-level alphabet that GPT-2 introduced: printable bytes stand for themselves, the others
    for letters from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_letters()
