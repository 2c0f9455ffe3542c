"""What a callable is known to use besides its arguments: modules, and tensors that it closes over."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

__all__ = ["held_by", "modules_of", "tensors_of"]


def modules_of(func: object) -> list[nn.Module]:
    """The modules that ``func`` is known to evaluate, with those inside of them, each once.

    Itself; a bound method's owner; those of a partial's function and among its arguments; those that a function closes
    over or names.
    """
    found = (part for part in _parts(func) if isinstance(part, nn.Module))
    return list(dict.fromkeys(module for part in found for module in part.modules()))


def tensors_of(func: object) -> list[Tensor]:
    """The tensors that ``func`` itself holds, as `modules_of` finds modules, but not those of modules."""
    return [part for part in _parts(func) if isinstance(part, Tensor)]


def held_by(func: object) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules and tensors that ``func`` holds in any depth, as far as that can be followed, each once.

    What `modules_of` and `tensors_of` find, and what is in attributes, containers, default arguments and functions that
    it closes over. The nearest come first; large structures are not searched to their end.
    """
    modules: dict[nn.Module, None] = {}
    tensors: list[Tensor] = []
    seen: dict[int, object] = {}  # kept alive, so that ids stay theirs
    queue = collections.deque([func])
    while queue and len(seen) < _SEARCHED:
        part = queue.popleft()
        if type(part) in weakref.ProxyTypes or isinstance(part, _PLAIN) or id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, Tensor):
            tensors.append(part)
        elif isinstance(part, nn.Module):
            for module in part.modules():
                if module not in modules:
                    modules[module] = None
                    queue.extend(value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE)
        else:
            queue.extend(_contents(part))
    return list(modules), tensors


# So many objects are looked at; a trainer's method may hold a data set.
_SEARCHED = 5000
_PLAIN = (str, bytes, int, float, complex, type, type(None), types.ModuleType, types.BuiltinFunctionType)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_buffers", "_parameters"}


def _contents(part: object) -> Iterable[object]:
    if isinstance(part, types.FunctionType):
        defaults = (*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values())
        return (*_parts(part), *defaults)
    if isinstance(part, functools.partial | types.MethodType):
        return _parts(part)
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, list | tuple | set | frozenset | collections.deque):
        return list(part)
    return list(getattr(part, "__dict__", {}).values())


def _parts(func: object) -> Iterator[object]:
    if isinstance(func, functools.partial):
        yield from _parts(func.func)
        for argument in (*func.args, *func.keywords.values()):
            yield from _parts(argument)
    elif isinstance(func, types.MethodType):
        yield func.__self__
        yield from _parts(func.__func__)
    elif isinstance(func, types.FunctionType):
        for cell in func.__closure__ or ():
            if cell != _EMPTY:
                yield cell.cell_contents
        for name in func.__code__.co_names:
            if name in func.__globals__:
                yield func.__globals__[name]
    else:
        yield func


_EMPTY = types.CellType()
