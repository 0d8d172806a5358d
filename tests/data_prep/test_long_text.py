"""Texts that are not held in memory give the same documents, ids and faults as those that are."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.byte_level import ByteLevelEncoder
from data_prep.encode import PlainEncoder
from data_prep.filters import Decontamination, NgramList, whole_words, words
from data_prep.formats import lines as line_files
from data_prep.formats import long_json, tables
from data_prep.formats.lines import parse_object, parse_value
from data_prep.formats.long_json import Apart, parse_long_object, short_parts
from data_prep.long_text import LongText, Spilled, long_text
from data_prep.prepare import load_data_recipe, prepare
from data_prep.sources import text_folder
from data_prep.sources.base import Document
from data_prep.writer import PairWriter
from ouro_megatron.data.tokenizer import load_tokenizer
from tests.data_prep.test_byte_level import EOD, all_pairs, needs_extension, random_bpe, stdlib, trained
from tests.data_prep.test_prepare import Lines

TEXT = "naïve 中文分词很难。 Ὀδυσσεύς ΣΑΣ \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") * 40


def spilled(data: bytes, folder: Path) -> Spilled:
    found = Spilled(folder)
    found.write(data)
    return found


@given(cuts=st.lists(st.integers(0, len(TEXT.encode())), max_size=12))
def test_a_text_in_any_blocks(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    data = TEXT.encode()
    edges = [0, *sorted(cuts), len(data)]
    text = long_text((data[a:b] for a, b in pairwise(edges)), tmp_path_factory.getbasetemp())
    assert text.whole() == TEXT and text.characters == len(TEXT) and text.size == len(data)
    assert text.beginning(7) == TEXT[:7] and text.beginning(10**6) == TEXT
    text.close()


@pytest.mark.parametrize("at", [0, 1, 700, 701])
@pytest.mark.parametrize("step", [1, 3, 64, 10**6])
def test_where_a_text_is_broken(tmp_path: Path, at: int, step: int) -> None:
    data = ("é" * 1000).encode()
    data = data[:at] + b"\xff" + data[at:]
    with pytest.raises(UnicodeDecodeError) as whole:
        data.decode()
    with pytest.raises(UnicodeDecodeError) as pieces:
        long_text((data[start : start + step] for start in range(0, len(data), step)), tmp_path)
    assert (pieces.value.start, pieces.value.reason) == (whole.value.start, whole.value.reason)


def test_a_text_that_ends_inside_a_character(tmp_path: Path) -> None:
    with pytest.raises(UnicodeDecodeError, match="unexpected end of data") as error:
        long_text([b"abc\xe4", b"\xb8"], tmp_path)
    assert error.value.start == 3


# ---- JSON ----


@pytest.fixture(scope="module")
def small_pieces() -> Iterator[None]:
    """Cuts everywhere instead of every megabyte."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_json, "_PIECE", 24)
        patch.setattr(long_json, "_LONG_STRING", 10)
        patch.setattr(long_json, "_STRETCH", 7)
        yield


strings = st.text(
    st.one_of(st.sampled_from('\\"/\n\t\x7fé中\u2028😀𝔘u0d8'), st.characters(exclude_categories=["Cs"])), max_size=80
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=5,
)
rows = st.dictionaries(st.sampled_from(["text", "url", "meta", "a long name of a field"]), values, max_size=4)


def parsed_long(data: bytes, folder: Path) -> Any:
    line = spilled(data, folder)
    row = parse_long_object(line, Apart("text", folder), parse_value, parse_object)
    line.close()
    if row is not None and isinstance(row.get("text"), LongText):
        text = row["text"]
        row["text"] = text.whole()
        assert text.characters == len(row["text"])
        text.close()
    return row


@settings(max_examples=400, deadline=None)
@given(row=rows, ascii_only=st.booleans(), escape=st.booleans())
def test_objects_are_those_of_the_usual_parser(
    small_pieces: None, tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any], ascii_only: bool, escape: bool
) -> None:
    data = json.dumps(row, ensure_ascii=ascii_only).encode()
    if escape:
        data = data.replace(b"/", b"\\/")
    assert parsed_long(data, tmp_path_factory.getbasetemp()) == parse_object(data)


