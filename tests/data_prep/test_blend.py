"""Blends: the paper's percentages from its token counts, epochs, pairs, both kinds of files."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data_prep.blend import Blend, choose_blends, load_blends, make_blends, write_blend
from ouro_megatron.errors import DataError
from ouro_megatron.recipe.schema import BlendEntry
from tests.tiny import write_corpus

ROOT = Path(__file__).resolve().parents[2]
OURO = ROOT / "stages" / "blends" / "ouro.yaml"

PUBLISHED = {
    "stage-1": {
        "nemotron-cc": 73.4,
        "map-cc": 13.0,
        "ultra-fineweb-zh": 2.0,
        "opencoder-pretrain": 7.5,
        "megamath-web": 4.1,
    },
    "ct-annealing": {
        "nemotron-cc-high-quality": 66.5,
        "nemotron-cc-math-v1": 15.0,
        "megamath-high-quality": 4.6,
        "opencoder-annealing": 0.5,
        "nemotron-synthetic-code": 3.8,
        "nemotron-sft-code": 3.4,
        "nemotron-sft-general": 6.2,
    },
    "long-ct": {"prolong-64k": 100.0},
}
"""arXiv 2510.25741, tables 4 and 5."""


def blends(path: Path = OURO) -> dict[str, Blend]:
    return {blend.name: blend for blend in make_blends(load_blends(path))}


def test_published_percentages_follow_from_the_token_counts() -> None:
    made = blends()
    for name, percentages in PUBLISHED.items():
        assert {row.source: round(100 * row.share, 1) for row in made[name].rows} == percentages
        assert sum(row.share for row in made[name].rows) == pytest.approx(1)
    assert {name: blend.total for name, blend in made.items()} == {
        "stage-1": 6_000_000_000_000,
        "ct-annealing": 1_400_000_000_000,
        "long-ct": 20_000_000_000,
        "mid-training": 300_000_000_000,
    }


def test_replays_keep_the_shares_inside() -> None:
    made = blends()
    rows = made["mid-training"].rows
    shares: dict[str, float] = {}
    for row in rows:
        shares[row.origin] = shares.get(row.origin, 0.0) + row.share
    assert shares == pytest.approx({"": 0.3, "stage-1": 0.1, "ct-annealing": 0.6})
    first = next(row for row in rows if row.source == "map-cc")
    assert first.tokens == pytest.approx(30e9 * 0.13)
    assert first.epochs_so_far == pytest.approx((780 + 3.9) / 800)


@pytest.mark.parametrize("name", ["stage-1", "ct-annealing", "long-ct", "mid-training"])
def test_shipped_stages_read_these_blends(name: str) -> None:
    data = yaml.safe_load((ROOT / "stages" / "data" / f"{name}.yaml").read_text())["data"]
    weights = {entry["path"]: entry["weight"] for entry in data["train"]}
    blend = yaml.safe_load(blends()[name].recipe_text())["data"]["train"]
    assert {entry["path"]: entry["weight"] for entry in blend} == pytest.approx(weights, abs=0.1)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """`web` in two pairs with manifests, `code` in one of another tool, with half of the tokens."""
    folder = tmp_path / "data"
    for name in ("web-00000-of-00002", "web-00001-of-00002"):
        write_corpus(folder / name, documents=40, seed=3)
        (folder / f"{name}.manifest.json").write_text('{"source": "web", "tokenizer": {"vocab": 128}}')
    write_corpus(folder / "code", documents=40, seed=3)
    return folder


def test_pairs_share_their_source_s_weight_by_tokens(prepared: Path) -> None:
    (blend,) = choose_blends(["web=60%", "code=40%"], None, prepared, "1M")
    web, code = blend.rows
    assert [weight for _, weight in web.prefixes] == pytest.approx([0.3, 0.3])
    assert web.available == 2 * (code.available or 0)
    assert code.epochs == pytest.approx(400_000 / (code.available or 1))
    assert any("code" in line and "epochs, more than 4" in line for line in blend.warnings)
    entries = [BlendEntry(**entry) for entry in yaml.safe_load(blend.recipe_text())["data"]["train"]]
    assert [(entry.path.name, entry.weight) for entry in entries] == [
        ("web-00000-of-00002", 30),
        ("web-00001-of-00002", 30),
        ("code", 40),
    ]


def test_megatron_reads_the_file(prepared: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    (blend,) = choose_blends(["web=3M", "code=1M"], None, prepared, None)
    file = tmp_path / "blend.txt"
    write_blend([blend], None, file, None)
    read = get_blend_from_list(file.read_text().split())
    assert read is not None
    paths, weights = read
    assert [Path(path).name for path in paths] == ["web-00000-of-00002", "web-00001-of-00002", "code"]
    assert weights == pytest.approx([37.5, 37.5, 25])


def test_more_pairs_than_a_blend_holds(prepared: Path) -> None:
    (blend,) = choose_blends(["web=60%", "code=40%"], None, prepared, "1M")

    def with_pairs(count: int) -> Blend:
        pairs = tuple((Path(f"/data/{number}"), 1 / count) for number in range(count))
        return replace(blend, rows=(replace(blend.rows[0], prefixes=pairs, held_out=()),))

    assert len(with_pairs(32_766).megatron_text().splitlines()) == 32_766
    for text in (with_pairs(32_767).megatron_text, with_pairs(32_767).recipe_text):
        with pytest.raises(DataError, match="a blend of 32,767 pairs; Megatron takes 32,766 at most"):
            text()


def test_a_path_that_megatron_would_cut(tmp_path: Path) -> None:
    write_corpus(tmp_path / "two words" / "web", documents=5)
    (blend,) = choose_blends(["web=100%"], None, tmp_path / "two words", None)
    with pytest.raises(DataError, match="spaces"):
        write_blend([blend], None, tmp_path / "blend.txt", None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("blends: {a: {sources: {x: 50%}, budget: 1B}}", "add up to 50%"),
        ("blends: {a: {sources: {x: 50%, y: 5B}, budget: 1B}}", "all parts as tokens or all as per cent"),
        ("blends: {a: {sources: {x: 100%}}}", "shares need a budget"),
        ("blends: {a: {sources: {x: 3B}, budget: 4B}}", "do not add up"),
        ("blends: {a: {sources: {x: 0}}}", "above zero"),
        ("blends: {a: {sources: {x: lots}}}", "expected an amount"),
        ("blends: {a: {}}", "names no source"),
        ("blends: {a: {replay: {a: 1B}}}", "'a' is not another blend"),
        ("blends: {a: {replay: {b: 1B}}, b: {replay: {a: 1B}}}", "is not another blend"),
        ("blends: {a: {sources: {x: 1}}}\nfolders: x", "folders"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "blends.yaml").write_text(content)
    with pytest.raises(DataError, match=words):
        blends(tmp_path / "blends.yaml")


def test_commands(prepared: Path, tmp_path: Path) -> None:
    ouro = [str(Path(sys.executable).with_name("ouro")), "data", "blend"]
    shown = subprocess.run([*ouro, str(OURO)], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "66.5" in shown.stdout and "nemotron-cc-high-quality" in shown.stdout
    out = tmp_path / "out.yaml"
    several = subprocess.run([*ouro, str(OURO), "--out", str(out)], capture_output=True, text=True, timeout=60)
    assert several.returncode == 3 and "--stage" in several.stderr and not out.exists()
    one = subprocess.run(
        [*ouro, str(OURO), "--stage", "stage-1", "--out", str(out)], capture_output=True, text=True, timeout=60
    )
    assert one.returncode == 0
    assert yaml.safe_load(out.read_text())["data"]["train"][0] == {"path": "data/ouro/nemotron-cc", "weight": 73.4}
