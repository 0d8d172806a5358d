"""Checkpoint folders on disk: what makes one complete, which is the newest, which may go.

    runs/demo/1-stable/checkpoints/
      step-00000040/
        *.distcp, .metadata, metadata.json, common.pt    Megatron-Core's distributed checkpoint
        state.json                                       counters, recipe, history, data fingerprint
        complete.json                                    written last: sizes and hashes of all other files
      step-00000030.corrupt/                             set aside: did not agree with its marker

A folder without a complete.json that agrees with its files is never loaded.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ouro_megatron.checkpoint.hashes import ALGORITHM, hash_of
from ouro_megatron.errors import CheckpointError

MARKER = "complete.json"
STATE = "state.json"
TOKENIZER_FOLDER = "tokenizer"
"""Beside the tensors of a checkpoint that was imported: its tokenizer came with it."""
_STEP = re.compile(r"^step-(\d{8,})$")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None when it is named otherwise."""
    match = _STEP.match(folder.name)
    return int(match.group(1)) if match else None


def step_folders(root: Path) -> list[Path]:
    """All step folders under `root`, complete or not, oldest first."""
    if not root.is_dir():
        return []
    found = [(step_of(child), child) for child in root.iterdir() if child.is_dir()]
    return [child for step, child in sorted((step, child) for step, child in found if step is not None)]


def write_json(path: Path, value: object) -> None:
    """Writes whole or not at all: a temporary file, flushed to disk, takes the name."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MARKER
    }


def mark_complete(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Makes the folder count as a checkpoint. One rank calls it, after all files of all ranks are on disk.

    `hashes` by file name are taken as they are; files that are not in it are read and hashed here.
    """
    sizes = _sizes(folder)
    known = hashes or {}
    digests = {name: known.get(name) or hash_of(folder / name) for name in sizes}
    write_json(folder / MARKER, {"files": sizes, "hash": ALGORITHM, "hashes": digests})
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the marker's name, too, must survive a power cut
    finally:
        os.close(handle)


def read_marker(folder: Path) -> dict[str, Any]:
    """`files` (name -> bytes) and `hashes` (name -> hash) of complete.json; no hashes in one of an older version.

    Raises CheckpointError when it is missing or unreadable.
    """
    marker = folder / MARKER
    if not marker.is_file():
        raise CheckpointError(f"{MARKER} is missing: the save was interrupted")
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        files, hashes = dict(content["files"]), dict(content.get("hashes", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MARKER} cannot be read ({error})") from error
    return {"files": files, "hashes": hashes if content.get("hash") == ALGORITHM else {}}


def problem_with(folder: Path) -> str | None:
    """Why `folder` is not a complete checkpoint, naming the file; None when it is one.

    Looks at names and sizes; `checkpoint/verify.py` reads the contents.
    """
    try:
        files = read_marker(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, size in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    return None


@dataclass(frozen=True)
class Resolved:
    """The checkpoint a path led to, and what was passed over on the way."""

    folder: Path
    skipped: list[str]
    """One sentence for each newer folder that is not complete."""


def resolve(path: Path, damaged: Mapping[Path, str] | None = None) -> Resolved:
    """The checkpoint at `path`: the folder itself, or the newest complete one under it or under its checkpoints/.

    `damaged`: folders that are known to be unusable though their sizes are right, and why.
    Raises CheckpointError when there is none, with the reason for each candidate.
    """
    damaged = damaged or {}
    if (path / STATE).is_file() or (path / MARKER).is_file():
        problem = problem_with(path) or damaged.get(path)
        if problem:
            raise CheckpointError(f"{path} is not a complete checkpoint: {problem}")
        return Resolved(path, [])
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint folder or a folder of checkpoints")
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    skipped: list[str] = []
    for folder in reversed(step_folders(root)):
        problem = problem_with(folder) or damaged.get(folder)
        if problem is None:
            return Resolved(folder, skipped)
        skipped.append(f"{folder} is not complete: {problem}")
    reasons = "".join(f"\n  {line}" for line in skipped)
    raise CheckpointError(f"no complete checkpoint under {root}{reasons}")


def newest(root: Path) -> Resolved | None:
    """Like `resolve` on a run's own checkpoints/; None when nothing was ever saved there completely."""
    try:
        return resolve(root) if step_folders(root) else None
    except CheckpointError:
        return None


def prune(root: Path, keep_last: int, is_permanent: Callable[[int], bool]) -> list[Path]:
    """Deletes all but the newest `keep_last` complete checkpoints and the permanent ones; returns what was deleted.

    The marker goes first: a deletion that is interrupted leaves a folder that is not taken for whole.
    """
    complete = [folder for folder in step_folders(root) if problem_with(folder) is None]
    deleted = []
    for folder in complete[: max(0, len(complete) - keep_last)]:
        step = step_of(folder)
        assert step is not None
        if is_permanent(step):
            continue
        remove(folder)
        deleted.append(folder)
    return deleted


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint to step-N.corrupt, where nothing looks for checkpoints; returns the new path."""
    target = folder.with_name(f"{folder.name}.corrupt")
    count = 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.corrupt-{count}")
    folder.rename(target)
    return target


def remove(folder: Path) -> None:
    """Deletes a checkpoint folder, its marker first."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def remove_incomplete(root: Path) -> list[Path]:
    """Deletes what interrupted saves left behind; returns it."""
    broken = [folder for folder in step_folders(root) if not (folder / MARKER).is_file()]
    for folder in broken:
        shutil.rmtree(folder, ignore_errors=True)
    return broken
