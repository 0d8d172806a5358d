"""What makes a source unusable is said before any work, with the file and the way out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_prep.fixtures import make_fixture
from data_prep.fixtures.writers import write_parquet, write_saved_dataset
from ouro_megatron.errors import DataError
from tests.data_prep.sources.reading import read_all, source_of

ROW = {"id": "1", "text": "some text"}


def refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        source_of(settings).units(1 << 20)


def test_wrong_column_names_the_likely_one(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"content": "x", "score": 0.5}])
    refused({"kind": "parquet", "path": str(tmp_path)}, r"a\.parquet has no column 'text'.*Set `text: content`")
    assert read_all({"kind": "parquet", "path": str(tmp_path), "text": "content"})[0][0].text == "x"


def test_no_text_column_at_all(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"repo": "x", "path": "y"}])
    refused({"kind": "parquet", "path": str(tmp_path)}, "repo, path.*metadata only")
    refused({"kind": "opencoder_pretrain", "path": str(tmp_path)}, "RefineCode.*metadata only")
    refused({"kind": "megamath_hq", "path": str(tmp_path)}, "megamath-web-pro")
    refused({"kind": "megamath_web", "path": str(tmp_path)}, "megamath-code")
    refused({"kind": "nemotron_code", "path": str(tmp_path)}, "Nemotron-Code-Metadata")


def test_column_that_is_no_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": {"body": "x"}}])
    refused({"kind": "parquet", "path": str(tmp_path)}, "does not hold text")


def test_a_second_folder_with_other_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "good" / "a.parquet", [ROW])
    write_parquet(tmp_path / "metadata" / "b.parquet", [{"repo": "x"}])
    refused({"kind": "parquet", "path": str(tmp_path)}, r"metadata/b\.parquet")


def test_json_lines_without_the_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    refused({"kind": "jsonl", "path": str(tmp_path)}, "Set `text: content`")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    refused({"kind": "jsonl", "path": str(tmp_path), "key": "urll"}, "'urll'")
    refused({"kind": "parquet", "path": str(tmp_path)}, r"no file below it matches '\*\*/\*\.parquet'")
    refused({"kind": "jsonl", "path": str(tmp_path / "nowhere")}, "nowhere")


def test_where_with_an_unknown_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{**ROW, "lang": "en"}, {**ROW, "lang": "de"}])
    refused({"kind": "parquet", "path": str(tmp_path), "where": {"language": ["en"]}}, "'language' .`where`.")
    documents, _ = read_all({"kind": "parquet", "path": str(tmp_path), "where": {"lang": ["en"]}})
    assert [document.fields["lang"] for document in documents] == ["en"]


@pytest.mark.parametrize("first", [0, 1])
def test_numbered_files_must_all_be_there(tmp_path: Path, first: int) -> None:
    for number in (first, first + 1, first + 3):
        write_parquet(tmp_path / f"x-part-{number:03d}-of-004.parquet", [ROW])
    settings = {"kind": "parquet", "path": str(tmp_path)}
    refused(settings, rf"1 of the 4 files x-part-\*-of-\*.parquet are missing \(numbers {first + 2}\).*partial: true")
    assert len(read_all({**settings, "partial": True})[0]) == 3
    assert len(read_all({**settings, "path": str(tmp_path / f"*-00{first + 3}-of-*.parquet")})[0]) == 1


def test_the_same_files_in_two_cuts(tmp_path: Path) -> None:
    for total in (1, 2):
        for number in range(total):
            write_parquet(tmp_path / f"train-{number:05d}-of-{total:05d}.parquet", [ROW])
    refused({"kind": "parquet", "path": str(tmp_path)}, "-of-1 and -of-2.*the same rows twice")


def test_jsonl_beside_parquet_of_the_same_rows(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write_parquet(tmp_path / "data" / "train.parquet", [row])
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
    refused({"kind": "chat", "path": str(tmp_path)}, "the same rows twice")
    assert len(read_all({"kind": "chat", "path": str(tmp_path), "pattern": "**/*.jsonl"})[0]) == 1


def test_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    refused({"kind": "jsonl", "path": str(tmp_path)}, "a link to a file that is not there")


def test_nemotron_cc_buckets(tmp_path: Path) -> None:
    made = make_fixture("nemotron_cc", tmp_path)
    settings = dict(made.settings)
    high, _ = read_all({**settings, "buckets": {"high": 1.0}})
    assert len(high) == 6 * 6
    one, _ = read_all({**settings, "buckets": {"high/diverse_qa_pairs": 1.0, "medium/actual": 1.0}})
    assert len(one) == 12 and {document.fields["language"] for document in one} == {"eng"}
    some, _ = read_all({**settings, "buckets": {"high": 0.5, "high/actual": 1.0}})
    assert 6 <= len(some) < 36
    # The page and what was made from it share a key, so a share takes or leaves them together.
    keys = {document.key for document in some if "high" in document.key}
    again = [document for document in high if document.key in keys]
    assert len([document for document in some if document.key in keys]) <= len(again)
    with pytest.raises(ValidationError, match="no bucket 'best'"):
        source_of({**settings, "buckets": {"best": 1.0}})
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        source_of({**settings, "buckets": {"high": 2.0}})
    root = Path(settings["path"])
    shutil.rmtree(root / "quality=high" / "kind=synthetic" / "kind2=distill")
    refused(settings, r"1 of 11 files of the manifest.*kind2=distill")
    refused({**settings, "buckets": {"high/distill": 1.0}}, "bucket high/distill is chosen")
    (root / "quality=high" / "kind=synthetic" / "kind2=new").mkdir()
    (root / "quality=high" / "kind=synthetic" / "kind2=new" / "a.jsonl.zstd").write_bytes(b"")
    refused(settings, "kind2=new.*no bucket of Nemotron-CC")


def test_map_cc_parts(tmp_path: Path) -> None:
    settings = dict(make_fixture("map_cc", tmp_path).settings)
    folder = Path(settings["path"])
    (folder / "zh_cc.jsonl.gz.part30").rename(tmp_path / "part30")
    refused(settings, r"zh_cc\.jsonl\.gz: part 30 is missing \(35 of 36")
    # What lies before the gap can still be read; the cut is on purpose and no fault.
    some, faults = read_all({**settings, "partial": True, "families": ["zh_cc"]})
    assert len(some) > 0 and not faults
    (tmp_path / "part30").rename(folder / "zh_cc.jsonl.gz.part30")
    (folder / "zh_cc.jsonl.gz.part36").unlink()
    refused(settings, "part 36 is missing")
    (folder / "zh_books.jsonl.gz.part01").unlink()
    refused({**settings, "families": ["zh_books"]}, "part 01 is missing")
    refused({**settings, "families": ["zh_books"], "partial": True}, "part 01 is missing")
    for part in folder.glob("zh_baike*"):
        part.unlink()
    refused({**settings, "families": ["zh_baike"]}, "no part of zh_baike")


def test_map_cc_joined_by_someone_and_mirrors(tmp_path: Path) -> None:
    made = make_fixture("map_cc", tmp_path)
    folder = Path(made.settings["path"])
    parts = sorted(folder.glob("zh_cc*"))
    for part in folder.glob("zh_[bop]*"):
        part.unlink()
    whole, _ = read_all(made.settings)
    for number, part in enumerate(parts):
        part.rename(folder / f"zh_cc.jsonl.gz.parta{chr(ord('a') + number)}" if number < 26 else folder / f"x{number}")
    for number in range(26, 36):
        (folder / f"x{number}").rename(folder / f"zh_cc.jsonl.gz.partb{chr(ord('a') + number - 26)}")
    assert read_all(made.settings) == (whole, [])
    content = b"".join(part.read_bytes() for part in sorted(folder.glob("zh_cc*")))
    for part in folder.glob("zh_cc*"):
        part.unlink()
    (folder / "zh_cc.jsonl.gz").write_bytes(content)
    assert read_all(made.settings) == (whole, [])


def test_map_cc_damage_names_the_part(tmp_path: Path) -> None:
    settings = dict(make_fixture("map_cc", tmp_path).settings)
    part = Path(settings["path"]) / "zh_cc.jsonl.gz.part20"
    part.write_bytes(part.read_bytes()[:-9] + b"\0" * 9)
    documents, faults = read_all({**settings, "families": ["zh_cc"]})
    assert len(documents) < 40 and faults[-1].ends_unit
    assert "zh_cc.jsonl.gz.part2" in faults[-1].reason


def test_missing_arrow_file_of_a_saved_dataset(tmp_path: Path) -> None:
    settings = dict(make_fixture("opencoder_annealing", tmp_path).settings)
    folder = Path(settings["path"]) / "synthetic_qa"
    for path in write_saved_dataset(folder, [{"text": "x"}, {"text": "y"}], 2):
        path.rename(path.with_name(path.name.replace("-of-00002", "")))
    refused(settings, r"synthetic_qa/state\.json names data-00000-of-00002\.arrow")
    refused({**settings, "subsets": ["synthetic_qa", "algorithmic_corpus"], "path": str(folder)}, "algorithmic_corpus")
    assert len(read_all({**settings, "subsets": ["algorithmic_corpus"]})[0]) == 6


def test_subsets(tmp_path: Path) -> None:
    math = dict(make_fixture("nemotron_cc_math", tmp_path / "math").settings)
    three, _ = read_all({**math, "subsets": ["3"]})
    assert len(three) == 6 and {document.key for document in three} == {f"m{number}" for number in range(6)}
    shutil.rmtree(Path(math["path"]) / "4plus")
    refused(math, "no file in a folder 4plus below")
    mega = dict(make_fixture("megamath_hq", tmp_path / "mega").settings)
    assert len(read_all({**mega, "subsets": ["megamath-web-pro"]})[0]) == 8
    refused({**mega, "subsets": ["megamath-qa"]}, "megamath-qa")
    refused({**mega, "kind": "megamath_web"}, "megamath-web below")
    code = dict(make_fixture("nemotron_code", tmp_path / "code").settings)
    refused({**code, "path": code["path"] + "/Nemotron-Code-Metadata"}, "but no text")
    sft = dict(make_fixture("nemotron_sft_code", tmp_path / "sft").settings)
    refused({**sft, "kind": "nemotron_sft_general"}, "Nemotron-SFT-General below")


def test_opencodereasoning_split_1(tmp_path: Path) -> None:
    settings = dict(make_fixture("opencodereasoning", tmp_path).settings)
    shutil.rmtree(Path(settings["path"]) / "split_0")
    refused(settings, "split_1 only, whose `input` is a placeholder")


def _without_extra(settings: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", missing)
        refused(settings, r'pip install "ouro-megatron\[data\]"')


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", [ROW])
    _without_extra({"kind": "parquet", "path": str(tmp_path)}, "pyarrow", monkeypatch)
    _without_extra({"kind": "jsonl", "path": "s3://bucket/x"}, "fsspec", monkeypatch)
    _without_extra({"kind": "datasets", "path": str(tmp_path)}, "datasets", monkeypatch)


def test_take_is_a_stable_share(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(2000))
    (tmp_path / "a.jsonl").write_text(lines)
    settings = {"kind": "jsonl", "path": str(tmp_path)}
    half = {document.text for document in read_all({**settings, "take": 0.5})[0]}
    fifth = {document.text for document in read_all({**settings, "take": 0.2})[0]}
    assert fifth < half and 900 < len(half) < 1100 and 320 < len(fifth) < 480


def test_sft_mix(tmp_path: Path) -> None:
    settings = dict(make_fixture("sft_mix", tmp_path).settings)
    first, second = settings["sets"]
    part, _ = read_all({**settings, "sets": [{**first, "where": {"domain": ["math"]}}, second]})
    assert len(part) == 4 + 12
    with pytest.raises(ValidationError, match="two sets are called"):
        source_of({**settings, "sets": [first, first]})
    refused({**settings, "sets": [first, {**first, "name": "other"}]}, "belongs to two sets, openthoughts and other")
    taken, _ = read_all({**settings, "take": 0.5})
    assert 0 < len(taken) < 24


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": 5}', "is a int, not text"),
    (b'{"text": null}', "is null"),
    (b'{"other": "x"}', "no field 'text'"),
    (b'{"text": "\\ud800"}', "surrogate|JSON"),
    (b'{"text": "a\xff"}', "not UTF-8"),
    (b'{"text": ', "not JSON"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES)
def test_bad_records_are_passed_over(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + line + b'\n\n{"text": ""}\n{"text": "two"}\n')
    documents, faults = read_all({"kind": "jsonl", "path": str(tmp_path)})
    assert [document.text for document in documents] == ["one", "", "two"]
    assert len(faults) == 1 and faults[0].where == "line 2, byte 16"
    assert re.search(words, faults[0].reason)


def _text_files(folder: Path, write: Callable[[Path], object]) -> dict[str, Any]:
    write(folder / "a.txt")
    (folder / "b.txt").write_text("fine")
    return {"kind": "text_folder", "path": str(folder)}


def test_where_needs_columns(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="there are none here"):
        source_of({"kind": "text_folder", "path": str(tmp_path), "where": {"lang": ["en"]}})


def test_text_folder_faults(tmp_path: Path) -> None:
    settings = _text_files(tmp_path, lambda path: path.write_bytes(b"ab\xff"))
    documents, faults = read_all(settings)
    assert [document.text for document in documents] == ["fine"] and faults[0].where == "byte 2"
