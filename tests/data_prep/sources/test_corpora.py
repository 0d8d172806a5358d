"""Every kind of source on a small corpus in its real shape: each document once, in order, however it is cut."""

from pathlib import Path
from typing import get_args

import pytest

from data_prep.fixtures import MAKERS, make_fixture
from data_prep.sources.registry import AnySource
from tests.data_prep.sources.reading import read_all


def test_every_kind_has_a_maker() -> None:
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(AnySource)}
    assert kinds - {"python_stdlib", "python_prose"} == set(MAKERS)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_document_once(kind: str, tmp_path: Path) -> None:
    made = make_fixture(kind, tmp_path)
    documents, faults = read_all(made.settings)
    assert not faults
    assert [document.text for document in documents if document.messages is None] == list(made.texts)
    assert [document.messages for document in documents if document.messages is not None] == list(made.conversations)
    assert made.texts or made.conversations
    assert all(document.key for document in documents)


@pytest.mark.parametrize("kind", sorted(set(MAKERS) - {"datasets"}))
def test_small_units_give_the_same_documents(kind: str, tmp_path: Path) -> None:
    made = make_fixture(kind, tmp_path)
    whole, _ = read_all(made.settings)
    for target in (100, 700):
        cut, faults = read_all(made.settings, target)
        assert not faults
        assert cut == whole
