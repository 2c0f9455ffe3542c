"""Tableaus read off torchdiffeq's solvers: the known coefficients, and refusal of what is no explicit step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import ADAPTIVE, FIXED, of_table
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq_symplectic.hosts.torchdiffeq._adaptive import Adaptive, measure_adaptive
from torchdiffeq_symplectic.hosts.torchdiffeq._fixed import measure_adams, measure_fixed
from torchdiffeq_symplectic.tableau import Outcome, ProbeField, Tableau, UnknownFormError, measure

ORDERS = {
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "heun3": 3,
    "rk4": 4,
    "dopri5": 5,
    "dopri8": 8,
    "bosh3": 3,
    "fehlberg2": 2,
    "adaptive_heun": 2,
}
SAME_AS_LAST = ("dopri5", "dopri8", "bosh3")
each_method = pytest.mark.parametrize("method", of_table(ORDERS))


def adaptive_tableaus(method: str) -> Adaptive:
    result: Adaptive = measure_adaptive(SOLVERS[method], {"first_step": 0.1, "rtol": 1e-3})
    return result


def tableau_of(method: str, **options: Any) -> Tableau:
    """The step after the start."""
    return measure_fixed(SOLVERS[method], options) if method in FIXED else adaptive_tableaus(method).fresh


def matrices(tableau: Tableau) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``b`` and ``c`` of a step without carried slopes."""
    a = torch.zeros(tableau.stages, tableau.stages, dtype=torch.float64)
    for i, row in enumerate(tableau.a):
        a[i, :i] = torch.tensor(row, dtype=torch.float64)
    return a, torch.tensor(tableau.b, dtype=torch.float64), torch.tensor(tableau.c, dtype=torch.float64)


def order_conditions(a: Tensor, b: Tensor, c: Tensor) -> dict[int, list[Tensor]]:
    """What must vanish for each order up to four."""
    return {
        1: [b.sum() - 1],
        2: [b @ c - 1 / 2],
        3: [b @ c**2 - 1 / 3, b @ a @ c - 1 / 6],
        4: [b @ c**3 - 1 / 4, (b * c) @ a @ c - 1 / 8, b @ a @ c**2 - 1 / 12, b @ a @ a @ c - 1 / 24],
    }


@each_method
def test_order_conditions(method: str) -> None:
    conditions = order_conditions(*matrices(tableau_of(method)))
    for order, residuals in conditions.items():
        largest = max(float(residual.abs()) for residual in residuals)
        assert largest < 1e-13 if order <= ORDERS[method] else True, order
    if ORDERS[method] < 4:
        assert max(float(residual.abs()) for residual in conditions[ORDERS[method] + 1]) > 1e-3


@each_method
def test_row_sums_are_the_nodes(method: str) -> None:
    a, _, c = matrices(tableau_of(method))
    torch.testing.assert_close(a.sum(1), c, rtol=0, atol=1e-13)


