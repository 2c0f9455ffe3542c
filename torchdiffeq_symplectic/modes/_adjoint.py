"""The discrete adjoint of explicit steps, swept backwards over a trajectory.

One step, with ``q`` carried slopes and ``s`` own stages, maps ``(y, k_carried)`` to ``(y1, outputs, k_passed)``. With
``lambda1`` the cotangent of ``y1`` and ``g_i`` whatever reaches slope ``i`` from outside of the step's own arithmetic
(outputs inside the step, later steps that carry it in), going through the own stages from the last to the first,

    l_i  = h * b_i * lambda1 + g_i + h * sum_{j > i} a_ji * xi_j                                      (cotangent of k_i)
    xi_i = (df/dy)^T l_i       p' += (df/dp)^T l_i       tau_i = (df/dt)^T l_i       at (t + c_i h, Y_i)
    lambda = lambda1 + sum_i xi_i + (cotangents of the outputs inside the step)

and for a carried slope ``l_c`` is passed on to the stage of the earlier step that it is the slope of. With
``Lambda_i = l_i / (h b_i)`` this is the partitioned Runge-Kutta method whose coefficients satisfy
``b_i A_ij + b_j a_ji = b_i b_j``: the symplectic adjoint method (Matsubara, Miyatake, Yaguchi, NeurIPS 2021,
https://arxiv.org/abs/2102.09750). In this form no weight is divided by, so stages with ``b_i = 0`` are no special case.

The modes that sweep differ in one thing: when the graphs of the stages are built, and how long they live. A step of no
such form is done again as a whole, and differentiated with its whole graph, in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Cotangents, Gradients
from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.tableau import NO_SLOPES, Tableau, Whole
from torchdiffeq_symplectic.trajectory import Step, Trajectory

__all__ = ["StageReplay", "Stages", "sweep"]

# Steps whose coefficients are computed together.
_BLOCK = 8

Stages = Callable[["StageReplay"], Callable[[int], Linearisation]]
"""Given a step, prepare its stages; the result linearises an own stage. Stages are asked for from the last."""


class _Workspace:
    """One buffer for a step: rows of carried slopes, own stages, and lambda last.

    A stage's row holds first ``k_i``, then ``xi_i``. Where slopes were kept, those evaluated anew go to the rows of
    ``fresh``, else to the same rows. The views that the stages use are made once a tableau layout, their coefficients
    once a solve.
    """

    def __init__(self, rows: Tensor, fresh: Tensor, carried: int, stages: int, shape: torch.Size) -> None:
        own = len(rows) - 1 - stages
        first = own - carried
        self.lam = rows[-1]
        self.carried = rows[first:own]
        self.known = rows[first:-1]
        self.slopes = fresh[first:-1]
        self.apart = fresh is not rows
        self.checked_at = 0 if self.apart else stages - 1
        self.products = rows[own:-1]
        self.after_carried = rows[own:]
        self.stages = rows[own:-1].view(stages, *shape)
        self.stage = self.stages.unbind(0)
        self.fresh_carried = fresh[first:own]
        self.fresh_stage = fresh[own:-1].view(stages, *shape).unbind(0)
        columns = rows.t()
        self.before_stage = [columns[:, first : own + i] for i in range(stages)]
        self.after_stage = [columns[:, own + i + 1 :] for i in range(stages)]
        # The parts of `_weights`, in its order.
        self.sizes = [carried + i for i in range(stages)] + [stages - i for i in range(stages)]
        self.sizes += [carried * (stages + 1), carried + stages, stages * (carried + stages)]


class StageReplay:
    """One step being replayed: its stage states, and its slopes in the workspace."""

    def __init__(self, step: Step, field: Field, work: _Workspace, scaled: Sequence[Tensor]) -> None:
        self.step = step
        self.field = field
        self.work = work
        self.stages = step.tableau.stages
        self._before = scaled[: self.stages]
        self._after = scaled[self.stages : 2 * self.stages]
        self._carried, self._new, every = scaled[-3:]
        self._evaluated: set[int] = set()
        assert step.state is not None
        self._start = step.state
        self._flat = step.state.reshape(-1)
        if self._flat.dtype != field.dtype:
            self._flat = self._flat.to(field.dtype)
        for row, slope in zip(work.carried, step.carried, strict=True):
            row.copy_(slope.reshape(-1))
        if work.apart and step.carried:
            work.fresh_carried.copy_(work.carried)
        self.kept = range(0)
        self._states: Sequence[Tensor] = ()
        if step.slopes is not None:
            self.kept = range(min(self.stages, len(step.slopes)))
            work.stages[: len(self.kept)].copy_(step.slopes[: len(self.kept)])
            if len(self.kept) == self.stages:
                states = torch.addmm(self._flat, every.view(self.stages, -1), work.known)
                self._states = states.view(self.stages, *field.shape).unbind(0)
        elif step.passed is not None and step.tableau.passes is not None:
            self.kept = range(step.tableau.passes, step.tableau.passes + 1)
            work.stage[step.tableau.passes].copy_(step.passed)

    def state(self, i: int) -> Tensor:
        """``Y_i = y + h * sum_j a_ij k_j``."""
        if i == 0 and not self.step.carried:
            return self._start
        if self._states:
            return self._states[i]
        return torch.addmv(self._flat, self.work.before_stage[i], self._before[i]).view(self.field.shape)

    def _random(self, i: int) -> Tensor | None:
        return self.step.random[i] if self.step.random else None

    def evaluate(self, i: int) -> None:
        """Put ``k_i`` into the workspace; to be called where gradients are not enabled."""
        self._evaluated.add(i)
        self.work.stage[i].copy_(self.field(self.step.times[i].detach(), self.state(i).detach(), self._random(i)))

    def linearise(self, i: int) -> Linearisation:
        """Evaluate ``k_i`` with its graph; its value goes into the workspace if it is not there yet."""
        linearisation = self.field.linearise(self.step.times[i], self.state(i), self._random(i))
        if i not in self._evaluated:
            self.work.fresh_stage[i].copy_(linearisation.value.detach())
        return linearisation

    def rate(self, i: int) -> Tensor:
        """``sum_j a_ij k_j``, by which ``Y_i`` moves with the step's size; flat."""
        weights = _stage_weights(self.step.tableau, self.field.dtype, self._flat.device)[i]
        return torch.mv(self.work.before_stage[i], weights)

    def next_state(self) -> Tensor:
        """``y + h * sum_j b_j k_j``, flat; valid while the workspace holds all slopes."""
        return torch.addmv(self._flat, self.work.slopes.t(), self._new)

    def cotangent(self, i: int, outside: Tensor | None) -> Tensor:
        """``l_i``, of the state's shape; valid when the workspace holds ``xi_j`` for all ``j > i``."""
        if outside is None:
            flat = torch.mv(self.work.after_stage[i], self._after[i])
        else:
            flat = torch.addmv(outside, self.work.after_stage[i], self._after[i])
        return flat.view(self.field.shape)

    def carried_cotangents(self) -> Tensor:
        """``l_c`` for each carried slope, shape ``(q, n)``."""
        return torch.mm(self._carried.view(-1, self.stages + 1), self.work.after_carried)


