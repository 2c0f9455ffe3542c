"""The adjoint of explicit Runge-Kutta steps by matrix-vector products, for speed: no step's arithmetic under autograd.

A step of ``s`` stages, slope ``k_1`` carried in or its own, and its adjoint, with ``lambda`` the cotangent of the
state, ``kappa`` that of the slope carried on and ``gamma_m`` that of an output inside:

    Y_i = y + h sum_j<i a_ij k_j        y+ = y + h sum_i b_i k_i        u_m = y + h sum_i B_i(theta_m) k_i

    l_i  = h b_i lambda+ + h sum_m B_i(theta_m) gamma_m + [i = s] kappa+ + h sum_j>i a_ji xi_j
    xi_i = (df/dy)^T l_i       p' += (df/dp)^T l_i       at (t + c_i h, Y_i)
    lambda = lambda+ + sum_m gamma_m + sum_i xi_i        (kappa = l_1 where k_1 is carried in)

The stage states are formed by the very operations that torchdiffeq issues, in its layout, so they are the forward
pass's bit for bit; each step checks its new state. Where a release forms them another way, `_forms_states` says so,
and every step goes the general way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.tape import Step, Tape

__all__ = ["Coefficients", "LinearSweep"]

# Steps whose coefficients are computed together; those of all steps would outgrow small states.
_BLOCK = 16


class Coefficients(NamedTuple):
    """``a``, shape ``(s, s)``, and ``b``, shape ``(s,)``, of an explicit step, where the state is and of its dtype."""

    a: Tensor
    b: Tensor


class LinearSweep:
    """One buffer a solve, a column a stage and one for lambda. Column ``c`` turns from ``k_c`` into ``xi_c``."""

    def __init__(self, coefficients: Coefficients, tape: Tape, field: Field, check: ReplayCheck) -> None:
        (initial,) = tape.initial
        self._tape, self._field, self._check = tape, field, check
        self._shape, self._dtype = initial.shape, tape.dtype
        a, b = (matrix.to(initial.device) for matrix in coefficients)
        self._stages = stages = len(b)
        self._rows = [torch.cat([a[c + 1 :, c], b[c : c + 1]]) for c in range(stages)]
        self._buffer = torch.zeros(*self._shape, stages + 1, dtype=self._dtype, device=initial.device)
        self._columns = self._buffer.unbind(-1)
        self._lam = self._columns[-1]
        flat = self._buffer.view(-1, stages + 1)
        self._after = [flat[:, c + 1 :] for c in range(stages)]
        self._before = [self._buffer[..., : i + 1] for i in range(stages)]
        self._block: int | None = None
        self._weights: list[Sequence[Any]] = []

    def _of_block(self, step: Step) -> Sequence[Any]:
        """What `_prepared` gives for ``step``."""
        block, place = divmod(step.number, _BLOCK)
        if self._block != block:
            self._block = block
            chosen = slice(block * _BLOCK, (block + 1) * _BLOCK)
            start, size, end = (vector[chosen].to(self._dtype) for vector in self._tape.times[:3])
            self._weights = self._prepared(start, size, end)
        return self._weights[place]

    def _scaled(self, size: Tensor, rows: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """``rows`` times the size of each step of a block, step by step."""
        scaled = (size[:, None] * torch.cat([*rows])).split([len(row) for row in rows], 1)
        return list(zip(*(part.unbind() for part in scaled), strict=True))

    def _prepared(self, start: Tensor, size: Tensor, end: Tensor) -> list[Sequence[Any]]:
        raise NotImplementedError

    def _start_from(self, of_after: Sequence[Tensor | None]) -> None:
        lam = of_after[0]
        if lam is None:
            self._lam.zero_()
        elif lam is not self._lam:
            self._lam.copy_(lam)

    def _value(self, linearisation: Linearisation) -> Tensor:
        """The slope as torchdiffeq's assignment to its buffer of slopes makes it."""
        value: Tensor = linearisation.value
        if value.dtype != self._dtype or value.shape != self._shape:
            with torch.enable_grad():
                value = value.to(self._dtype).expand(self._shape)
        return value

    def _pull_back_stage(self, c: int, linearisation: Linearisation, weights: Tensor, outside: Tensor | None) -> None:
        """Turn column ``c`` into ``xi_c``."""
        cotangent = self._cotangent(c, weights, outside)
        (product,) = self._field.pull_back(linearisation, [self._value(linearisation)], [cotangent.view(self._shape)])
        if product is None:
            self._columns[c].zero_()
        else:
            self._columns[c].copy_(product)

    def _cotangent(self, c: int, weights: Tensor, outside: Tensor | None) -> Tensor:
        if outside is None:
            return torch.mv(self._after[c], weights)
        return torch.addmv(outside.reshape(-1), self._after[c], weights)
