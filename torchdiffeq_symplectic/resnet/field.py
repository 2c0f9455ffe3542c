"""A residual network as the vector field of the ODE whose Euler scheme it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet.interpolation import (
    evaluate_between,
    place_of,
    require_one_architecture,
    step_size,
)

__all__ = ["BlockError", "ResidualField"]

_INTERPOLATIONS = ("outputs", "weights", "piecewise")
_METHODS = ("euler", "heun2")


class BlockError(ValueError, RuntimeError):
    """A block refused its input. A ValueError that names the block; and a RuntimeError, as which PyTorch raised it."""


class ResidualField(nn.Module):
    """The vector field ``f(t, x)`` whose Euler scheme of step ``1/N`` is the residual network of ``N`` blocks.

    Block ``n = 0 ... N - 1`` stands at depth ``t = n/N``, and there, with ``residual=True`` in the second form,::

        f(n/N, x) = N * (block_n(x) - x)                  f(n/N, x) = block_n(x)

    so that Euler's steps ``x + f(n/N, x) / N`` are the network's ``block_n(x)``, or ``x + block_n(x) / N``. A time that
    is ``n/N`` up to rounding is ``n/N``. Between ``n/N`` and ``(n + 1)/N``, at ``t = (n + w)/N``, ``interpolate`` says:

    - ``"outputs"``: ``(1 - w) * f(n/N, x) + w * f((n + 1)/N, x)``, two blocks evaluated;
    - ``"weights"``: one block whose parameters and floating buffers are ``(1 - w) * theta_n + w * theta_{n+1}``;
    - ``"piecewise"``: ``f(n/N, x)``.

    From ``(N - 1)/N`` on it is ``f((N - 1)/N, x)``, and before 0 it is ``f(0, x)``. ``f`` is differentiable in ``x``,
    the parameters and, between the blocks, ``t``; at ``n/N``, where interpolants have kinks, ``t`` gets no gradient.

    Cost: one block's evaluation at ``n/N``; what else happens does not depend on ``N``. ``t`` is read as a number to
    choose the block, so an evaluation waits for the device if ``t`` is on one, and for nothing else. (torchdyn's
    ``NeuralODE`` looks through all modules of its field at each evaluation; its ``ODEProblem`` and ``odeint`` do not.)

    One rule for modules in training (batch norm, dropout) and for their buffers: *an evaluation of the field does to a
    block what a call of the block does, and a solve's backward pass does nothing to it.* So Euler on `grid` moves each
    block's running statistics once, as the network's forward pass does, and draws the same dropout masks; the
    recomputation in a gradient mode of this package uses the same training flags and masks and leaves statistics, flags
    and random state as they were. Solvers that evaluate more often move statistics more often. With ``"weights"``
    between two blocks no block is called: statistics are interpolated, and what happens to them is lost.

    A block may change its input in place (``ReLU(inplace=True)`` first): it is given a copy. Where ``torch.compile`` is
    wanted, compile the blocks: in the field itself it finds a choice among them by number, and gives up.

    Args:
        blocks: at least 2 modules that keep the shape of their input, of any rank, in the order of depth. A module that
            occurs several times (tied weights) is registered once.
        residual: whether a block *is* the residual function, without its skip connection.
        interpolate: ``"outputs"``, ``"weights"`` or ``"piecewise"``.

    Attributes:
        blocks: the distinct blocks. The field itself iterates over all ``N`` of them, ``len(field)`` is ``N``.

    Raises:
        TypeError: if something in ``blocks`` is no module; when evaluated, if a block returns no tensor.
        ValueError: for fewer than 2 blocks, an unknown ``interpolate``, or architectures that ``"weights"`` cannot
            interpolate between; when evaluated, if a block refuses its input or changes its shape. These errors name
            the block by its number in ``blocks``, from 0, and its class.

    M. E. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks discretize Neural Ordinary Differential Equations?,
    NeurIPS 2022, https://arxiv.org/abs/2205.14612.

    Example:
        >>> import torch
        >>> from torchdiffeq_symplectic import odeint_adjoint
        >>> field = ResidualField([torch.nn.Linear(3, 3) for _ in range(8)], residual=True)
        >>> x = torch.randn(5, 3)
        >>> states = odeint_adjoint(field, x, field.grid(), method="euler", adjoint_method="symplectic")
        >>> states.shape  # every hidden state
        torch.Size([9, 5, 3])
    """

    def __init__(self, blocks: Iterable[nn.Module], *, residual: bool = False, interpolate: str = "outputs") -> None:
        super().__init__()
        if interpolate not in _INTERPOLATIONS:
            raise ValueError(f"interpolate must be one of {_INTERPOLATIONS}, but is {interpolate!r}")
        sequence = _listed(blocks)
        first: dict[nn.Module, int] = {}
        for n, block in enumerate(sequence):
            first.setdefault(block, n)
        if interpolate == "weights":
            require_one_architecture([(n, block) for block, n in first.items()])
        self.blocks = nn.ModuleList(first)
        self.residual = residual
        self.interpolate = interpolate
        position = {block: i for i, block in enumerate(first)}
        self._order = [position[block] for block in sequence]
        self._leaves_input: set[tuple[int, bool]] = set()
        # As its blocks are, so that field.train(field.training) changes nothing.
        self.training = self.blocks.training = any(block.training for block in first)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.blocks[i] for i in self._order)

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return f"N={len(self)}, residual={self.residual}, interpolate={self.interpolate!r}"

    @property
    def step_size(self) -> Tensor:
        """``1/N``, 0-d, float64, for torchdiffeq's ``options={"step_size": field.step_size}``: ``N`` steps from 0 to 1.

        It is larger than ``1/N`` by a rounding, as a Python float ``1/N`` makes torchdiffeq take a step too many for
        some ``N``. On a device without float64 (MPS) use `grid`.
        """
        return step_size(len(self))

    def grid(
        self, method: str = "euler", dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The depths between which ``method`` makes the network's steps.

        Args:
            method: ``"euler"`` or ``"heun2"``. Heun's step ``n`` uses the blocks ``n`` and ``n + 1``:
                ``x + (r_n(x) + r_{n+1}(x + r_n(x))) / 2`` with ``r_n(x) = f(n/N, x) / N``.
            dtype: that of the blocks if not given.
            device: that of the blocks if not given.

        Returns:
            ``n/N`` for ``n = 0 ... N``, shape ``(N + 1,)``; for ``"heun2"`` for ``n = 0 ... N - 1``, shape ``(N,)``.

        Raises:
            ValueError: if ``method`` is another.
        """
        if method not in _METHODS:
            raise ValueError(f"method must be one of {_METHODS}, whose steps use whole blocks, but is {method!r}")
        points = len(self) + 1 if method == "euler" else len(self)
        depths = torch.arange(points, dtype=torch.float64, device="cpu") / len(self)
        like = next((p for p in (*self.parameters(), *self.buffers()) if p.is_floating_point()), torch.empty(0))
        return depths.to(dtype=dtype or like.dtype).to(device=device or like.device)

    def forward(self, t: Tensor | float, x: Tensor, args: object = None) -> Tensor:
        """``f(t, x)``, of the shape of ``x``.

        Args:
            t: depth, of one element.
            x: state, of any shape that the blocks take.
            args: passed along by torchdyn, not used.
        """
        del args
        if isinstance(t, Tensor):
            n, between = place_of(float(t.detach()), len(self), t.dtype)
        else:
            n, between = place_of(t, len(self))
        block = self._block(n)
        if not between or self.interpolate == "piecewise" or self._order[n] == self._order[n + 1]:
            return self._slope(x, self._value(n, block, x))
        following = self._block(n + 1)
        weight = (t.reshape(()) if isinstance(t, Tensor) else t) * len(self) - n
        if self.interpolate == "weights":
            return self._slope(x, self._value(n, partial(evaluate_between, block, following, weight), x))
        value = self._value(n, block, x)
        return self._slope(x, value + weight * (self._value(n + 1, following, x) - value))

    def _block(self, n: int) -> nn.Module:
        return self.blocks[self._order[n]]

    def _slope(self, x: Tensor, value: Tensor) -> Tensor:
        return value if self.residual else (value - x) * len(self)

    def _value(self, n: int, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, which is block ``n`` or of its architecture; ``x`` stays as it is.

        Whether a block changes its input may depend on its training flag. Once it was seen not to, it gets no copy.
        """
        kind = self._order[n], self._block(n).training
        trusted = kind in self._leaves_input
        given = x if trusted else x.clone()
        version = _version(given)
        value = self._call(n, function, given)
        if version is not None:
            if _version(given) == version:
                self._leaves_input.add(kind)
            elif trusted:
                raise RuntimeError(
                    f"{self._named(n)} changed its input in place, which it had not done before in the same training "
                    "mode. Set inplace=False in its first layers."
                )
        return value

    def _call(self, n: int, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, or an error that names block ``n``."""
        try:
            value = function(x)
        except (ValueError, RuntimeError) as error:
            if type(error) not in (ValueError, RuntimeError):  # out of memory, say
                raise
            raise BlockError(
                f"{self._named(n)} failed on a state of shape {tuple(x.shape)}, {x.dtype}: {error}. If it does not fit "
                "the state, leave out this block, or those before it."
            ) from error
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self._named(n)} returned a {type(value).__name__}. Wrap it in a module that returns the state alone."
            )
        if value.shape != x.shape:
            raise ValueError(
                f"{self._named(n)} turns a state of shape {tuple(x.shape)} into {tuple(value.shape)}, but blocks must "
                "keep the shape. Leave this block out, and start after it."
            )
        return value

    def _named(self, n: int) -> str:
        return f"block {n} ({type(self._block(n)).__name__})"


def _listed(blocks: object) -> list[nn.Module]:
    """The blocks as a list, once they are found to be modules."""
    if not isinstance(blocks, Iterable):
        raise TypeError(
            f"blocks must be an iterable of modules, but is a {type(blocks).__name__}. Pass a list, a ModuleList or a "
            "Sequential of the network's blocks."
        )
    sequence: list[nn.Module] = []
    for n, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise TypeError(
                f"block {n} must be a torch.nn.Module, but is a {type(block).__name__}. Wrap a function in a module; "
                "of a dictionary pass the values."
            )
        sequence.append(block)
    if len(sequence) < 2:
        only = "".join(f", block {n} ({type(block).__name__})" for n, block in enumerate(sequence))
        raise ValueError(
            f"blocks must be at least 2, but {len(sequence)} given{only}. Pass a longer stage, or the same block "
            "several times if its weights are tied."
        )
    return sequence


def _version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written to; None for an inference tensor, which does not count that."""
    return None if tensor.is_inference() else tensor._version
