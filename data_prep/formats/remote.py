"""Files behind fsspec URLs: listed, opened, and read again at the same place after a hiccup of the network."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from data_prep.formats.remote_errors import describe, endpoint_note, explain, is_lasting
from data_prep.formats.seekable import SeekableFile
from ouro_megatron.errors import DataError

_FIRST_WAIT = 1.0
"""Seconds before the second try; doubled for each further one."""
_LONGEST_WAIT = 15.0
_PATIENCE = 60.0
"""Seconds after which there is no further try: networks fail for a while, and a run must outlive that."""
_FIRST_PATIENCE = 15.0
"""The same for listing, with which a run begins: a wrong address should be told soon."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "data"}
"""Schemes whose packages an extra of this project brings."""
_S3 = {
    # Tries within tries multiply: with botocore's own ones an endpoint that is down would take minutes to be told.
    "config_kwargs": {"retries": {"total_max_attempts": 1}},
    # s3fs reads 50 MiB at a time, which a worker would hold for each open file.
    "default_block_size": 8 << 20,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"s3": _S3, "s3a": _S3}
_IDENTITIES = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime", "created")
"""What filesystems call that which changes when a file is written again."""

Options = Mapping[str, Any]


class Listed(NamedTuple):
    """A file as a listing tells it."""

    url: str
    size: int
    stamp: str
    """Changes when the file is written again."""


def filesystem(path: str, options: Options) -> Any:
    """The fsspec filesystem of a URL. Raises DataError naming the package that is missing."""
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f'{path}: URLs need fsspec; install it with: pip install "ouro-megatron[data]"') from error
    try:
        return fsspec.core.url_to_fs(path, **_with_defaults(path, options))[0]
    except ImportError as error:
        extra = next((extra for scheme, extra in _EXTRAS.items() if _has_scheme(path, scheme)), None)
        hint = f'; install it with: pip install "ouro-megatron[{extra}]"' if extra else ""
        raise DataError(f"{path}: {error}{hint}") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error


def _with_defaults(path: str, options: Options) -> dict[str, Any]:
    """fsspec takes options under a scheme's name for that scheme; those without one go before them."""
    defaults = {
        scheme: {**found, **options.get(scheme, {})} for scheme, found in _DEFAULTS.items() if _has_scheme(path, scheme)
    }
    return {**options, **defaults}


def _has_scheme(path: str, scheme: str) -> bool:
    return re.search(rf"(^|::){scheme}://", path) is not None


def list_remote(path: str, matches: Callable[[str], bool], options: Options) -> Iterator[Listed]:
    """`path` itself when it is a file, else the files below it whose names from there on match; in no order.

    Raises DataError when it cannot be listed; a path that is not there has no files.
    """
    system = filesystem(path, options)
    root = system._strip_protocol(path)
    for name, info in again(lambda: _find(system, root), path, "cannot be listed", _FIRST_PATIENCE).items():
        relative = name[len(root) :] if name.startswith(root) else name
        # An object called FOLDER/ is what browsers of buckets make in place of a folder.
        if not name.endswith("/") and (not relative or matches(relative.lstrip("/"))):
            yield Listed(system.unstrip_protocol(name), int(info["size"] or 0), _stamp(info))


def _find(system: Any, root: str) -> dict[str, Any]:
    """Raises FileNotFoundError when the service says more than that nothing is there."""
    system.invalidate_cache()  # a second run in one process must see what is new
    try:
        return dict(system.find(root, detail=True))
    except FileNotFoundError as error:
        if error.__cause__ is None:
            return {}
        raise


def _stamp(info: Mapping[str, Any]) -> str:
    name = next((name for name in _IDENTITIES if info.get(name)), None)
    return str(info["size"]) if name is None else f"{info['size']}-{info[name]}"


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether these are no longer of the same content. A listing may know other fields than the file itself."""
    if one["size"] != other["size"]:
        return True
    for name in _IDENTITIES:
        if one.get(name) and other.get(name):
            return str(one[name]).strip('"') != str(other[name]).strip('"')
    return False


class RemoteFile(SeekableFile):
    """A remote file that is opened anew, at the same place, when reading from it fails.

    Raises DataError when it cannot be opened, and at a read when it became another file meanwhile.
    """

    def __init__(self, path: str, options: Options) -> None:
        self._path = path
        self._system = filesystem(path, options)
        self._file: Any = None
        self._failed = False
        self._info = again(lambda: self._system.info(path), path, "cannot be opened")
        super().__init__(int(self._info["size"] or 0))

    def readinto(self, buffer: Any) -> int:
        data = again(lambda: self._read(len(buffer)), self._path, f"cannot be read at byte {self.at}")
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            if self._file.tell() != self.at:
                self._file.seek(self.at)
            return self._file.read(count)
        except Exception:
            self._file = None
            self._failed = True
            raise

    def _open(self) -> Any:
        if self._failed:
            # What is read from here on belongs to what was read before only if the file is still the same one.
            self._system.invalidate_cache(self._path)
            if _differ(self._info, self._system.info(self._path)):
                raise DataError(f"{self._path}: was written again while it was being read; run the command again")
        return self._system.open(self._path, "rb")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def again(action: Callable[[], Any], path: str, what: str, patience: float | None = None) -> Any:
    """The result of `action`, tried until it succeeds or `patience` is over.

    Raises DataError with the last error, at once when it is one that no further try can change.
    """
    begun, wait, tries = time.monotonic(), _FIRST_WAIT, 0
    while True:
        tries += 1
        try:
            return action()
        except DataError:
            raise
        except Exception as error:  # every filesystem has exceptions of its own
            if is_lasting(error):
                raise DataError(f"{path}: {explain(path, error)}{endpoint_note(path)}") from error
            if time.monotonic() - begun + wait > (_PATIENCE if patience is None else patience):
                tried = "once" if tries == 1 else f"{tries} times"
                raise DataError(f"{path}: {what}, tried {tried}: {describe(error)}{endpoint_note(path)}") from error
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
