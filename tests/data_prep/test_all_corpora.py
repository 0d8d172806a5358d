"""Every corpus there is a reader for, in one recipe, through the whole pipeline with two workers."""

from pathlib import Path
from typing import Any

import yaml

from data_prep.fixtures.makers import MAKERS, make_fixture
from data_prep.look import documents, stats
from data_prep.plan import find_prefixes, list_units, save_units
from data_prep.prepare import load_data_recipe, prepare
from data_prep.verify import verify
from tests.data_prep.test_chat import write_chat_tokenizer
from tests.data_prep.test_prepare import Lines


def test_all_corpora(tmp_path: Path) -> None:
    made = {kind: make_fixture(kind, tmp_path / "raw" / kind) for kind in MAKERS}
    values: dict[str, Any] = {
        "output": str(tmp_path / "out"),
        "tokenizer": {"kind": "existing", "path": str(write_chat_tokenizer(tmp_path / "tokenizer"))},
        "validation_fraction": 0,
        "max_fault_rate": 0,
        "shard_bytes": 20_000,
        "sources": [{"name": kind, **found.settings} for kind, found in made.items()],
    }
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump(values))
    recipe = load_data_recipe(file)
    units = list_units(recipe)
    save_units(recipe, units)
    assert list_units(recipe, saved=True) == units
    prepare(recipe, Lines(), workers=2)
    for kind, found in made.items():
        (prefix,) = find_prefixes(tmp_path / "out", kind, "train")
        assert "equals its manifest" in verify(prefix), kind
        count = len(found.texts) + len(found.conversations)
        described = stats(prefix)
        assert described.documents == count, kind
        assert (described.counted < described.tokens) == bool(found.conversations), kind
        shown = list(documents(prefix, 0, count, None))
        # Rows that are no conversation stay plain text, all of which counts.
        plain = [item for item in shown if item.loss is None or all(item.loss)]
        assert [item.text.removesuffix("</s>") for item in plain] == list(found.texts), kind
        talks = [item for item in shown if item not in plain]
        for item, talk in zip(talks, found.conversations, strict=True):
            learned = "".join(run.text for run in item.runs if run.counts)
            answers = [turn["content"].strip() for turn in talk if turn["role"] == "assistant"]
            assert all(answer in learned for answer in answers), kind
