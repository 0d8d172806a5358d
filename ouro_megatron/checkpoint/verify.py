"""Reads a checkpoint's files and compares them with the hashes in its marker."""

from pathlib import Path

import torch.distributed as dist

from ouro_megatron.checkpoint.folder import problem_with, read_marker
from ouro_megatron.checkpoint.hashes import hash_of
from ouro_megatron.errors import CheckpointError


def damage(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Why the contents of `folder` cannot be trusted, naming the file; None when all is as it was written.

    The ranks share the files out by size, so that each reads about 1/world_size of the bytes; all ranks call it
    together and get the same answer. A checkpoint of a version that wrote no hashes is checked by its sizes only.
    """
    problem = problem_with(folder) or _share(folder, rank, world_size)
    if world_size == 1:
        return problem
    found: list[str | None] = [None] * world_size
    dist.all_gather_object(found, problem)
    return next((text for text in found if text is not None), None)


def _share(folder: Path, rank: int, world_size: int) -> str | None:
    marker = read_marker(folder)
    sizes, hashes = marker["files"], marker["hashes"]
    by_size = sorted(hashes, key=lambda name: (-sizes.get(name, 0), name))
    for name in by_size[rank::world_size]:
        try:
            found = hash_of(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != hashes[name]:
            return f"{name} has changed since it was written (hash {found}, {hashes[name]} was written)"
    return None


def check_contents(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """`damage` as an error: CheckpointError on every rank when a file is not what was written."""
    problem = damage(folder, rank, world_size)
    if problem is not None:
        raise CheckpointError(f"{folder} is damaged: {problem}. Copy it again, or use an earlier checkpoint")