TEXTBOOK: dict[str, tuple[Sequence[Sequence[float]], Sequence[float], Sequence[float]]] = {
    "euler": ([[]], [1], [0]),
    "midpoint": ([[], [1 / 2]], [0, 1], [0, 1 / 2]),
    "heun2": ([[], [1]], [1 / 2, 1 / 2], [0, 1]),
    "heun3": ([[], [1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4], [0, 1 / 3, 2 / 3]),
    # Kutta's 3/8 rule, not the classical method of the same name.
    "rk4": ([[], [1 / 3], [-1 / 3, 1], [1, -1, 1]], [1 / 8, 3 / 8, 3 / 8, 1 / 8], [0, 1 / 3, 2 / 3, 1]),
    "bosh3": ([[], [1 / 2], [0, 3 / 4]], [2 / 9, 1 / 3, 4 / 9], [0, 1 / 2, 3 / 4]),
    "adaptive_heun": ([[], [1]], [1 / 2, 1 / 2], [0, 1]),
    "fehlberg2": ([[], [1 / 2], [1 / 256, 255 / 256]], [1 / 512, 255 / 256, 1 / 512], [0, 1 / 2, 1]),
    "dopri5": (
        [
            [],
            [1 / 5],
            [3 / 40, 9 / 40],
            [44 / 45, -56 / 15, 32 / 9],
            [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
            [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        ],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
        [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1],
    ),
}


@pytest.mark.parametrize("method", of_table(TEXTBOOK))
def test_coefficients_of_the_textbook(method: str) -> None:
    a, b, c = TEXTBOOK[method]
    tableau = tableau_of(method)
    assert [len(row) for row in tableau.a] == [len(row) for row in a]
    for row, expected in zip(tableau.a, a, strict=True):
        assert row == pytest.approx(expected, abs=1e-14)
    assert tableau.b == pytest.approx(b, abs=1e-14)
    assert tableau.c == pytest.approx(c, abs=1e-14)


@pytest.mark.parametrize("method", of_table(ADAPTIVE))
def test_coefficients_of_torchdiffeqs_own_table(method: str) -> None:
    own = SOLVERS[method].tableau
    tableau = tableau_of(method).closed
    for row, expected in zip(tableau.a[1:], own.beta, strict=True):
        assert row == pytest.approx(expected.tolist(), abs=1e-14)
    assert tableau.b == pytest.approx(own.c_sol.tolist(), abs=1e-14)
    assert tableau.c == pytest.approx([0.0, *own.alpha.tolist()], abs=1e-14)


@pytest.mark.parametrize("method", of_table(ADAPTIVE))
def test_first_same_as_last(method: str) -> None:
    fresh, continuing = adaptive_tableaus(method)
    if method in SAME_AS_LAST:
        assert (fresh.closing, fresh.passes, fresh.carried) == (-1, None, 0)
        assert continuing.carried == 0
        assert continuing.continues(fresh)
        assert not fresh.continues(fresh)
        assert fresh.stages == len(SOLVERS[method].tableau.alpha)
    else:
        assert fresh.closing is None
        assert fresh.passes == fresh.stages - 1
        assert continuing.carried == 1
        assert continuing.stages == fresh.stages - 1
        assert continuing.passes == continuing.stages - 1
        assert (continuing.b, continuing.a) == (fresh.b, fresh.a[1:])
        assert not continuing.continues(fresh)


@pytest.mark.parametrize("method", of_table(ADAPTIVE))
def test_stages_at_the_end_are_evaluated_before_it(method: str) -> None:
    """So that a jump at the end is not seen too early; a step that begins with the last one's slope has its side."""
    fresh, continuing = adaptive_tableaus(method)
    assert fresh.sides == tuple(-1 if node == 1.0 else 0 for node in fresh.c)
    if method in SAME_AS_LAST:
        assert continuing.sides == (-1, *fresh.sides[1:])


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("method", of_table(FIXED))
def test_sides_of_fixed_grid_methods(method: str, perturb: bool) -> None:
    tableau = tableau_of(method, perturb=perturb)
    ends = {0.0: 1, 1.0: -1} if perturb else {}
    # heun3 has no node at the end, and midpoint's second is inside.
    assert tableau.sides == tuple(ends.get(node, 0) for node in tableau.c)
    assert tableau.passes is None


@pytest.mark.parametrize("method", of_table(ADAPTIVE))
def test_dense_output_joins_the_states(method: str) -> None:
    """At theta = 0 nothing is added to y, at theta = 1 what the step adds; at both ends the slope is f."""
    tableau = tableau_of(method).closed
    dense = torch.tensor(tableau.dense, dtype=torch.float64)
    powers = torch.arange(len(dense), dtype=torch.float64)
    unit = torch.eye(tableau.stages, dtype=torch.float64)
    assert len(dense) == 5
    torch.testing.assert_close(dense[0], torch.zeros(tableau.stages, dtype=torch.float64))
    torch.testing.assert_close(dense.sum(0), torch.tensor(tableau.b, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(dense[1], unit[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(powers @ dense, unit[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", of_table(FIXED))
def test_linear_and_cubic_interpolation(method: str) -> None:
    linear, cubic = tableau_of(method), tableau_of(method, interp="cubic")
    columns = linear.stages
    assert linear.closing is None
    torch.testing.assert_close(
        torch.tensor(linear.dense), torch.tensor([[0.0] * columns, linear.b]), atol=1e-14, rtol=0
    )
    assert cubic.closing == 0
    dense = torch.tensor(cubic.dense, dtype=torch.float64)
    b = torch.tensor([*cubic.b, 0.0], dtype=torch.float64)
    first, last = torch.eye(columns + 1, dtype=torch.float64)[[0, -1]]
    expected = torch.stack([0 * b, first, 3 * b - 2 * first - last, first + last - 2 * b])
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-13)


def test_adams_weights() -> None:
    """With three earlier slopes: Adams and Bashforth's rule of order four."""
    if "explicit_adams" not in SOLVERS:
        pytest.skip("this torchdiffeq has no explicit_adams")
    tableau = measure_adams(SOLVERS["explicit_adams"], {})(3, 0)
    assert (tableau.carried, tableau.stages, tableau.passes) == (3, 1, 0)
    # Carried slopes come first, the latest before the earlier ones; the own one is that at the start of the step.
    assert tableau.b == pytest.approx([-59 / 24, 37 / 24, -9 / 24, 55 / 24], abs=1e-14)


def heun(field: ProbeField, t: float, h: float, y: Tensor, carried: Sequence[Tensor]) -> Outcome:
    """Of order two, with an output that has its own weights, the slope at the end handed on."""
    k1 = field(t, y, 0)
    k2 = field(t + h, y + h * k1, -1)
    return Outcome(y + h / 2 * (k1 + k2), k2, [y, h * k1, h / 2 * (k2 - k1)])


def test_measuring_a_step() -> None:
    tableau = measure(heun)
    assert (tableau.a, tableau.b, tableau.c, tableau.sides) == (((), (1.0,)), (0.5, 0.5), (0.0, 1.0), (0, -1))
    assert tableau.dense == ((0.0, 0.0), (1.0, 0.0), (-0.5, 0.5))
    assert (tableau.carried, tableau.passes, tableau.closing) == (0, 1, None)


def test_measuring_a_step_with_carried_slopes() -> None:
    def step(field: ProbeField, t: float, h: float, y: Tensor, carried: Sequence[Tensor]) -> Outcome:
        latest, earlier = carried
        k = field(t + h / 4, y + h * (0.5 * latest - 0.25 * earlier), 1)
        return Outcome(y + h * (0.75 * k + 0.25 * earlier), k, [])

    tableau = measure(step, carried=2)
    assert (tableau.a, tableau.b, tableau.c) == (((0.5, -0.25),), (0.0, 0.25, 0.75), (0.25,))
    assert (tableau.sides, tableau.passes, tableau.stages) == ((1,), 0, 1)


class Strange:
    """Steps that are no fixed linear combination of explicit slopes, by name."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def nonlinear(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        k = field(t, y, 0)
        return y + h * torch.tanh(k)

    def nonlinear_stage(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        k = field(t, y, 0)
        return y + h * field(t, y + h * k * k.abs(), 0)

    def implicit(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        k = field(t, y, 0)
        for _ in range(50):
            before, k = k, field(t + h, y + h * k, 0)
            if float((k - before).abs().max()) < 1e-13:
                break
        return y + h * k

    def multistep(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        k = field(t, y, 0)
        before, self.last = self.last, k
        size = before is not None and len(before) == len(k)
        return y + h * (1.5 * k - 0.5 * before) if size else y + h * k  # type: ignore[operator]

    def weights_of_size(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        return y + math.expm1(h) / math.expm1(1.0) * field(t, y, 0)

    def weights_of_time(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        return y + h * math.cos(t) * field(t, y, 0)

    def node_of_state(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        return y + h * field(t + h * float(y.sum()), y, 0)

    def node_of_size(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        return y + h * field(t + h * h, y, 0)

    def scaled_state(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        return 0.99 * y + h * field(t, y, 0)

    def no_evaluation(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        return y * 1.0

    def evaluations_of_size(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        for _ in range(2 if h == 1.0 else 3):
            k = field(t, y, 0)
        return y + h * k

    def side_of_time(self, field: ProbeField, t: float, h: float, y: Tensor) -> Tensor:
        return y + h * field(t, y, 1 if t else 0)


@pytest.mark.parametrize("name", [name for name in vars(Strange) if not name.startswith("_")])
def test_steps_of_unknown_form_are_refused(name: str) -> None:
    method = getattr(Strange(), name)
    with pytest.raises(UnknownFormError):
        measure(lambda field, t, h, y, carried: Outcome(method(field, t, h, y), None, []))


@pytest.mark.parametrize("what", ["slope", "dense"])
def test_results_of_unknown_form_are_refused(what: str) -> None:
    def step(field: ProbeField, t: float, h: float, y: Tensor, carried: Sequence[Tensor]) -> Outcome:
        k = field(t, y, 0)
        if what == "slope":
            return Outcome(y + h * k, k / 2, [])
        return Outcome(y + h * k, k, [y, h * k.square()])

    with pytest.raises(UnknownFormError, match="slope" if what == "slope" else "linear"):
        measure(step)


@pytest.mark.parametrize(
    ("a", "b"), [(((), (1.0, 0.0)), (0.5, 0.5)), (((), (1.0,)), (1.0,))], ids=["row-too-long", "b-too-short"]
)
def test_tableau_checks_its_own_shape(a: tuple[tuple[float, ...], ...], b: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="0 carried and 2 own slopes"):
        Tableau(a=a, b=b, c=(0.0, 1.0), sides=(0, 0), dense=())
