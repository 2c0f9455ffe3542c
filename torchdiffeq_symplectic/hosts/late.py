"""Doing something when a module is imported, now or later: for hosts that are slow to import and may never be."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["forget", "when_imported"]


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call ``action()`` once the module ``name`` is imported: at once if it is already."""
    module = sys.modules.get(name)
    if module is not None and getattr(module.__spec__, "_initializing", False):
        importlib.import_module(name)  # waits for a thread that is at it; comes back at once if it is this one
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action()
        return
    _finder.actions[name] = action
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def forget(name: str) -> None:
    """Take back what `when_imported` was asked to do and has not done yet."""
    _finder.actions.pop(name, None)
    if not _finder.actions and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are waited for, by asking all other finders."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[], None]] = {}
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions or getattr(self._asking, "now", False):
            return None
        self._asking.now = True  # others may ask all finders, too
        try:
            for finder in sys.meta_path:
                find_spec = getattr(finder, "find_spec", None)
                spec = None if finder is self or find_spec is None else find_spec(fullname, path, target)
                if spec is not None and spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                    return spec  # type: ignore[no-any-return]
        finally:
            self._asking.now = False
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module by its own loader, puts that back in its place, and does what was asked for."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        action = _finder.actions.get(module.__name__)
        forget(module.__name__)
        if action is not None:
            action()


_finder = _Finder()
