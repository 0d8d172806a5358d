"""What counts as a checkpoint, which one is taken, which go."""

import json
from pathlib import Path

import pytest

from ouro_megatron.checkpoint.folder import (
    MARKER,
    mark_complete,
    newest,
    problem_with,
    prune,
    remove_incomplete,
    resolve,
    step_folder,
    step_folders,
)
from ouro_megatron.checkpoint.state import check_same_model
from ouro_megatron.errors import CheckpointError


def make(root: Path, step: int, *, complete: bool = True) -> Path:
    folder = step_folder(root, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "weights.distcp").write_bytes(b"x" * 100)
    if complete:
        mark_complete(folder)
    return folder


def test_newest_complete_one_is_taken_and_the_rest_named(tmp_path: Path) -> None:
    good = make(tmp_path, 10)
    make(tmp_path, 20)
    make(tmp_path, 30, complete=False)
    (step_folder(tmp_path, 20) / "weights.distcp").write_bytes(b"x" * 50)
    found = resolve(tmp_path)
    assert found.folder == good
    assert len(found.skipped) == 2
    assert "step-00000030" in found.skipped[0] and MARKER in found.skipped[0]
    assert "weights.distcp has 50 bytes, 100 were written" in found.skipped[1]


def test_a_run_folder_leads_to_its_checkpoints(tmp_path: Path) -> None:
    good = make(tmp_path / "run" / "checkpoints", 10)
    assert resolve(tmp_path / "run").folder == good
    assert resolve(good).folder == good


@pytest.mark.parametrize("damage", ["missing", "marker", "truncated", "no marker"])
def test_damaged_checkpoint_asked_for_by_name(tmp_path: Path, damage: str) -> None:
    folder = make(tmp_path, 10)
    if damage == "missing":
        (folder / "weights.distcp").unlink()
    elif damage == "marker":
        (folder / MARKER).write_text("{")
    elif damage == "truncated":
        (folder / "state.json").write_text("")
    else:
        (folder / MARKER).unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        resolve(folder)
    assert newest(tmp_path) is None


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve(tmp_path)


def test_prune_keeps_the_newest_and_the_permanent(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        make(tmp_path, step)
    make(tmp_path, 60, complete=False)
    deleted = prune(tmp_path, keep_last=2, is_permanent=lambda step: step == 20)
    assert [path.name for path in deleted] == ["step-00000010", "step-00000030"]
    assert [path.name[-2:] for path in step_folders(tmp_path)] == ["20", "40", "50", "60"]


def test_prune_counts_those_on_schedule_and_lets_those_of_stops_go_first(tmp_path: Path) -> None:
    for step in (10, 20, 25, 30, 33):
        make(tmp_path, step)
    prune(tmp_path, keep_last=2, is_permanent=lambda step: False, is_scheduled=lambda step: step % 10 == 0)
    assert [path.name[-2:] for path in step_folders(tmp_path)] == ["20", "30", "33"]


def test_leftovers_of_interrupted_saves(tmp_path: Path) -> None:
    make(tmp_path, 10)
    broken = make(tmp_path, 20, complete=False)
    assert remove_incomplete(tmp_path) == [broken]
    assert problem_with(step_folder(tmp_path, 10)) is None


def test_other_model_is_named_field_by_field(tmp_path: Path) -> None:
    saved = {"model": {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": None, "vocab": 64, "loops": 4}}
    same = json.loads(json.dumps(saved))
    same["model"].update(kv_heads=4, loops=8)
    check_same_model(saved, same, tmp_path)
    other = json.loads(json.dumps(saved))
    other["model"].update(layers=8, vocab=128)
    with pytest.raises(CheckpointError) as caught:
        check_same_model(saved, other, tmp_path)
    for words in ("model.layers: the checkpoint has 4, the recipe 8", "model.vocab", "ouro upcycle"):
        assert words in str(caught.value)
