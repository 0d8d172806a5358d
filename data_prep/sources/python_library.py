"""Text that every machine with Python has: the standard library's sources, and the English prose inside it.

Documents of a module's code and of its docstrings share the module's path as key, so that prose held out for
validation is not in the training part of the code either.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_prep.formats.files import local_file
from data_prep.sources.base import Document, Fault, Report, SourceBase, Unit
from ouro_megatron.errors import DataError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib2to3"}
_SHORT_DOCSTRING = 200
"""Characters; shorter docstrings are labels rather than prose."""


def _modules() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(file for file in root.rglob("*.py") if not _LEFT_OUT.intersection(file.relative_to(root).parts))
    if not found:
        raise DataError(f"this Python has no library sources at {root} (a zipped or stripped installation?)")
    return found


def _key(file: Path) -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    return str(file.relative_to(root)) if file.is_relative_to(root) else file.name


def _source(file: Path, report: Report) -> str:
    try:
        # A few library files are deliberately not UTF-8; their odd characters do not matter here.
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        report(Fault(str(file), "byte 0", f"cannot be read: {error.strerror}", ends_unit=True))
        return ""


class PythonStdlib(SourceBase):
    """Code: one document a module of the running Python's standard library, without its tests."""

    kind: Literal["python_stdlib"]

    def units(self, target_bytes: int) -> list[Unit]:
        return [local_file(file).unit() for file in _modules()]

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        file = Path(unit.path)
        text = _source(file, report)
        if text.strip():
            yield Document(_key(file), text)


class PythonProse(SourceBase):
    """English prose: the topics of `help()`, and the longer docstrings of each module as one document."""

    kind: Literal["python_prose"]

    def units(self, target_bytes: int) -> list[Unit]:
        import pydoc_data.topics

        return [local_file(file).unit() for file in (Path(pydoc_data.topics.__file__), *_modules())]

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        file = Path(unit.path)
        if file.name == "topics.py" and file.parent.name == "pydoc_data":
            yield from _topics()
            return
        prose = "\n\n".join(_docstrings(_source(file, report)))
        if prose:
            yield Document(_key(file), prose + "\n")


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topic/{name}", text.strip() + "\n")


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates and deliberately broken examples hold no documentation
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORT_DOCSTRING:
                yield text.strip()
