"""The tokenizer's part of an exported folder, and of a checkpoint made from one."""

import json
import shutil
from pathlib import Path
from typing import Any

from ouro_megatron.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, load_tokenizer
from ouro_megatron.errors import DataError

CHAT_TEMPLATE = "chat_template.jinja"
_OTHERS = (CHAT_TEMPLATE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_END_OF_TURN = "<|im_end|>"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer folder's files into `target` as they are. Raises DataError when there is no tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER_FILE, CONFIG_FILE, *_OTHERS):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    load_tokenizer(target)


def write_tokenizer(
    source: Path, target: Path, *, vocab: int, max_positions: int, chat_template: Path | None = None
) -> dict[str, Any]:
    """Writes the tokenizer at `source` into an exported folder; returns bos_token_id, eos_token_id and pad_token_id.

    What transformers needs and training does not is filled in: the end of document also begins a document and pads,
    padding goes on the left, as generation wants it. With a chat template the end of a turn ends generation too.
    Raises DataError for a missing tokenizer, ids beyond `vocab`, or an unreadable template.
    """
    tokenizer = load_tokenizer(source, model_vocab=vocab)
    folder = source if source.is_dir() else source.parent
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / TOKENIZER_FILE, target / TOKENIZER_FILE)
    for name in _OTHERS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config.pop("made_from", None)
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.eod_token,
        "pad_token": tokenizer.eod_token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    config = {**defaults, **config, "model_max_length": max_positions}
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template = _template(target, config, chat_template)
    backend = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    ids = {token["content"]: int(token["id"]) for token in backend.get("added_tokens", [])}
    ends = [tokenizer.eod]
    if template is not None and _END_OF_TURN in template and ids.get(_END_OF_TURN, tokenizer.eod) != tokenizer.eod:
        ends.append(ids[_END_OF_TURN])
    special = {key: ids.get(_text(config[key]), tokenizer.eod) for key in ("bos_token", "pad_token")}
    return {
        "bos_token_id": special["bos_token"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": special["pad_token"],
    }


def _template(target: Path, config: dict[str, Any], given: Path | None) -> str | None:
    """The chat template of the exported folder: `given`, the tokenizer's own file, or the one in its config."""
    try:
        if given is not None:
            shutil.copyfile(given, target / CHAT_TEMPLATE)
        if (target / CHAT_TEMPLATE).is_file():
            return (target / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat template {given}: cannot be read ({error})") from error
    inside = config.get("chat_template")
    return inside if isinstance(inside, str) else None


def _text(token: Any) -> str | None:
    """Hugging Face writes a special token as a string or as {"content": string, ...}."""
    return token.get("content") if isinstance(token, dict) else token