@settings(max_examples=600, deadline=None)
@given(
    row=rows,
    ascii_only=st.booleans(),
    at=st.floats(0, 1),
    new=st.sampled_from([b"", b'"', b"\\", b"\xff", b"\x01", b"}"]),
)
def test_broken_lines_are_refused_alike(
    small_pieces: None,
    tmp_path_factory: pytest.TempPathFactory,
    row: dict[str, Any],
    ascii_only: bool,
    at: float,
    new: bytes,
) -> None:
    data = json.dumps(row, ensure_ascii=ascii_only).encode()
    place = int(at * len(data))
    data = data[:place] + new + data[place + 1 :]
    try:
        expected = parse_object(data)
        for value in (expected or {}).values():  # half a surrogate pair: the usual path finds it later
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        with pytest.raises(ValueError):
            json.dumps(parsed_long(data, tmp_path_factory.getbasetemp()), ensure_ascii=False).encode()
        return
    assert parsed_long(data, tmp_path_factory.getbasetemp()) == expected


def test_what_is_said_of_a_broken_line(tmp_path: Path) -> None:
    whole = b'{"text": "' + b"word " * 300_000 + b'", "n": 1}'
    for data, words_ in (
        (whole[:-20], "a string that begins at byte 9 of the line has no end"),
        (whole[:-1], "not JSON: "),
        (whole.replace(b"word word", b"word\x01word", 1), "counted from byte 9 of the line"),
        (whole.replace(b"word word", b"word\xffword", 1), "not UTF-8 at byte 5"),
        (b"[" + whole + b"]", "a JSON array, not an object"),
    ):
        with pytest.raises(ValueError, match=words_):
            parsed_long(data, tmp_path)
    assert parsed_long(b" " * 2_000_000, tmp_path) is None
    fields = short_parts(spilled(whole, tmp_path), parse_object)
    assert fields is not None and isinstance(fields["text"], str) and fields["n"] == 1 and len(fields["text"]) < 100


# ---- words and filters ----


def test_words_of_a_text_in_pieces() -> None:
    choose = random.Random(0)
    text = "".join(choose.choices(["ΣΑΣ", "Σ", " ", "\n", "'", "a", "İ", "中", "。", ".", "ß"], k=5000))
    for size in (1, 2, 7, 64, 10**6):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        found = list(whole_words(iter(pieces)))
        assert "".join(found) == text
        assert [word for piece in found for word in words(piece)] == words(text)


def test_contaminated_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.txt").write_text("one two three four five six\n")
    ngrams = NgramList(Decontamination(files=(tmp_path / "test.txt",), ngram=5))
    monkeypatch.setattr("data_prep.long_text._BLOCK", 9)
    for text, expected in (
        ("seven eight " * 30 + "two, THREE four\nfive six" + " nine" * 30, True),
        ("seven eight " * 30 + "two, three four five" + " nine" * 30, False),
    ):
        assert ngrams.occurs_in(Document("k", text)) == expected
        assert ngrams.occurs_in(Document("k", "", long_text=long_text([text.encode()], tmp_path))) == expected


# ---- ids ----


def in_pieces(encoder: Any, text: str, folder: Path) -> tuple[np.ndarray, int]:
    """The ids of `encode_long`, and in how many pieces they came."""
    found: list[np.ndarray] = []
    long = long_text([text.encode()], folder)
    encoder.encode_long(long, found.append)
    long.close()
    return np.concatenate(found), len(found)


@needs_extension
@pytest.mark.parametrize("digits", [True, False])
def test_ids_in_pieces(tmp_path: Path, digits: bool) -> None:
    tokenizer = load_tokenizer(trained(tmp_path, digits, stdlib(0, 25)))
    text = (
        f"spelled {EOD}<|im_start|>"
        + "".join(stdlib(30, 60))
        + "acgt" * 200_000
        + " " * 100_000
        + "中文" * 100_000
        + "7" * 1000
        + "é"
    )
    fast, plain = ByteLevelEncoder(tokenizer), PlainEncoder(tokenizer)
    expected = plain.encode_batch([text]).ids
    ids, pieces = in_pieces(fast, text, tmp_path)
    assert pieces > 3 and np.array_equal(ids, expected) and tokenizer.eod not in ids
    assert np.array_equal(in_pieces(plain, text, tmp_path)[0], expected)


