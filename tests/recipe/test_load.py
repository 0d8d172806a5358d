"""Reading recipes: extends, overrides, and errors that name file, line, key and the nearest name."""

from pathlib import Path

import pytest

from ouro_megatron.errors import RecipeError
from ouro_megatron.recipe.load import difference, dump_recipe, load_recipe, load_with_origins, recipe_from_text
from ouro_megatron.recipe.spans import Span, format_amount, parse_amount

BASE = """\
name: base
model: {layers: 2, hidden: 32, heads: 4, ffn: 48, vocab: 64, loops: 2}
data:
  sequence_length: 16
  tokenizer: tok
  train:
    - {path: a, weight: 1}
    - {path: b, weight: 2}
optimizer: {lr: 3e-4}
batch: {global_tokens: 1Ki}
budget: {total: 1M}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "my recipes"
    (root / "sub").mkdir(parents=True)
    (root / "base.yaml").write_text(BASE)
    return root


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_extends_merges_mappings_and_replaces_lists(folder: Path) -> None:
    child = write(
        folder / "sub" / "child.yaml",
        "extends: ../base.yaml\nname: child\nmodel: {loops: 4}\ndata:\n  train: [{path: c, weight: 1}]\n",
    )
    recipe, origins = load_with_origins(child, ["optimizer.lr=1e-3"])
    assert (recipe.name, recipe.model.loops, recipe.model.layers) == ("child", 4, 2)
    assert [str(entry.path) for entry in recipe.data.train] == ["c"]
    assert recipe.optimizer.lr == 1e-3
    assert origins["model.loops"].endswith("child.yaml:3")
    assert origins["model.layers"].endswith("base.yaml:2")
    assert origins["optimizer.lr"] == "override optimizer.lr=1e-3"


def test_later_bases_win(folder: Path) -> None:
    write(folder / "long.yaml", "data: {sequence_length: 32}\n")
    child = write(folder / "child.yaml", "extends: [base.yaml, long.yaml]\n")
    assert load_recipe(child).data.sequence_length == 32


def test_dump_loads_back_equal(folder: Path) -> None:
    recipe = load_recipe(folder / "base.yaml")
    assert recipe_from_text(dump_recipe(recipe), "dump") == recipe


def test_difference(folder: Path) -> None:
    before = load_recipe(folder / "base.yaml")
    after = load_recipe(folder / "base.yaml", ["model.loops=8", "budget.total=100 steps"])
    assert difference(before, after) == [("model.loops", 2, 8), ("budget.total", "1M tokens", "100 steps")]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.layer=3", ["unknown key model.layer", "'layers'", "override model.layer=3"]),
        ("optimiser.lr=1", ["unknown key optimiser", "'optimizer'"]),
        ("model.layers=two", ["model.layers", "'two'", "integer"]),
        ("batch.global_tokens=3.5", ["batch.global_tokens", "whole number"]),
        ("schedule.warmup=ten steps", ["schedule.warmup", "amount"]),
        ("name=a/b", ["name", "pattern"]),
        ("model", ["key.path=value"]),
    ],
)
def test_override_errors(folder: Path, override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "base.yaml", [override])
    for word in words:
        assert word in str(caught.value)


def test_all_problems_at_once_with_their_lines(folder: Path) -> None:
    path = write(folder / "bad.yaml", BASE.replace("hidden: 32", "hiden: 32").replace("lr: 3e-4", "lr: -1"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert "unknown key model.hiden; did you mean 'hidden'?" in text
    assert f"{path}:9: optimizer.lr" in text
    assert "model.hidden is missing" in text


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name: a\nname: b\n", "set twice"),
        ("name: [\n", "not valid YAML"),
        ("- a\n", "mapping"),
        ("extends: nowhere.yaml\n", "nowhere.yaml"),
        ("extends: self.yaml\n", "circle"),
    ],
)
def test_broken_files(folder: Path, text: str, word: str) -> None:
    path = write(folder / "self.yaml", text)
    with pytest.raises(RecipeError, match=word):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("512k", 512_000), ("8Mi", 8 * 2**20), ("3T", 3 * 10**12), ("1.4B", 1_400_000_000), ("1_000", 1000), (7, 7)],
)
def test_amounts(text: object, value: int) -> None:
    assert parse_amount(text) == value
    assert parse_amount(format_amount(value)) == value


@pytest.mark.parametrize("text", ["-1", "1.5", "3X", "", True, None, 2.5])
def test_not_amounts(text: object) -> None:
    with pytest.raises(ValueError):
        parse_amount(text)


def test_spans() -> None:
    assert Span.parse("100 steps") == Span(steps=100)
    assert Span.parse("20B tokens") == Span(tokens=20 * 10**9) == Span.parse("20B")
    assert str(Span.parse("1 step")) == "1 steps"
    assert Span.parse(str(Span(tokens=8 * 2**20))) == Span(tokens=8 * 2**20)
