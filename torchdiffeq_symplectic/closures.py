"""What a callable is known to use besides its arguments: modules, and tensors that it closes over."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["modules_of", "tensors_of"]


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
