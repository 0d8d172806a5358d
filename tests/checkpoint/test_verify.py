"""Damage that sizes do not show: found by hashes, named, set aside."""

import json
from pathlib import Path

import pytest

from ouro_megatron.checkpoint.folder import MARKER, mark_complete, problem_with, resolve, set_aside, step_folders
from ouro_megatron.checkpoint.hashes import hash_of
from ouro_megatron.checkpoint.verify import check_contents, damage
from ouro_megatron.errors import CheckpointError
from tests.checkpoint.test_folder import make
from tests.distributed.ranks import run_ranks


def flip(path: Path, at: int = 50) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_is_found_and_its_file_named(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    assert damage(folder) is None
    flip(folder / "weights.distcp")
    assert problem_with(folder) is None  # the size is right
    with pytest.raises(CheckpointError, match=r"step-00000010 is damaged: weights\.distcp has changed"):
        check_contents(folder)


def test_hashes_that_ranks_brought_along_are_not_made_again(tmp_path: Path) -> None:
    folder = make(tmp_path, 10, complete=False)
    mark_complete(folder, {"weights.distcp": "from the rank that wrote it"})
    hashes = json.loads((folder / MARKER).read_text())["hashes"]
    assert hashes["weights.distcp"] == "from the rank that wrote it"
    assert hashes["state.json"] == hash_of(folder / "state.json")
    assert "weights.distcp" in (damage(folder) or "")


def test_a_checkpoint_without_hashes_is_checked_by_its_sizes(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    (folder / MARKER).write_text(json.dumps({"files": json.loads((folder / MARKER).read_text())["files"]}))
    flip(folder / "weights.distcp")
    assert damage(folder) is None
    (folder / "weights.distcp").write_bytes(b"short")
    assert "5 bytes, 100 were written" in (damage(folder) or "")


def test_set_aside_is_out_of_the_way_and_never_overwrites(tmp_path: Path) -> None:
    for expected in ("step-00000010.corrupt", "step-00000010.corrupt-2"):
        assert set_aside(make(tmp_path, 10)).name == expected
    assert step_folders(tmp_path) == []


def test_known_damage_is_passed_over(tmp_path: Path) -> None:
    good, bad = make(tmp_path, 10), make(tmp_path, 20)
    found = resolve(tmp_path, {bad: "a bit is flipped"})
    assert found.folder == good and "a bit is flipped" in found.skipped[0]


def shared(folder: Path, rank_count: int) -> str | None:
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    return damage(folder, int(os.environ["RANK"]), rank_count)


@pytest.mark.distributed
def test_ranks_share_the_files_and_agree(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    assert run_ranks(shared, 2, folder, 2) == [None, None]
    flip(folder / "weights.distcp")
    answers = run_ranks(shared, 2, folder, 2)
    assert answers[0] == answers[1] and "weights.distcp" in (answers[0] or "")
