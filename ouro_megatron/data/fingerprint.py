"""What a run was trained on, small enough for every checkpoint, and the check that a resumed run reads the same."""

from collections.abc import Sequence
from typing import Any

from ouro_megatron.data.indexed import check_prefix, read_manifest, sha256_of, with_suffix
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import BlendEntry

_RUN_FIELDS = {
    "sequence_length": "data.sequence_length",
    "seed": "training.seed",
    "tokenizer_sha256": "the tokenizer (data.tokenizer)",
    "mask_end_of_document": "data.mask_end_of_document",
}
_SOURCE_FIELDS = {
    "weight": "its weight",
    "tokens": "its token count",
    "documents": "its document count",
    "bin_bytes": "the size of its .bin",
    "idx_sha256": "the content of its .idx",
    "bin_sha256": "the content of its .bin (by its manifest)",
}


def blend_fingerprint(
    entries: Sequence[BlendEntry],
    *,
    sequence_length: int,
    seed: int,
    tokenizer: TextTokenizer,
    mask_end_of_document: bool = False,
) -> dict[str, Any]:
    """All that decides which sample is number k, ready for JSON.

    The .idx files are read and hashed, the .bin files are not: their size is kept, and their hash where a manifest
    names it. Paths are kept for messages only, so data may move. Call it on one rank. Raises DataError as
    `check_prefix` does.
    """
    return {
        "sequence_length": sequence_length,
        "seed": seed,
        "tokenizer_sha256": tokenizer.sha256,
        "mask_end_of_document": mask_end_of_document,
        "sources": [_source(entry, tokenizer.vocab_size) for entry in entries],
    }


def _source(entry: BlendEntry, vocab: int) -> dict[str, Any]:
    info = check_prefix(entry.path, vocab)
    manifest = read_manifest(entry.path)
    return {
        "path": str(entry.path),
        "weight": entry.share,
        "tokens": info.tokens,
        "documents": info.documents,
        "bin_bytes": info.bin_bytes,
        "idx_sha256": sha256_of(with_suffix(entry.path, ".idx")),
        "bin_sha256": None if manifest is None else manifest["bin"]["sha256"],
    }


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares a checkpoint's fingerprint with today's. Raises DataError listing every difference and its prefix."""
    problems = [
        f"{label}: was {saved.get(field)!r}, is {now.get(field)!r}"
        for field, label in _RUN_FIELDS.items()
        if saved.get(field) != now.get(field)
    ]
    before, after = saved.get("sources", []), now.get("sources", [])
    if len(before) != len(after):
        problems.append(f"number of sources: was {len(before)}, is {len(after)}")
    for old, new in zip(before, after, strict=False):
        for field, label in _SOURCE_FIELDS.items():
            if old.get(field) != new.get(field):
                problems.append(f"{new.get('path')}: {label} changed: was {old.get(field)!r}, is {new.get(field)!r}")
    if problems:
        lines = "\n  ".join(problems)
        raise DataError(
            f"the data is not what this run was trained on so far:\n  {lines}\n"
            "Restore it to go on, or start a new stage from the checkpoint (init.checkpoint)."
        )
