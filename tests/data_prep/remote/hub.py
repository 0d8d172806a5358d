"""A Hub of Hugging Face in small: serves folders as datasets, with as much of its HTTP interface as reading needs."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Headers = Mapping[str, str]
_GATED = "Access to dataset is restricted and you are not in the authorized list."


@dataclass
class Repository:
    folders: dict[str, Path]
    """By revision; "main" must be there."""
    readers: frozenset[str] | None = None
    """Tokens of those who accepted the terms; None: the files are for everybody. What files there are is public."""
    private: bool = False
    """Those without such a token do not even learn that it exists."""


@dataclass
class Hub:
    url: str = ""
    datasets: dict[str, Repository] = field(default_factory=dict)
    """By OWNER/NAME."""
    requests: list[str] = field(default_factory=list)
    """Method, path and range of each request so far."""
    failures: int = 0
    """So many of the next requests for a file's bytes are answered with 503."""


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: Any) -> None:
        """Not to the console."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        try:
            if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
                self._send_json(self._api("/".join(parts[2:4]), parts[4:], address.query, body))
            elif parts[0] == "datasets" and parts[3:4] == ["resolve"] and len(parts) > 5:
                self._send_file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
            elif parts[:2] == ["api", "models"]:
                raise _Refused(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            else:
                raise _Refused(404)
        except _Refused as refused:
            self._send(refused.status, {**refused.headers, "Content-Type": "text/plain"}, str(refused).encode())

    def _repository(self, name: str) -> Repository:
        found = self.hub.datasets.get(name)
        if found is None or (found.private and not self._may_read(found)):
            # Who is not logged in is not told whether a dataset is private or not there.
            raise _Refused(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        return found

    def _folder(self, name: str, revision: str) -> Path:
        folders = self._repository(name).folders
        by_commit = {_commit(name, each): folder for each, folder in folders.items()}
        folder = folders.get(revision) or by_commit.get(revision)
        if folder is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return folder

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_read(self, repository: Repository) -> bool:
        return repository.readers is None or self._token() in repository.readers

    def _api(self, name: str, rest: list[str], query: str, body: bytes) -> Any:
        """GET of the repository itself or revision/REVISION, of tree/REVISION/PATH, POST to paths-info/REVISION."""
        revision = rest[1] if len(rest) > 1 else "main"
        folder = self._folder(name, revision)
        what = rest[0] if rest else "revision"
        if what == "revision":
            gated = "auto" if self._repository(name).readers is not None else False
            files = [{"rfilename": entry["path"]} for entry in _tree(folder, folder, True) if entry["type"] == "file"]
            return {
                "_id": "0",
                "id": name,
                "sha": _commit(name, revision),
                "gated": gated,
                "private": False,
                "tags": [],
                "siblings": files,
            }
        if what == "tree":
            inside = folder.joinpath(*rest[2:])
            if not inside.is_dir():
                raise _Refused(404, "EntryNotFound", f"{'/'.join(rest[2:])} does not exist")
            return list(_tree(folder, inside, "recursive=true" in query.lower()))
        if what == "paths-info":
            wanted = json.loads(body)["paths"]
            return [entry for entry in _tree(folder, folder, True) if entry["path"] in wanted]
        raise _Refused(404)

    def _send_json(self, content: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _send_file(self, name: str, revision: str, path: str) -> None:
        file = self._folder(name, revision) / path
        if not self._may_read(self._repository(name)):
            raise _Refused(403 if self._token() else 401, "GatedRepo", _GATED)
        if not file.is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if self.hub.failures > 0:
            self.hub.failures -= 1
            raise _Refused(503)
        content = file.read_bytes()
        headers = {
            "ETag": f'"{_oid(content)}"',
            "X-Repo-Commit": _commit(name, revision),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, headers, content)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(len(content), int(last or len(content) - 1) + 1)
        if start >= len(content):
            raise _Refused(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, headers, content[start:stop])

    def _send(self, status: int, headers: Headers, body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(root: Path, folder: Path, recursive: bool) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            yield {"type": "directory", "oid": _oid(name.encode()), "size": 0, "path": name}
            if recursive:
                yield from _tree(root, path, True)
        else:
            yield {"type": "file", "oid": _oid(path.read_bytes()), "size": path.stat().st_size, "path": name}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _commit(name: str, revision: str) -> str:
    """The id of the commit that a branch or tag is at; that of a commit is itself."""
    return revision if len(revision) == 40 else hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
