"""The comparison with `tokenizers` that a user runs on text of their own."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.byte_level import ByteLevelEncoder
from data_prep.check_tokenizer import check_tokenizer
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
