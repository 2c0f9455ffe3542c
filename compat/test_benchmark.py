"""The benchmark's problems under pytest-benchmark: forward and backward pass of each contender, a group for each case.

Not part of the default run. Their command, in which ``--benchmark-only`` overrides ``--benchmark-skip``:

    OMP_NUM_THREADS=1 pytest compat/test_benchmark.py --benchmark-only --benchmark-group-by=group -k "small or outputs"

The number in parentheses behind a time is its ratio to the fastest of the group. ``--benchmark-save`` and
``--benchmark-compare`` work as for any of its benchmarks.

pytest-benchmark times one contender after the other, which a machine that changes its speed makes unfair.
``python -m torchdiffeq_symplectic benchmark`` lets them take turns in each round: its ratios are those to quote.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

pytest.importorskip("pandas", reason='needs the extra "cli"')

from torchdiffeq_symplectic.experiments.benchmark import Contender, Problem, installed
from torchdiffeq_symplectic.experiments.benchmark.compare import BudgetError, Counter
from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Series
from torchdiffeq_symplectic.experiments.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.experiments.environment import ERRORS

CASES = [(series, case) for series in PROBLEMS.values() for case in series.cases]
CONTENDERS = installed()
ROUNDS = 3


@functools.lru_cache(maxsize=1)
def problem_of(series: str, case: str) -> Problem:
    """The cases come one after the other, each with all contenders."""
    (found,) = (one for one in PROBLEMS[series].cases if one.label == case)
    return found.build(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All of them, or one to be skipped where no benchmark is to run."""
    options = metafunc.config.option
    wanted = options.benchmark_only or not options.benchmark_skip
    cases, chosen = (CASES, CONTENDERS) if wanted else (CASES[:1], CONTENDERS[:1])
    metafunc.parametrize(
        ("series", "case"), cases, ids=[f"{series.name}, {case.label}" for series, case in cases], scope="module"
    )
    metafunc.parametrize("contender", chosen, ids=[contender.name for contender in chosen])


@pytest.mark.filterwarnings("default")  # contenders may warn
def test_gradient(benchmark: Any, series: Series, case: Case, contender: Contender) -> None:
    problem = problem_of(series.name, case.label)
    reason = case.without.get(contender.name) or contender.refusal(problem)
    if reason is not None:
        pytest.skip(reason)
    try:  # once to warm up; some do not come to an end
        problem.gradient(Counter(series.budget).around(contender.solve))
    except BudgetError:
        pytest.skip(f"stopped after {series.budget} evaluations")
    except ERRORS as error:
        if not contender.may_fail:
            raise
        pytest.skip(f"{type(error).__name__}: {error}")
    benchmark.group = f"{series.name}: {case.label}"
    benchmark.pedantic(problem.gradient, args=(contender.solve,), rounds=ROUNDS)
