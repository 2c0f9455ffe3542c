"""Benchmarks: forward and backward pass of each mode, and the forward pass alone, as ratios to backpropagation.

Not part of the default run. Their command, in which ``--benchmark-only`` overrides ``--benchmark-skip``:

    OMP_NUM_THREADS=1 pytest compat/test_benchmark.py --benchmark-only --benchmark-group-by=group

pytest-benchmark times one contender after the other, which a machine that changes its speed makes unfair. So the tests
named "in_turn" time all contenders in each of several rounds and keep the medians of the ratios within a round; these
are the figures to quote. They are in the ``extra_info`` of ``--benchmark-json=FILE``, and are printed at the end
of the run with ``-rP``.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torchdiffeq

import torchdiffeq_symplectic
from torchdiffeq_symplectic.benchmark.compare import CONTENDERS, Contender
from torchdiffeq_symplectic.benchmark.problem import Problem, gradient
from torchdiffeq_symplectic.benchmark.problems import large_net, many_outputs, small_net
from torchdiffeq_symplectic.hosts.torchdiffeq import _upstream_odeint_adjoint

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "large net": large_net,
    "many outputs": many_outputs,
    "small net": small_net,
}
ROUNDS = {"large net": 5, "many outputs": 11, "small net": 15}
Run = Callable[[], object]


def forward_and_backward(problem: Problem, contender: Contender) -> object:
    return gradient(problem.loss(problem.solve(contender.solve)), problem.leaves)


def symplectic_forward(*args: Any, **settings: Any) -> Any:
    return torchdiffeq_symplectic.odeint_adjoint(*args, **settings, adjoint_method="symplectic")


def stages_forward(*args: Any, **settings: Any) -> Any:
    options = {"checkpoint": "stages"}
    return torchdiffeq_symplectic.odeint_adjoint(
        *args, **settings, adjoint_method="symplectic", adjoint_options=options
    )


FORWARD: dict[str, Callable[..., Any]] = {
    "adjoint": _upstream_odeint_adjoint,
    "symplectic": symplectic_forward,
    "symplectic, stages": stages_forward,
    "backpropagation": torchdiffeq.odeint,
}


def ratios_in_turn(runs: Mapping[str, Run], reference: str, rounds: int) -> dict[str, float]:
    """Medians over the rounds of each one's time over that of ``reference`` in the same round.

    The order of the contenders turns by one place from round to round, so that none is always behind the same other.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run()  # to warm up
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            place = number % len(names)
            for name in names[place:] + names[:place]:
                start = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - start)
            gc.collect()
    finally:
        gc.enable()
    return {
        name: statistics.median(one / base for one, base in zip(times[name], times[reference], strict=True))
        for name in names
    }


def report(benchmark: Any, group: str, runs: Mapping[str, Run], reference: str, rounds: int) -> None:
    """Time ``runs`` in turn as one benchmark; its ``extra_info`` and the test's output have the ratios."""
    benchmark.group = group
    ratios: dict[str, float] = benchmark.pedantic(ratios_in_turn, args=(runs, reference, rounds), rounds=1)
    for name, ratio in ratios.items():
        benchmark.extra_info[f"{name} / {reference}"] = round(ratio, 3)
        print(f"{group}: {name} / {reference} = {ratio:.3f}")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_modes_in_turn(benchmark: Any, problem: str) -> None:
    instance = PROBLEMS[problem]()
    runs = {contender.name: partial(forward_and_backward, instance, contender) for contender in CONTENDERS}
    report(benchmark, f"{problem}, in turn", runs, "backpropagation", ROUNDS[problem])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_forward_passes_in_turn(benchmark: Any, problem: str) -> None:
    instance = PROBLEMS[problem]()
    runs = {name: partial(instance.solve, solve) for name, solve in FORWARD.items()}
    report(benchmark, f"{problem}, forward, in turn", runs, "adjoint", 3 * ROUNDS[problem])


TORCHDYN: dict[str, tuple[str, dict[str, str]]] = {
    "autograd": ("autograd", {}),
    "adjoint": ("adjoint", {}),
    "aca": ("aca", {}),
    "baseline": ("baseline", {}),
    "symplectic": ("symplectic", {}),
    "symplectic, stages": ("symplectic", {"checkpoint": "stages"}),
}


# In single precision torchdyn's adaptive solvers do not reach the tolerance of the small net.
@pytest.mark.parametrize(("problem", "solver"), [("large net", "dopri5"), ("large net", "rk4"), ("small net", "rk4")])
@pytest.mark.filterwarnings("ignore:Setting tolerances has no effect")  # torchdyn's, of fixed-step solvers
def test_torchdyn_in_turn(benchmark: Any, problem: str, solver: str) -> None:
    """The same networks in torchdyn; "interpolated_adjoint" is left out, as it is no faster than "adjoint"."""
    core = pytest.importorskip("torchdyn.core")
    instance = PROBLEMS[problem]()
    x = instance.leaves[0]
    times = instance.t if solver == "dopri5" else torch.linspace(0, 1, max(len(instance.t), 10))

    def run(sensitivity: str, options: dict[str, str]) -> object:
        model = core.NeuralODE(
            instance.field.network,
            solver=solver,
            sensitivity=sensitivity,
            atol=instance.atol,
            rtol=instance.rtol,
            atol_adjoint=instance.atol,
            rtol_adjoint=instance.rtol,
        )
        model.adjoint_options = options
        return gradient(instance.loss(model(x, times)[1]), instance.leaves)

    runs = {name: partial(run, *arguments) for name, arguments in TORCHDYN.items()}
    report(benchmark, f"torchdyn, {problem}, {solver}, in turn", runs, "autograd", ROUNDS[problem])


@pytest.mark.parametrize("contender", CONTENDERS, ids=[contender.name for contender in CONTENDERS])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_mode(benchmark: Any, problem: str, contender: Contender) -> None:
    benchmark.group = problem
    benchmark(forward_and_backward, PROBLEMS[problem](), contender)


@pytest.mark.parametrize("solve", FORWARD)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_forward_pass(benchmark: Any, problem: str, solve: str) -> None:
    benchmark.group = f"{problem}, forward"
    benchmark(PROBLEMS[problem]().solve, FORWARD[solve])
