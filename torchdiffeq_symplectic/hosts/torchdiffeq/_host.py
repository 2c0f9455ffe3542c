"""Every private name of torchdiffeq that the adapter uses, each once; `compat/` tests what each must be.

All exist since 0.2.3 and are found by name, never by version: two different releases call themselves 0.2.5.
"""

from __future__ import annotations

from torchdiffeq._impl import (
    adjoint,  # `odeint_adjoint`, `OdeintAdjointMethod`, `find_parameters`: patched, looked up at the call
    fixed_grid,  # the explicit fixed-grid solvers, which remember nothing
)
from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton  # whose steps use slopes of earlier ones
from torchdiffeq._impl.interp import _interp_evaluate  # the interpolant of an adaptive step at a time
from torchdiffeq._impl.misc import (
    Perturb,  # which neighbouring float a stage is evaluated at
    _check_inputs,  # flattens tuples, negates decreasing times, wraps the field
    _flat_to_shape,  # the way back from the flattened state
    _nextafter,  # the neighbouring float, with the gradient of the time itself
    _PerturbFunc,  # outermost wrapper of the field: moves t; `base_func` is what is evaluated there
    _ReverseFunc,  # wrapper for decreasing t
    _TupleFunc,  # wrapper for tuple states
)
from torchdiffeq._impl.odeint import SOLVERS  # method name -> solver class, at the time of the call
from torchdiffeq._impl.rk_common import (
    RKAdaptiveStepsizeODESolver,  # `tableau`, `mid`, `_before_integrate`, `_adaptive_step`, `_interp_fit`, `_advance…`
    _runge_kutta_step,  # the step of an adaptive solver
    _sort_tvals,  # how `step_t` and `jump_t` are ordered
)
from torchdiffeq._impl.solvers import (
    FixedGridODESolver,  # `grid_constructor`, `_step_func`, `_linear_interp`, `_cubic_hermite_interp`
)

__all__ = [
    "SOLVERS",
    "AdamsBashforthMoulton",
    "FixedGridODESolver",
    "Perturb",
    "RKAdaptiveStepsizeODESolver",
    "_PerturbFunc",
    "_ReverseFunc",
    "_TupleFunc",
    "_check_inputs",
    "_flat_to_shape",
    "_interp_evaluate",
    "_nextafter",
    "_runge_kutta_step",
    "_sort_tvals",
    "adjoint",
    "fixed_grid",
]
