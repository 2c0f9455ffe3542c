"""Choosing a gradient mode for code that cannot be given one: ``with use("symplectic"):``, or `set_default`.

The adapters of the hosts ask for the `current` choice at each solve. It is kept in a context variable, so that other
threads and other tasks do not see it; the default is the process's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from torchdiffeq_symplectic.modes import MODES, Mode, configured

__all__ = ["Choice", "chosen_by", "connect", "current", "recompute_inside", "restored", "set_default", "use"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Choice:
    """A gradient mode, and the ``adjoint_options`` that go with it."""

    mode: Mode
    options: Mapping[str, Any]


# Who chose what, the innermost last. Those who leave take out their own entry, wherever it stands: a generator that is
# closed late must not take away another's.
_entered: ContextVar[tuple[tuple[object, Choice | None], ...]] = ContextVar("torchdiffeq_symplectic", default=())
_default: Choice | None = None
_connected = False


class use:  # noqa: N801 (named as torch.no_grad is)
    """Every solve inside is differentiated by a gradient mode, whatever its own arguments ask for.

    ``with use("symplectic"):`` or, before a function, ``@use("symplectic")``. torchdiffeq's ``odeint_adjoint`` then
    solves as if it had been given ``adjoint_method="symplectic"``. Its ``odeint`` gives the gradient of backpropagation
    as it always does, of everything that the field uses, but without keeping the graph of the solve. torchdyn's
    problems solve as with ``sensitivity="symplectic"``, its functional ``odeint`` as torchdiffeq's. A call that names
    one of the modes itself keeps it.

    Backward may come later, outside. Instances may be nested, used again and shared by threads; each thread and each
    task has its own choice, which starts as the default, see `set_default`.

    Args:
        mode: "symplectic", "aca", "baseline" or "memory_free"; None restores what the hosts do by themselves.
        adjoint_options: of the mode, ``use("symplectic", checkpoint="stages", replay_check="warn")``.

    Raises:
        ValueError: for an unknown mode, an unknown option, or an option with a wrong value.
        TypeError: for options that are not keywords, and for ``@use`` without a mode.
        RuntimeError: on entering, after `unregister`.
        NotImplementedError: in a solve by a method that the mode cannot replay, if it needs a gradient; ValueError if
            the mode is for other methods.
    """

    def __init__(self, mode: str | None, *unnamed: object, **adjoint_options: Any) -> None:
        if unnamed:
            raise TypeError(
                f'adjoint_options are keywords, as in use("symplectic", checkpoint="stages"), not {unnamed}'
            )
        if callable(mode):
            raise TypeError('use needs a mode before it decorates a function, as in @use("symplectic")')
        self._choice = _choice_of(mode, adjoint_options)

    def __enter__(self) -> None:
        _require_connection(self._choice)
        _enter(self, self._choice)

    def __exit__(self, *error: object) -> None:
        _leave(self)

    def __call__(self, func: F) -> F:
        """``func``, run inside; a generator function or a coroutine function is, too, whenever it is resumed."""
        if not callable(func) or isinstance(func, type) or inspect.isasyncgenfunction(func):
            raise TypeError(
                f"use(...) decorates functions, but not classes or asynchronous generators such as {func!r}. Decorate "
                "the method that solves, or write `with use(...):` inside it."
            )
        if inspect.iscoroutinefunction(func):

            @functools.wraps(func)
            async def awaiting(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await func(*args, **kwargs)

            return awaiting  # type: ignore[return-value]
        if inspect.isgeneratorfunction(func):

            @functools.wraps(func)
            def generating(*args: Any, **kwargs: Any) -> Any:
                return _resumed_inside(self, func(*args, **kwargs))

            return generating  # type: ignore[return-value]

        @functools.wraps(func)
        def calling(*args: Any, **kwargs: Any) -> Any:
            with self:
                return func(*args, **kwargs)

        return calling  # type: ignore[return-value]


def set_default(mode: str | None, **adjoint_options: Any) -> None:
    """What solves use outside of every `use`, in all threads of the process; None for the hosts' own, as at first.

    Arguments and errors are those of `use`. `unregister` takes it back.
    """
    global _default
    choice = _choice_of(mode, adjoint_options)
    _require_connection(choice)
    _default = choice


def current() -> Choice | None:
    """The choice that a solve here is to use, None where the host is to do as it does."""
    if not _connected:
        return None
    entered = _entered.get()
    return entered[-1][1] if entered else _default


def chosen_by(name: object, options: Mapping[str, Any] | None) -> Choice | None:
    """The choice for a call that names ``name`` and gives ``options``: its own if that is a mode, else the current."""
    if isinstance(name, str) and name in MODES:
        return Choice(MODES[name], {} if options is None else options)
    return current()


@contextlib.contextmanager
def restored(choice: Choice | None) -> Iterator[None]:
    """The choice as it was when a solve was made, while its field is evaluated again: it may contain solves."""
    owner = object()
    _enter(owner, choice)
    try:
        yield
    finally:
        _leave(owner)


def recompute_inside(choice: Choice | None) -> None:
    """Let `torch.utils.checkpoint`, where it is at work around a solve, recompute that as it is solved now.

    It does so in backward, which may be outside of the `use` that the solve is in.
    """
    hooks = None if choice is None else torch._C._autograd._top_saved_tensors_default_hooks(True)
    for cell in getattr(hooks and hooks[0], "__closure__", None) or ():
        frame = cell.cell_contents
        recompute = getattr(frame, "recompute_fn", None)
        if recompute is not None and getattr(recompute, "func", None) is not _inside:
            frame.recompute_fn = functools.partial(_inside, choice, recompute)


def _inside(choice: Choice | None, recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with restored(choice):
        return recompute(*args, **kwargs)


def connect(connected: bool) -> None:
    """Say whether the hosts ask for the `current` choice. The default does not outlive the connection."""
    global _connected, _default
    _connected = connected
    if not connected:
        _default = None


def _enter(owner: object, choice: Choice | None) -> None:
    _entered.set((*_entered.get(), (owner, choice)))


def _leave(owner: object) -> None:
    entered = _entered.get()
    for i in reversed(range(len(entered))):
        if entered[i][0] is owner:
            _entered.set((*entered[:i], *entered[i + 1 :]))
            return


def _choice_of(mode: str | None, options: Mapping[str, Any]) -> Choice | None:
    if mode is None:
        if options:
            raise ValueError(f"without a mode there are no options, but there is {', '.join(options)}")
        return None
    if not isinstance(mode, str) or mode not in MODES:
        known = '", "'.join(MODES)
        raise ValueError(f'mode must be None or one of {{"{known}"}}, but is {mode!r}')
    known_options = MODES[mode].options | {"replay_check"}
    for name in options:
        if name not in known_options:
            raise ValueError(f'"{mode}" has no option {name!r}, only {", ".join(sorted(known_options))}')
    configured(MODES[mode], options)  # whether the values are right
    return Choice(MODES[mode], dict(options))


def _require_connection(choice: Choice | None) -> None:
    if choice is not None and not _connected:
        raise RuntimeError(
            "torchdiffeq_symplectic has been unregistered, so nothing would use the mode. Call "
            "torchdiffeq_symplectic.register() first."
        )


def _resumed_inside(switch: use, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """``generator``, inside ``switch`` while it runs and outside while it waits."""
    resume: Callable[[], Any] = functools.partial(next, generator)
    while True:
        with switch:
            try:
                value = resume()
            except StopIteration as end:
                return end.value
        try:
            sent = yield value
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is thrown into the generator)
            resume = functools.partial(generator.throw, error)
        else:
            resume = functools.partial(generator.send, sent)
