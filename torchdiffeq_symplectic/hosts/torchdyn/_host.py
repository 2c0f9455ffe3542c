"""Every name of torchdyn that the adapter uses, each once; `compat/` tests what each must be.

All exist since 1.0.5. Imported when torchdyn is, never before: it is slow to import.
"""

from __future__ import annotations

from torchdyn.core.neuralde import NeuralODE  # `trajectory`, which solves without asking for a sensitivity
from torchdyn.core.problems import (
    MultipleShootingProblem,  # `odeint`: of another signature, by parallel solvers
    ODEProblem,  # `__init__`, `odeint`; `sensalg`, `sensitivity`, `solver`, `solver_adjoint`, `vf`, `integral_loss`
)
from torchdyn.numerics.interpolators import str_to_interp  # name -> Interpolator: `fit`, `evaluate`, `bmid`
from torchdyn.numerics.odeint import odeint  # the solve: calls `solver.step`, and hands on what it returned
from torchdyn.numerics.solvers.ode import (
    DormandPrince45,  # this and the next three: explicit steps whose arithmetic is that of whole states
    Euler,
    Midpoint,
    RungeKutta4,
    Tsitouras45,  # `odeint` drops the interpolator for it
    str_to_solver,  # name -> solver
)

# Their steps are known to be followed by autograd, and to do the same to a state laid out flat.
PLAIN_SOLVERS = frozenset({DormandPrince45, Euler, Midpoint, RungeKutta4, Tsitouras45})

__all__ = [
    "PLAIN_SOLVERS",
    "MultipleShootingProblem",
    "NeuralODE",
    "ODEProblem",
    "Tsitouras45",
    "odeint",
    "str_to_interp",
    "str_to_solver",
]