def sweep(
    trajectory: Trajectory,
    field: Field,
    outputs: Tensor,
    check: ReplayCheck,
    stages: Stages,
    find: Callable[[Step], Tensor] | None = None,
) -> Gradients:
    """Carry the cotangents of the outputs back to the initial state, the parameters and the times.

    Args:
        trajectory: the solve.
        field: evaluates the field and accumulates the products with respect to parameters.
        outputs: the cotangent of the solution, shape ``(T, *y0.shape)``.
        check: is told how well each step was reproduced.
        stages: builds the graphs of a step's stages.
        find: where not every state is kept, see `Trajectory.backwards`.
    """
    cotangents = Cotangents(trajectory, outputs)
    tableaus = [tableau for tableau in trajectory.groups if tableau is not NO_SLOPES]
    depth = max((tableau.carried + tableau.stages for tableau in tableaus), default=0)
    rows = torch.zeros(depth + 1, field.shape.numel(), dtype=field.dtype, device=trajectory.initial.device)
    fresh = torch.zeros_like(rows) if trajectory.has_slopes else rows
    work = {
        layout: _Workspace(rows, fresh, *layout, field.shape) for layout in {tableau.layout for tableau in tableaus}
    }
    coefficients = _Coefficients(trajectory)
    lam = rows[-1]
    for step in trajectory.backwards(find):
        if step.at_end is not None:
            lam.add_(cotangents.of_output(step.at_end))
        if step.whole is not None:
            _sweep_whole(step, step.whole, field, lam, cotangents, check)
            continue
        space = work[step.tableau.layout]
        replay = StageReplay(step, field, space, coefficients.of(step, space.sizes))
        outside = cotangents.of_slopes(step)
        linearised = stages(replay)
        with torch.enable_grad():
            _sweep_stages(replay, linearised, outside, cotangents, check)
        if step.tableau.carried:
            cotangents.pass_on(step, replay.carried_cotangents())
        lam.add_(space.products.sum(0))
        if step.interpolated:
            lam.add_(cotangents.inside(step).sum(0))
    return cotangents.gradients(lam.view(field.shape), field.param_grads)


