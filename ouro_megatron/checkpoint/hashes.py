"""Hashes of a checkpoint's files: what was written is what is read, or the file is named."""

from pathlib import Path

import xxhash

ALGORITHM = "xxh3_128"
"""Finds every accident (a flipped bit, a lost page, a short copy) at memory speed; it does not keep out forgers."""
_CHUNK = 8 * 2**20


def hash_of(path: Path) -> str:
    """Hexadecimal XXH3 (128 bits) of a file. Raises OSError when it cannot be read."""
    state = xxhash.xxh3_128()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            state.update(view[:size])
    return state.hexdigest()
