"""Where the time of one worker goes: each stage of a shard run alone over the same text."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_prep.byte_level import ByteLevelEncoder
from data_prep.formats.files import File
from data_prep.formats.lines import parse_object, read_lines
from data_prep.shards import content_hash, refuse
from data_prep.sources.base import Document
from data_prep.writer import PairWriter, token_dtype
from ouro_megatron.data.tokenizer import load_tokenizer

T = TypeVar("T")


def stages(path: Path, tokenizer_folder: Path) -> None:
    """Prints processor time by stage, in nanoseconds a byte of text."""
    loaded = load_tokenizer(tokenizer_folder)
    encoder = ByteLevelEncoder(loaded)
    seconds: dict[str, float] = {}
    unit = File(str(path), path.stat().st_size, "").unit()

    def timed(name: str, work: Callable[[], T]) -> T:
        started = time.process_time()
        found = work()
        seconds[name] = time.process_time() - started
        return found

    lines = timed("read and cut into lines", lambda: [line.data for line in read_lines(unit, refuse, {})])
    rows = timed("parse JSON", lambda: [parse_object(line) or {} for line in lines])
    documents = [Document(row["text"], row["text"]) for row in rows]
    size = sum(len(document.text.encode()) for document in documents)
    timed("digest of each document", lambda: [content_hash(document) for document in documents])
    timed("draw what is held out", lambda: [document.is_below(0.01) for document in documents])
    timed("split into words", lambda: [encoder.split(document.text) for document in documents])
    batches = [documents[at : at + 64] for at in range(0, len(documents), 64)]
    # Strings keep their UTF-8 from the split, so what is left is finding the words' ids.
    encoded = timed(
        "look words up, merge the unknown", lambda: [encoder.encode_batch([d.text for d in batch]) for batch in batches]
    )
    seconds["look words up, merge the unknown"] -= seconds["split into words"]
    ended = timed("end each document", lambda: [batch.ended_by(loaded.eod) for batch in encoded])
    with tempfile.TemporaryDirectory() as place:

        def write() -> None:
            with PairWriter(Path(place, "pair"), token_dtype(loaded.vocab_size)) as writer:
                for batch in ended:
                    writer.add_many(batch.ids, np.asarray(batch.lengths))

        timed("write", write)
    total = sum(seconds.values())
    print(f"\n## One worker's time, {size / 1e6:.0f} MB of text, {len(documents):,} documents\n")
    for name, spent in seconds.items():
        print(f"{name:34} {spent / size * 1e9:6.2f} ns a byte  {spent / total:5.0%}")
    print(f"{'all':34} {total / size * 1e9:6.2f} ns a byte  = {size / total / 1e6:.0f} MB/s")
