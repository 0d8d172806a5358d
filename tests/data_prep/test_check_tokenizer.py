"""The comparison with `tokenizers` that a user runs on text of their own."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.byte_level import ByteLevelEncoder
from data_prep.check_tokenizer import _texts, check_tokenizer
from data_prep.encode import Encoded
from ouro_megatron.cli.data import data
from ouro_megatron.errors import DataError
from tests.data_prep.test_byte_level import all_pairs, needs_extension, stdlib
from tests.tiny import write_tokenizer

pytestmark = needs_extension


def silent(done: int, total: int) -> None: ...


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "some text"
    (folder / "deeper").mkdir(parents=True)
    for number, text in enumerate(stdlib(0, 3)):
        (folder / "deeper" / f"{number}.py").write_text(text, encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


def test_equal_text(tmp_path: Path, texts: Path) -> None:
    size = sum(file.stat().st_size for file in texts.rglob("*.*"))
    tokenizer = all_pairs(tmp_path / "tokenizer", True)
    told = []
    line = check_tokenizer(tokenizer, [texts], lambda *amounts: told.append(amounts))
    assert told[-1] == (size - 6, size)  # less the picture
    assert "are equal in 3 files" in line and "1 files that are not UTF-8" in line
    result = CliRunner().invoke(data, ["check-tokenizer", str(tokenizer), str(texts), "--limit", "0.001"])
    assert result.exit_code == 0 and "are equal in 1 files" in result.output


@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
@pytest.mark.parametrize("content", ["", "é", "one\ntwo é\n", "中文\n" * 50 + "no end", "x" * 300])
def test_large_files_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, content: str) -> None:
    monkeypatch.setattr("data_prep.check_tokenizer._PIECE", piece)
    (tmp_path / "a.txt").write_text(content)
    found = list(_texts(tmp_path / "a.txt", None))
    assert "".join(text for text, _ in found) == content and sum(size for _, size in found) == len(content.encode())
    for limit in (1, 8, 101):
        text = "".join(text for text, _ in _texts(tmp_path / "a.txt", limit))
        assert text == content.encode()[:limit].decode("utf-8", "ignore")
    (tmp_path / "a.txt").write_bytes(content.encode() + b"\xe4")
    with pytest.raises(UnicodeDecodeError):
        list(_texts(tmp_path / "a.txt", None))


def test_difference_is_shown(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = all_pairs(tmp_path / "tokenizer", True)
    (texts / "deeper" / "z.txt").write_text("all is well until HERE and after", encoding="utf-8")
    right = ByteLevelEncoder.encode_batch

    def wrong(self: ByteLevelEncoder, texts: Sequence[str]) -> Encoded:
        found = right(self, texts)
        if any("HERE" in text for text in texts):
            found.ids[-3] += 1
        return found

    monkeypatch.setattr(ByteLevelEncoder, "encode_batch", wrong)
    with pytest.raises(DataError, match=r"z\.txt: ids differ from token \d+ on, near character \d+: .*after"):
        check_tokenizer(tokenizer, [texts], silent)


def test_slow_path_is_named(tmp_path: Path, texts: Path) -> None:
    assert "takes the slow path" in check_tokenizer(write_tokenizer(tmp_path / "tokenizer"), [texts], silent)


def test_nothing_to_compare(tmp_path: Path) -> None:
    tokenizer = all_pairs(tmp_path / "tokenizer", True)
    with pytest.raises(DataError, match="nowhere"):
        check_tokenizer(tokenizer, [tmp_path / "nowhere"], silent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no UTF-8 text"):
        check_tokenizer(tokenizer, [tmp_path / "empty"], silent)