@needs_extension
@pytest.mark.parametrize("window", [16, 17, 40, 200])
@pytest.mark.parametrize("make", ["all pairs", "random", "trained"])
def test_words_in_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, make: str) -> None:
    """A long word is merged a window at a time, where the ends of windows change nothing."""
    monkeypatch.setattr("data_prep.byte_level._WINDOW", window)
    choose = random.Random(window)
    letters = "abcé"
    for seed in range(4 if make == "random" else 1):
        folder = tmp_path / str(seed)
        if make == "random":
            random_bpe(folder, seed)
        elif make == "all pairs":
            all_pairs(folder, True)
        else:
            trained(folder, True, ["".join(choose.choices("acgt", k=300)) for _ in range(300)])
            letters = "acgt"
        tokenizer = load_tokenizer(folder)
        texts = ["".join(choose.choices(letters, k=choose.choice([15, 16, 60, 500, 5000]))) for _ in range(60)]
        texts += [letter * count for letter in letters for count in (64, 1023, 4099)]
        texts += [("".join(choose.choices(letters, k=7)) * 900)[: choose.randrange(3000, 6000)] for _ in range(10)]
        fast, plain = ByteLevelEncoder(tokenizer).encode_batch(texts), PlainEncoder(tokenizer).encode_batch(texts)
        assert np.array_equal(fast.lengths, plain.lengths) and np.array_equal(fast.ids, plain.ids)


@needs_extension
def test_a_text_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    encoder = ByteLevelEncoder(load_tokenizer(all_pairs(tmp_path, True)))._encoder
    for data in (b"abc\xe4\xb8", b"\xf0", b"\x80\x80\x80\x80\x80"):
        with pytest.raises(ValueError, match="ends inside a character"):
            encoder.encode_long(data, print)
    encoder.encode_long(b"", print)
    choose = random.Random(0)
    for _ in range(300):  # any ids, but no crash
        encoder.encode_long(
            bytes(choose.choices([0x20, 0x41, 0x80, 0xC3, 0xE4, 0xF7, 0xFF], k=50)) + b"ab12", lambda *_: 0
        )


@needs_extension
def test_a_sink_that_fails_or_encodes(tmp_path: Path) -> None:
    encoder = ByteLevelEncoder(load_tokenizer(all_pairs(tmp_path, True)))
    text = b"one two, three! " * 100_000

    def fail(ids: bytearray, done: int) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        encoder._encoder.encode_long(text, fail)
    found = bytearray()

    def nested(ids: bytearray, done: int) -> None:
        assert encoder.encode_batch(["two words"]).lengths.tolist()
        found.extend(ids)

    encoder._encoder.encode_long(text, nested)
    assert found == encoder._encoder.encode_batch([text.decode()])[0]


def test_a_document_that_an_index_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.writer.MAX_LENGTH", 5)

    def write(*pieces: list[int]) -> Callable[[Callable[[np.ndarray], None]], None]:
        def put_all(put: Callable[[np.ndarray], None]) -> None:
            for piece in pieces:
                put(np.array(piece))

        return put_all

    with PairWriter(tmp_path / "pair", np.dtype("<u2")) as pair:
        pair.add_many(np.array([1, 2]), np.array([2]), np.array([True, False]))
        assert pair.add_long(write([1, 2, 3], [4, 5, 6])) is None
        assert pair.add_long(write([7, 8], [9])) == 3
    assert np.fromfile(tmp_path / "pair.bin", np.uint16).tolist() == [1, 2, 7, 8, 9]
    assert np.fromfile(tmp_path / "pair.loss.bin", np.uint8).tolist() == [1, 0, 1, 1, 1]


# ---- whole runs ----


