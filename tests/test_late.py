"""Something is done when a module is imported, now or later, and the import is what it would have been."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from torchdiffeq_symplectic.hosts.late import forget, when_imported

SOURCE = '"""A module of a host."""\n\nVALUE = 3\n\n\ndef double(x):\n    return 2 * x\n'
_numbers = itertools.count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package with a module ``inner``, which nobody has imported."""
    name = f"waited_for_{next(_numbers)}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(f"from {name}.inner import VALUE\n")
    (folder / "inner.py").write_text(SOURCE)
    (folder / "other.py").write_text("VALUE = 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    yield name
    forget(f"{name}.inner")
    for imported in [imported for imported in sys.modules if imported.split(".")[0] == name]:
        del sys.modules[imported]
    assert sys.meta_path == before, "a finder is left behind"


@pytest.fixture
def inner(package: str) -> str:
    """The name of the package's module."""
    return f"{package}.inner"


def rewrite(name: str, source: str, folder: Path) -> None:
    """Give a module another source."""
    folder.joinpath(*name.split(".")).with_suffix(".py").write_text(source)
    importlib.invalidate_caches()


# When it is done.


def test_a_module_that_is_there_already_is_not_waited_for(inner: str) -> None:
    importlib.import_module(inner)
    before, called = list(sys.meta_path), []
    when_imported(inner, lambda: called.append(1))
    assert called == [1]
    assert sys.meta_path == before


def test_it_is_done_once_when_the_module_is_complete(inner: str) -> None:
    seen: list[int] = []
    when_imported(inner, lambda: seen.append(sys.modules[inner].VALUE))
    assert seen == []
    assert inner not in sys.modules
    importlib.import_module(inner)
    assert seen == [3]
    importlib.reload(sys.modules[inner])
    assert seen == [3]


def test_what_is_done_may_import_the_module_itself(inner: str) -> None:
    """As the adapter does, whose patches need the host's names."""
    found: list[ModuleType] = []
    when_imported(inner, lambda: found.append(importlib.import_module(inner)))
    module = importlib.import_module(inner)
    assert found == [module]


def test_a_wish_that_comes_while_another_thread_imports_the_module_is_granted(
    inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    monkeypatch.setattr("builtins.waited_for_events", (begun, may_end), raising=False)
    rewrite(inner, "begun, may_end = waited_for_events\nbegun.set()\nmay_end.wait(10)\nVALUE = 5\n", tmp_path)
    seen: list[int] = []
    importing = threading.Thread(target=importlib.import_module, args=(inner,))
    importing.start()
    assert begun.wait(10)
    threading.Timer(0.1, may_end.set).start()  # the wish may wait for the import to end
    when_imported(inner, lambda: seen.append(sys.modules[inner].VALUE))
    importing.join()
    assert seen == [5]


# Taking it back.


def test_what_is_forgotten_is_not_done(inner: str) -> None:
    before, called = list(sys.meta_path), []
    when_imported(inner, lambda: called.append(1))
    forget(inner)
    assert sys.meta_path == before
    importlib.import_module(inner)
    assert called == []


def test_the_finder_stays_while_another_module_is_waited_for(package: str, inner: str) -> None:
    called: list[str] = []
    when_imported(inner, lambda: called.append("inner"))
    when_imported(f"{package}.other", lambda: called.append("other"))
    importlib.import_module(inner)
    assert called == ["inner"]
    importlib.import_module(f"{package}.other")
    assert called == ["inner", "other"]


# The module is what it would have been.


def attributes(module: ModuleType) -> dict[str, Any]:
    """What the import system says of a module."""
    assert module.__spec__ is not None
    return {
        "loader": (type(module.__loader__), vars(module.__loader__)),
        "same loader": module.__spec__.loader is module.__loader__,
        "spec": {name: value for name, value in vars(module.__spec__).items() if name != "loader"},
        "names": {name for name in vars(module) if name.startswith("__")},
        "file": module.__file__,
        "cached": module.__cached__,
        "package": module.__package__,
        "doc": module.__doc__,
    }


@pytest.mark.parametrize("part", ["inner", ""], ids=["module", "package"])
def test_module_and_loader_are_the_same_with_and_without(part: str, package: str) -> None:
    name = f"{package}.{part}".rstrip(".")
    expected = attributes(importlib.import_module(name))
    for imported in (package, f"{package}.inner"):
        del sys.modules[imported]
    when_imported(name, lambda: None)
    found = attributes(importlib.import_module(name))
    assert found == expected
    assert found["same loader"]


# Errors.


def test_an_error_in_the_module_is_the_users_own_and_the_wish_stays(inner: str, tmp_path: Path) -> None:
    rewrite(inner, "raise ArithmeticError('inside')\n", tmp_path)
    called: list[int] = []
    when_imported(inner, lambda: called.append(1))
    with pytest.raises(ArithmeticError, match="inside"):
        importlib.import_module(inner)
    assert called == []
    assert inner not in sys.modules
    rewrite(inner, SOURCE, tmp_path)
    assert importlib.import_module(inner).VALUE == 3
    assert called == [1]


def test_a_module_that_is_not_there_is_missing_as_ever(package: str) -> None:
    absent = f"{package}.absent"
    importlib.import_module(package)
    when_imported(absent, lambda: None)
    try:
        with pytest.raises(ModuleNotFoundError, match=rf"^No module named '{absent}'$") as caught:
            importlib.import_module(absent)
        assert caught.value.name == absent
        assert importlib.util.find_spec(absent) is None
    finally:
        forget(absent)


# Beside other finders.


class Asking(importlib.abc.MetaPathFinder):
    """Another package's hook of the same make: asks all finders, itself left out."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        self.asked += 1
        specs = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        return next((spec for spec in specs if spec is not None), None)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_another_hook_of_the_same_make_is_asked_too(inner: str, first: str) -> None:
    called: list[str] = []
    other = Asking(inner)
    try:
        if first == "theirs":
            when_imported(inner, lambda: called.append("ours"))
        sys.meta_path.insert(0, other)
        if first == "ours":
            when_imported(inner, lambda: called.append("ours"))
        importlib.import_module(inner)
    finally:
        sys.meta_path.remove(other)
    assert called == ["ours"]
    assert other.asked
