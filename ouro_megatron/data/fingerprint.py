"""What a run was trained on, small enough for every checkpoint, and the check that a resumed run reads the same."""

from typing import Any

from ouro_megatron.data.indexed import check_prefix, read_manifest, sha256_of, with_suffix
from ouro_megatron.data.packing import VERSION
from ouro_megatron.data.tokenizer import TextTokenizer
from ouro_megatron.data.tokens import LOSS_SUFFIX
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import BlendEntry, DataSection

_RUN_FIELDS = {
    "sequence_length": "data.sequence_length",
    "seed": "training.seed",
    "tokenizer_sha256": "the tokenizer (data.tokenizer)",
    "mask_end_of_document": "data.mask_end_of_document",
    "packing": "data.packing",
    "long_documents": "data.long_documents",
    "document_mask": "data.document_mask",
    "packing_version": "the way documents are packed",
}
_DEFAULTS = {"packing": "none", "document_mask": False}
"""Of fields that older fingerprints do not have; None otherwise."""
_SOURCE_FIELDS = {
    "weight": "its weight",
    "tokens": "its token count",
    "documents": "its document count",
    "bin_bytes": "the size of its .bin",
    "idx_sha256": "the content of its .idx",
    "bin_sha256": "the content of its .bin (by its manifest)",
    "loss_bytes": "the size of its loss mask",
    "loss_sha256": "the content of its loss mask (by its manifest)",
}


def blend_fingerprint(settings: DataSection, *, seed: int, tokenizer: TextTokenizer) -> dict[str, Any]:
    """All that decides which sample of `settings.train` is number k, ready for JSON.

    The .idx files are read and hashed, the .bin files and loss masks are not: their sizes are kept, and their hashes
    where a manifest names them. Paths are kept for messages only, so data may move. Call it on one rank. Raises
    DataError as `check_prefix` does.
    """
    return {
        "sequence_length": settings.sequence_length,
        "seed": seed,
        "tokenizer_sha256": tokenizer.sha256,
        "mask_end_of_document": settings.mask_end_of_document,
        "packing": settings.packing,
        "long_documents": settings.long_documents,
        "document_mask": settings.masks_documents,
        "packing_version": None if settings.packing == "none" else VERSION,
        "sources": [_source(entry, tokenizer.vocab_size) for entry in settings.train],
    }


def _source(entry: BlendEntry, vocab: int) -> dict[str, Any]:
    info = check_prefix(entry.path, vocab)
    manifest = read_manifest(entry.path) or {}
    loss = with_suffix(entry.path, LOSS_SUFFIX)
    return {
        "path": str(entry.path),
        "weight": entry.share,
        "tokens": info.tokens,
        "documents": info.documents,
        "bin_bytes": info.bin_bytes,
        "idx_sha256": sha256_of(with_suffix(entry.path, ".idx")),
        "bin_sha256": manifest["bin"]["sha256"] if manifest else None,
        "loss_bytes": loss.stat().st_size if loss.exists() else None,
        "loss_sha256": (manifest.get("loss") or {}).get("sha256"),
    }


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares a checkpoint's fingerprint with today's. Raises DataError listing every difference and its prefix."""
    problems = [
        f"{label}: was {was!r}, is {now.get(field)!r}"
        for field, label in _RUN_FIELDS.items()
        if (was := saved.get(field, _DEFAULTS.get(field))) != now.get(field)
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
