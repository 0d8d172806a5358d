"""Keeps two runs from merging into the same folder at one time."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ouro_megatron.errors import DataError


@contextmanager
def locked(folder: Path, *, shared: bool) -> Iterator[None]:
    """Holds FOLDER/lock: many at one time when shared, else alone. Freed when the process ends, however it does.

    Raises DataError when another process is in the way. File systems without locks are used without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DataError(
                    f"{folder.parent}: another `ouro data` run works on this output; wait for it or stop it"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
