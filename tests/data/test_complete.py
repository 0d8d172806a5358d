"""A training recipe over a source that was prepared as several pairs."""

from pathlib import Path

import pytest

from ouro_megatron.data.complete import complete
from ouro_megatron.data.indexed import check_prefix, pairs_of
from ouro_megatron.errors import DataError
from tests.tiny import VOCAB, tiny_recipe, write_corpus


def test_weight_is_shared_out_over_pairs_by_their_tokens(tmp_path: Path) -> None:
    for number, documents in enumerate((10, 30)):
        write_corpus(tmp_path / f"web-{number:05d}-of-00002", documents=documents, seed=number)
    write_corpus(tmp_path / "web-code", documents=5)
    entries = [{"path": str(tmp_path / "web"), "weight": 3.0}, {"path": str(tmp_path / "web-code"), "weight": 1.0}]
    recipe = tiny_recipe(tmp_path, data={"train": entries})
    train = complete(recipe).data.train
    tokens = [check_prefix(tmp_path / f"web-{number:05d}-of-00002", VOCAB).tokens for number in range(2)]
    assert [entry.path.name for entry in train] == ["web-00000-of-00002", "web-00001-of-00002", "web-code"]
    assert [entry.share for entry in train] == pytest.approx(
        [3 * tokens[0] / sum(tokens), 3 * tokens[1] / sum(tokens), 1]
    )
    assert complete(complete(recipe)) == complete(recipe)
    assert complete(recipe).data.validation == recipe.data.validation

    # Without weights each pair counts by its tokens, as one pair of the whole would.
    whole = tiny_recipe(
        tmp_path, data={"train": [{"path": str(tmp_path / "web")}]}, budget={"total": None, "epochs": 2}
    )
    filled = complete(whole)
    assert [entry.share for entry in filled.data.train] == tokens
    assert filled.budget.total is not None and filled.budget.total.tokens == 2 * sum(tokens)


def test_pairs_that_are_missing_or_mixed(tmp_path: Path) -> None:
    assert pairs_of(tmp_path / "nowhere" / "web") == [tmp_path / "nowhere" / "web"]
    for name in ("web-00000-of-00003", "web-00002-of-00003"):
        write_corpus(tmp_path / name, documents=2)
    with pytest.raises(DataError, match="2 of the 3 pairs web-00000-of-00003"):
        pairs_of(tmp_path / "web")
    write_corpus(tmp_path / "web-00001-of-00003", documents=2)
    assert len(pairs_of(tmp_path / "web")) == 3
    write_corpus(tmp_path / "web-00000-of-00001", documents=2)
    with pytest.raises(DataError, match="several runs"):
        pairs_of(tmp_path / "web")
    write_corpus(tmp_path / "web", documents=2)
    assert pairs_of(tmp_path / "web") == [tmp_path / "web"]