def corpus(folder: Path) -> list[dict[str, Any]]:
    """The same documents, short and long, good and broken, in every kind of file; returns the sources."""
    choose = random.Random(5)
    texts = [TEXT * choose.choice([1, 1, 1, 30]) + str(number) for number in range(30)]
    texts += [texts[3], texts[29], "Z" * 5000, "", "one two three four five " + TEXT * 20]
    table = [{"text": text, "url": f"u{number % 9}", "language": "en"} for number, text in enumerate(texts)]
    lines_ = [json.dumps(row, ensure_ascii=number % 2 == 0).encode() for number, row in enumerate(table)]
    lines_[5:5] = [
        b'{"text": "' + b"x" * 9000 + b"\xff" + b'"}',
        b'{"text": "' + b"y" * 9000,
        b'{"text": "\\ud800' + b"z" * 9000 + b'"}',
    ]
    content = b"\n".join(lines_) + b"\n"
    for name in ("plain", "gz", "zst", "parquet", "arrow", "txt"):
        (folder / name).mkdir(parents=True)
    (folder / "plain" / "a.jsonl").write_bytes(content)
    (folder / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "zst" / "a.jsonl.zst").write_bytes(zstandard.compress(content) + zstandard.compress(content)[:-9])
    pq.write_table(pa.Table.from_pylist(table), folder / "parquet" / "a.parquet", row_group_size=10)
    with (
        pa.OSFile(str(folder / "arrow" / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.Table.from_pylist(table).schema) as out,
    ):
        out.write_table(pa.Table.from_pylist(table), max_chunksize=9)
    for number, text in enumerate(texts):
        (folder / "txt" / f"{number:02d}.txt").write_bytes(b"\xef\xbb\xbf" * (number % 2) + text.encode())
    (folder / "txt" / "broken.txt").write_bytes(b"q" * 9000 + b"\xe4")
    (folder / "txt" / "good.txt.gz").write_bytes(gzip.compress(b"good " * 3000))
    (folder / "txt" / "cut.txt.gz").write_bytes(gzip.compress(random.Random(1).randbytes(9000).hex().encode())[:-20])
    kinds = {
        "plain": "jsonl",
        "gz": "jsonl",
        "zst": "jsonl",
        "parquet": "parquet",
        "arrow": "arrow",
        "txt": "text_folder",
    }
    return [
        {
            "name": name,
            "kind": kind,
            "path": str(folder / name),
            **({"key": "url"} if name == "gz" else {}),
            **({"take": 0.8} if name == "zst" else {}),
        }
        for name, kind in kinds.items()
    ]


@needs_extension
@pytest.mark.parametrize("dedup", [False, True])
def test_the_same_bytes_whatever_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: bool) -> None:
    sources = corpus(tmp_path / "raw")[: 1 if dedup else None]
    (tmp_path / "test.txt").write_text("one two three four five\n")
    tokenizer = trained(tmp_path / "tokenizer", True, stdlib(0, 10))
    found = []
    for name, long in (("held", 1 << 40), ("spilled", 3000)):
        for module in (line_files, tables, text_folder):
            monkeypatch.setattr(module, "LONG", long)
        monkeypatch.setattr(long_json, "_LONG_STRING", long // 4)
        filters = {"min_characters": 100, "decontaminate": {"files": [str(tmp_path / "test.txt")], "ngram": 5}}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            yaml.safe_dump(
                {
                    "output": str(tmp_path / name),
                    "tokenizer": {"kind": "existing", "path": str(tokenizer)},
                    "validation_fraction": 0.3,
                    "shard_bytes": 30_000,
                    "max_fault_rate": 1.0,
                    "filters": {**filters, "exact_dedup": dedup},
                    "sources": sources,
                }
            )
        )
        prepare(load_data_recipe(recipe), Lines(), workers=1)
        out = tmp_path / name
        assert not list(out.glob(".parts"))
        files = {file.name: file.read_bytes() for suffix in ("bin", "idx") for file in out.glob(f"*.{suffix}")}
        assert len(files) == 4 * len(sources)
        counts = {}
        for file in sorted(out.glob("*.manifest.json")):
            manifest = json.loads(file.read_text())
            counts[file.name] = (manifest["source_counts"], manifest["units"])
        faults = {file.name: [json.loads(line)["where"] for line in file.open()] for file in out.glob("*.faults.jsonl")}
        assert len(faults["plain.faults.jsonl"]) == 3 and (dedup or len(faults["txt.faults.jsonl"]) == 2)
        left_out = counts["plain.manifest.json"][0]["left_out"]
        assert left_out["contaminated"] == 1 and left_out.get("duplicate", 0) == 2 * dedup
        found.append((files, counts, faults))
    assert found[0] == found[1]


_CHILD = """
from ouro_megatron.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")))
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
@pytest.mark.parametrize("kind", ["jsonl", "text_folder"])
def test_memory_does_not_grow_with_a_document(tmp_path: Path, kind: str) -> None:
    """A real process, a document of 4 million characters or of 40 million: not even the text is held once."""
    tokenizer = trained(tmp_path / "tokenizer", True, stdlib(0, 10))
    text = "".join(stdlib(0, 60))[:1_000_000]
    peaks = {}
    for millions in (4, 40):
        raw, out = tmp_path / f"raw-{millions}", tmp_path / f"out-{millions}"
        raw.mkdir()
        if kind == "jsonl":
            (raw / "a.jsonl").write_text(json.dumps({"text": text * millions}) + "\n")
        else:
            (raw / "a.txt").write_text(text * millions)
        recipe = {
            "output": str(out),
            "tokenizer": {"kind": "existing", "path": str(tokenizer)},
            "validation_fraction": 0,
            "sources": [{"name": "one", "kind": kind, "path": str(raw)}],
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-c", _CHILD, "data", "prepare", str(tmp_path / "recipe.yaml"), "--workers", "1"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        peaks[millions] = int(run.stdout.split("VmHWM:")[1].split()[0]) * 1024
        assert (
            json.loads((out / "one.manifest.json").read_text())["source_counts"]["text_bytes"] >= millions * 1_000_000
        )
    assert peaks[40] - peaks[4] < 36e6, peaks
