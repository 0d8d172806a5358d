"""Every shipped recipe loads, and its sources read a corpus in the shape that its comment tells how to get."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.fixtures import MAKERS, make_fixture
from data_prep.fixtures.llama import pack, write_packs
from data_prep.prepare import load_data_recipe
from data_prep.sources.catalogue import RECIPES, all_kinds, find_kind, recipe_text
from ouro_megatron.errors import DataError
from tests.data_prep.sources.reading import read_all

GENERIC = {"text_folder", "jsonl", "parquet", "arrow", "datasets", "chat", "nemotron_sft_math"}
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_reads_its_corpus(path: Path, tmp_path: Path) -> None:
    recipe = load_data_recipe(path)
    assert recipe.output == Path("data/ouro")
    (settings,) = yaml.safe_load(path.read_text())["sources"]
    made = make_fixture(settings["kind"], tmp_path)
    for name in ("path", "manifest", "tokenizer"):
        if name in settings:
            settings[name] = made.settings[name]
    if settings["kind"] == "sft_mix":
        for wanted, small in zip(settings["sets"], made.settings["sets"], strict=True):
            wanted["path"] = small["path"]
    if settings["kind"] == "prolong":
        _all_domains(Path(settings["path"]), settings["domains"])
    documents, faults = read_all(settings)
    assert documents and not faults


def _all_domains(folder: Path, domains: list[str]) -> None:
    for domain in domains:
        if domain != "book-65536":
            write_packs(folder / domain / "proc00-64", pack([f"a text of {domain}"], 8), 1)


def test_each_corpus_has_a_recipe_and_is_documented() -> None:
    kinds = {kind.name for kind in all_kinds()}
    assert {kind.name for kind in all_kinds() if kind.recipe} == set(MAKERS) - GENERIC
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [kind for kind in sorted(kinds) if f"`{kind}`" not in page] == []


def test_names_are_those_of_the_blend() -> None:
    blend: dict[str, Any] = yaml.safe_load((ROOT / "stages" / "blends" / "ouro.yaml").read_text())
    names = {source.name for path in RECIPES.glob("*.yaml") for source in load_data_recipe(path).sources}
    assert set(blend["available"]) <= names


def test_descriptions_say_what_each_field_means() -> None:
    for kind in all_kinds():
        assert kind.about and kind.settings[0].name == "name"
        assert [setting.name for setting in kind.settings if not setting.meaning] == [], kind.name
    buckets = next(setting for setting in find_kind("nemotron_cc").settings if setting.name == "buckets")
    assert buckets.type == "mapping" and "high/actual" in buckets.meaning
    assert "nemotron_cc" in recipe_text("nemotron_cc")
    with pytest.raises(DataError, match="no kind of source is called 'nemotron'"):
        find_kind("nemotron")
    with pytest.raises(DataError, match="no recipe is shipped for kind 'jsonl'"):
        recipe_text("jsonl")
