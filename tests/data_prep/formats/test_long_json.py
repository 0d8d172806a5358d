"""Lines of JSON that are not held in memory give the same objects and faults as those that are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.formats import long_json
from data_prep.formats.lines import parse_object, parse_value
from data_prep.formats.long_json import parse_long_object, short_parts
from data_prep.long_text import LongText, Spilled
from data_prep.memory import Apart


def spilled(data: bytes, folder: Path) -> Spilled:
    found = Spilled(folder)
    found.write(data)
    return found


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