def _sweep_stages(
    replay: StageReplay,
    linearised: Callable[[int], Linearisation],
    outside: Mapping[int, Tensor],
    cotangents: Cotangents,
    check: ReplayCheck,
) -> None:
    """Turn each row of the workspace from ``k_i`` into ``xi_i``, from the last stage to the first."""
    step, work, wants_time = replay.step, replay.work, replay.field.wants_time
    for i in reversed(range(replay.stages)):
        linearisation = linearised(i)
        if i == work.checked_at:
            if step.next_state is not None:
                recorded, weight = step.next_state.reshape(-1), step.tableau.weight
                check.step(step.index, replay.next_state(), recorded, step.size, work.slopes, weight)
            if wants_time:
                cotangents.time_of_step(step, work.slopes, work.lam)
        product, (product_t,) = linearisation.pull_back(replay.cotangent(i, outside.get(i)))
        if wants_time:
            cotangents.time_of_stage(step, i, product, product_t, replay.rate(i))
        if product is None:
            work.stage[i].zero_()
        else:
            work.stage[i].copy_(product)
        del linearisation  # else its graph lived on while the next one is built


def _sweep_whole(
    step: Step, whole: Whole, field: Field, lam: Tensor, cotangents: Cotangents, check: ReplayCheck
) -> None:
    """Turn ``lam`` from the cotangent of the state after the step into that of the state before."""
    t, h = step.times
    assert step.state is not None
    assert step.next_state is not None
    with torch.enable_grad():
        linearisation = field.linearise_step(whole, t, h, step.state, step.random[0] if step.random else None)
    check.whole(step.index, linearisation.value.detach(), step.next_state, step.state)
    product, products = linearisation.pull_back(lam.view(field.shape))
    if field.wants_time:
        cotangents.time_of_whole(step, *products)
    if product is None:
        lam.zero_()
    else:
        lam.copy_(product.reshape(-1))


class _Coefficients:
    """The coefficients of each step times its size, for a block of steps at a time.

    In the wider dtype of states and sizes, then cast, as the hosts do. Those of all steps would outgrow small states.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._sizes = trajectory.size.detach()
        self._dtype = trajectory.dtype
        self._block: tuple[int, int] | None = None
        self._rows: list[tuple[Tensor, ...]] = []

    def of(self, step: Step, lengths: Sequence[int]) -> Sequence[Tensor]:
        """The parts of `_weights`, of these lengths, times the size of ``step``."""
        number, place = divmod(step.index, _BLOCK)
        block = id(step.tableau.a), number  # tableaus that differ in times alone share a
        if self._block != block:
            size = self._sizes[number * _BLOCK : (number + 1) * _BLOCK, None]
            wide = size.to(torch.promote_types(size.dtype, self._dtype.to_real()))
            products = wide * _weights(step.tableau, wide.dtype, wide.device)
            narrow = step.tableau.narrow
            if narrow is not None:
                rounded = size.to(narrow.dtype) * _weights(step.tableau, narrow.dtype, wide.device)
                products = torch.where(_rounded(step.tableau, wide.device), rounded.to(wide.dtype), products)
            products = products.to(self._dtype)
            parts = products.split(list(lengths), dim=1)
            self._rows = list(zip(*(part.unbind(0) for part in parts), strict=True))
            self._block = block
        return self._rows[place]


@functools.lru_cache(maxsize=1024)
def _weights(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients in the order in which a step uses them."""
    return torch.tensor(_in_order(tableau.carried, tableau.a, tableau.b), dtype=dtype, device=device)


@functools.lru_cache(maxsize=1024)
def _rounded(tableau: Tableau, device: torch.device) -> Tensor:
    """Which of these products the host rounds."""
    assert tableau.narrow is not None
    return torch.tensor(_in_order(tableau.carried, tableau.narrow.a, tableau.narrow.b), device=device) > 0


def _in_order(q: int, a: Sequence[Sequence[float]], b: Sequence[float]) -> list[float]:
    """Each stage's a_ij, j before it; its a_ji and b_i, j after it; the same for the q carried slopes; b; a, whole."""
    before = [weight for row in a for weight in row]
    after = [[*(row[column] for row in a[max(column - q + 1, 0) :]), b[column]] for column in range(len(b))]
    flat = [weight for column in [*after[q:], *after[:q]] for weight in column]
    matrix = [weight for row in a for weight in [*row, *[0.0] * (len(b) - len(row))]]
    return [float(weight) for weight in [*before, *flat, *b, *matrix]]


@functools.lru_cache(maxsize=1024)
def _stage_weights(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
    """The rows of ``a``."""
    return [torch.tensor(row, dtype=dtype, device=device) for row in tableau.a]
