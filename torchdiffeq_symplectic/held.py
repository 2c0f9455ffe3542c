"""What callables hold: modules and tensors, searched for wherever users keep them."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Held", "Place", "refuse_sharded", "search"]


Place = tuple[MutableMapping[Any, Any] | list[Any] | types.CellType, Any]
"""Where a tensor is kept: a dictionary and its key, a list and its index, or the cell of a closure and None."""


class Held(NamedTuple):
    """What callables hold.

    Attributes:
        modules: every module, each once.
        tensors: every tensor, parameters and buffers too, each once.
        places: where modules, plain objects, closures and globals keep them.
        constants: where these keep numbers, strings and the like.
    """

    modules: list[nn.Module]
    tensors: list[Tensor]
    places: list[Place]
    constants: list[Place]


# So many objects are looked at; a trainer's method may hold a data set.
_SEARCHED = 5000
_PLAIN = (str, bytes, int, float, complex, type, type(None), types.ModuleType, types.BuiltinFunctionType)
_CONSTANT = (str, bytes, int, float, complex)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_EMPTY = types.CellType()


def search(*roots: object) -> Held:
    """Find the modules and tensors that ``roots`` hold in any depth.

    Followed are modules, their attributes and the functions of their classes; attributes of other objects; containers;
    bound methods, partials, closures, default arguments, and the globals that a function names. The nearest come first.
    """
    modules: dict[nn.Module, None] = {}
    tensors: list[Tensor] = []
    places: list[Place] = []
    constants: list[Place] = []
    seen: dict[int, object] = {}  # kept alive, so that ids stay theirs
    queue: collections.deque[object] = collections.deque(roots)

    def look_into(table: MutableMapping[Any, Any], keys: Iterable[Any]) -> None:
        for key in keys:
            value = table[key]
            if isinstance(value, Tensor):
                places.append((table, key))
            if isinstance(value, _CONSTANT):
                constants.append((table, key))
            elif value is not None:
                queue.append(value)

    while queue and len(seen) < _SEARCHED:
        part = queue.popleft()
        if isinstance(part, _PLAIN) or id(part) in seen or type(part) in weakref.ProxyTypes:
            continue
        seen[id(part)] = part
        kind: Any = type(part)
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, nn.Module):
            modules[part] = None
            attributes = vars(part)
            for name in ("_parameters", "_buffers"):
                look_into(attributes.get(name, {}), list(attributes.get(name, {})))
            look_into(attributes, [name for name in attributes if name not in _OF_EVERY_MODULE])
            queue.extend(part.children())
            queue.extend(_functions_of(kind))
        elif isinstance(part, types.FunctionType):
            queue.extend((part.__defaults__ or (), part.__kwdefaults__ or {}))
            for cell in part.__closure__ or ():
                if cell != _EMPTY:
                    if isinstance(cell.cell_contents, Tensor):
                        places.append((cell, None))
                    elif isinstance(cell.cell_contents, _CONSTANT):
                        constants.append((cell, None))
                    queue.append(cell.cell_contents)
            look_into(part.__globals__, [name for name in _names(part.__code__) if name in part.__globals__])
        elif isinstance(part, functools.partial):
            queue.extend((part.func, part.args, part.keywords))
        elif isinstance(part, types.MethodType):
            queue.extend((part.__self__, part.__func__))
        elif isinstance(part, MutableMapping):
            look_into(part, list(part))
        elif isinstance(part, Mapping):
            queue.extend(part.values())
        elif isinstance(part, list):
            places.extend((part, i) for i, value in enumerate(part) if isinstance(value, Tensor))
            queue.extend(part)
        elif isinstance(part, tuple | set | frozenset | collections.deque):
            queue.extend(part)
        else:
            queue.extend(_functions_of(kind))
            queue.extend(getattr(part, name, None) for name in _slots_of(kind))
            look_into(getattr(part, "__dict__", {}), list(getattr(part, "__dict__", {})))
    return Held(list(modules), tensors, places, constants)


def refuse_sharded(func: object, held: Held) -> None:
    """Raise NotImplementedError if ``func`` calls a module that ``fully_shard`` was applied to.

    Such a module gathers its parameters when it is called and gives them up after it, so backward has none to
    differentiate with respect to. A bound method is not a call of its module.
    """
    for module in held.modules:
        is_sharded = any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
        if is_sharded and module is not getattr(func, "__self__", None):
            raise NotImplementedError(
                f"func holds a module under fully_shard ({type(module).__name__}), whose parameters would get no "
                "gradient. Apply fully_shard to the module that contains the whole solve instead."
            )


@functools.lru_cache(maxsize=1024)
def _functions_of(kind: type) -> tuple[types.FunctionType, ...]:
    """The functions of a class that name globals or close over something; not those of PyTorch and the hosts."""
    return tuple(
        value
        for cls in kind.__mro__
        if cls.__module__.partition(".")[0] not in _LIBRARIES
        for value in vars(cls).values()
        if isinstance(value, types.FunctionType)
    )


@functools.lru_cache(maxsize=1024)
def _slots_of(kind: type) -> tuple[str, ...]:
    """The slots of a class, not those of PyTorch and the hosts."""
    slots = (
        vars(cls).get("__slots__", ()) for cls in kind.__mro__ if cls.__module__.partition(".")[0] not in _LIBRARIES
    )
    names = [name for entry in slots for name in ((entry,) if isinstance(entry, str) else entry)]
    return tuple(name for name in names if not name.startswith("__"))


_LIBRARIES = frozenset({"torch", "torchdiffeq", "torchdyn", "builtins", "functools", "collections", "typing", "abc"})


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> frozenset[str]:
    """The globals that a function, and those defined inside it, may name."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)
