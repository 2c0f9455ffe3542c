"""Every name of torchdyn that the adapter uses, each once; `compat/` tests what each must be.

All exist since 1.0.5. Imported when torchdyn is, never before: it is slow to import.
"""

from __future__ import annotations

from torchdyn.core.defunc import DEFuncBase  # `vf`: the callable that it wraps, a module or a plain function
from torchdyn.core.neuralde import NeuralODE  # `trajectory`, which solves without asking for a sensitivity
from torchdyn.core.problems import (
    MultipleShootingProblem,  # `odeint`: of another signature, by parallel solvers
    ODEProblem,  # `__init__`, `odeint`; `sensalg`, `sensitivity`, `solver`, `solver_adjoint`, `vf`, `integral_loss`
)
from torchdyn.numerics.interpolators import str_to_interp  # name -> Interpolator: `fit`, `evaluate`, `bmid`
from torchdyn.numerics.odeint import odeint  # the solve: calls `solver.step`, and hands on what it returned
from torchdyn.numerics.solvers.ode import (
    Tsitouras45,  # `odeint` drops the interpolator for it
    str_to_solver,  # name -> solver
)

__all__ = [
    "DEFuncBase",
    "MultipleShootingProblem",
    "NeuralODE",
    "ODEProblem",
    "Tsitouras45",
    "odeint",
    "str_to_interp",
    "str_to_solver",
]
