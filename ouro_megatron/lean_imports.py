"""Imports torch and Megatron-Core in half of the time they take, which every rank's start waits for.

Python's garbage collector looks again and again at millions of objects that all stay: it rests meanwhile. Megatron-Core
wraps functions in `torch.compile` while it is imported, and that imports the whole compiler: here this waits until such
a function is called. It also imports wandb for an inference engine that this project does not use.
"""

import atexit
import functools
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install() -> None:
    """From now on these packages are imported so, wherever that happens first; those that are imported already stay."""
    packages = {"torch": (_uncollected,), "megatron.core": (_uncollected, _compiling_later, _without_wandb)}
    sys.meta_path.insert(0, _Finder({name: ways for name, ways in packages.items() if name not in sys.modules}))


Ways = Sequence[Callable[[], AbstractContextManager[None]]]


class _Finder(MetaPathFinder):
    """Finds what the others find, each package once."""

    def __init__(self, packages: dict[str, Ways]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ways = self._packages.pop(fullname, None)
        spec = None if ways is None else importlib.util.find_spec(fullname)
        if ways is not None and spec is not None and spec.loader is not None:
            spec.loader = _InContext(spec.loader, ways)
        return spec


class _InContext(Loader):
    """Another loader, which runs the module inside of context managers."""

    def __init__(self, loader: Loader, ways: Ways) -> None:
        self._loader, self._ways = loader, ways

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        with ExitStack() as stack:
            for way in self._ways:
                stack.enter_context(way())
            self._loader.exec_module(module)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection; what is there afterwards is left out of those to come."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or extension modules complain at the end that their objects stay
            gc.enable()


@contextmanager
def _compiling_later() -> Iterator[None]:
    import torch

    compile_now = torch.compile
    setattr(torch, "compile", functools.partial(compiled_when_called, compile_now))  # noqa: B010 - not for mypy
    try:
        yield
    finally:
        setattr(torch, "compile", compile_now)  # noqa: B010


@contextmanager
def _without_wandb() -> Iterator[None]:
    """Importing it fails as if it were not installed, unless it is imported already."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


def compiled_when_called(
    compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """What `compile_now` (`torch.compile`) makes of a function, made at its first call; also a decorator's factory."""
    if function is None:
        return functools.partial(compiled_when_called, compile_now, **options)
    original = function
    made: list[Callable[..., Any]] = []

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():  # part of another compiled function
            return original(*args, **kwargs)
        if not made:
            made.append(compile_now(original, **options))
        return made[0](*args, **kwargs)

    return call
