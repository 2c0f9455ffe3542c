"""Where a choice holds and where it does not: blocks, functions, threads, tasks, the process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import Mixing, uniform

import torchdiffeq_symplectic
from torchdiffeq_symplectic import MODES, register, set_default, unregister, use
from torchdiffeq_symplectic.modes import Mode
from torchdiffeq_symplectic.recording import Keep
from torchdiffeq_symplectic.sweep import Gradients
from torchdiffeq_symplectic.tape import Tape

T = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)
UPSTREAM = "upstream"


@pytest.fixture
def differentiated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``differentiated(solver=odeint, **arguments)``: the mode that a solve here and now is differentiated by."""
    used: list[str] = []

    def spied(mode: type[Mode]) -> Callable[..., Gradients]:
        backward: Callable[..., Gradients] = mode.backward

        def noted(self: Mode, tape: Tape, *arguments: Any) -> Gradients:
            used.append(self.name + ("-stages" if tape.keep is Keep.SLOPES else ""))
            return backward(self, tape, *arguments)

        return noted

    for mode in map(type, MODES.values()):
        monkeypatch.setattr(mode, "backward", spied(mode))

    def run(solver: Any = torchdiffeq.odeint, **arguments: Any) -> str:
        used.clear()
        solution = solver(Mixing(2), uniform(2, seed=3), T, method="rk4", **arguments)
        solution.sum().backward()
        return used[0] if used else UPSTREAM

    return run


each_solver = pytest.mark.parametrize(
    "solver", [torchdiffeq.odeint, torchdiffeq.odeint_adjoint], ids=["odeint", "odeint_adjoint"]
)


@each_solver
def test_the_choice_holds_in_the_block_and_not_after_it(differentiated: Callable[..., str], solver: Any) -> None:
    assert differentiated(solver) == UPSTREAM
    with use("symplectic"):
        assert differentiated(solver) == "symplectic"
    assert differentiated(solver) == UPSTREAM


@each_solver
def test_options_are_those_of_the_mode(differentiated: Callable[..., str], solver: Any) -> None:
    with use("symplectic", checkpoint="stages", replay_check="warn"):
        assert differentiated(solver) == "symplectic-stages"


@each_solver
def test_choices_may_be_nested_and_none_is_upstream(differentiated: Callable[..., str], solver: Any) -> None:
    with use("symplectic"):
        with use("aca"):
            assert differentiated(solver) == "aca"
            with use(None):
                assert differentiated(solver) == UPSTREAM
            assert differentiated(solver) == "aca"
        assert differentiated(solver) == "symplectic"


def test_an_exception_ends_it(differentiated: Callable[..., str]) -> None:
    with pytest.raises(KeyError), use("symplectic"):
        raise KeyError
    assert differentiated() == UPSTREAM


def test_a_call_that_names_a_mode_keeps_it_and_its_options(differentiated: Callable[..., str]) -> None:
    options = {"adjoint_method": "symplectic", "adjoint_options": {"checkpoint": "stages"}}
    for outer in (use("aca"), use(None)):
        with outer:
            assert differentiated(torchdiffeq.odeint_adjoint, **options) == "symplectic-stages"


def test_one_object_may_be_used_again_and_inside_itself(differentiated: Callable[..., str]) -> None:
    switch = use("aca")
    for _ in range(2):
        with switch:
            with switch:
                assert differentiated() == "aca"
            assert differentiated() == "aca"
        assert differentiated() == UPSTREAM


def test_blocks_that_end_out_of_order_take_out_their_own(differentiated: Callable[..., str]) -> None:
    first, second = use("symplectic"), use("aca")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert differentiated() == "aca"
    second.__exit__(None, None, None)
    assert differentiated() == UPSTREAM


def name_of_current() -> str | None:
    choice = torchdiffeq_symplectic.context.current()
    return None if choice is None else choice.mode.name


def test_tasks_choose_for_themselves() -> None:
    async def named(mode: str) -> list[str | None]:
        found = []
        with use(mode):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(name_of_current())
        return found

    async def both() -> list[list[str | None]]:
        return list(await asyncio.gather(named("aca"), named("baseline")))

    assert asyncio.run(both()) == [["aca"] * 3, ["baseline"] * 3]


def test_a_function_is_decorated(differentiated: Callable[..., str]) -> None:
    @use("aca")
    def step(solver: Any) -> str:
        """One step."""
        return differentiated(solver)

    assert step(torchdiffeq.odeint) == "aca"
    assert (step.__name__, step.__doc__) == ("step", "One step.")
    assert differentiated() == UPSTREAM


def test_a_method_is_decorated_and_its_class_is_not(differentiated: Callable[..., str]) -> None:
    class Model(torch.nn.Module):
        @use("baseline")
        def forward(self) -> str:
            return differentiated()

    assert Model()() == "baseline"
    with pytest.raises(TypeError, match="Decorate the method that solves"):
        use("baseline")(Model)


def test_a_generator_function_is_inside_only_while_it_runs() -> None:
    ended = []

    @use("symplectic")
    def names() -> Iterator[Any]:
        try:
            received = yield name_of_current()
            try:
                yield received, name_of_current()
            except KeyError:
                yield "caught", name_of_current()
        finally:
            ended.append(name_of_current())

    generator: Any = names()
    assert (next(generator), name_of_current()) == ("symplectic", None)
    assert (generator.send(5), name_of_current()) == ((5, "symplectic"), None)
    assert (generator.throw(KeyError), name_of_current()) == (("caught", "symplectic"), None)
    generator.close()
    assert ended == ["symplectic"]
    assert name_of_current() is None

    @use("symplectic")
    def returning() -> Generator[int, None, int]:
        yield 1
        return 2

    def outer() -> Iterator[int]:
        yield (yield from returning())

    assert list(outer()) == [1, 2]


def test_a_coroutine_function_is_inside_until_it_ends() -> None:
    @use("aca")
    async def named() -> str | None:
        await asyncio.sleep(0)
        return name_of_current()

    async def run() -> tuple[str | None, str | None]:
        return await named(), name_of_current()

    assert asyncio.run(run()) == ("aca", None)


def test_an_asynchronous_generator_is_refused() -> None:
    async def names() -> Any:
        yield 1

    with pytest.raises(TypeError, match="asynchronous generators"):
        use("aca")(names)


@each_solver
def test_the_default_is_the_processes_own(differentiated: Callable[..., str], solver: Any) -> None:
    set_default("aca")
    assert differentiated(solver) == "aca"
    with ThreadPoolExecutor(1) as other:
        assert other.submit(differentiated, solver).result() == "aca"
    with use("symplectic"):
        assert differentiated(solver) == "symplectic"
    with use(None):
        assert differentiated(solver) == UPSTREAM
    set_default("symplectic", checkpoint="stages")
    assert differentiated(solver) == "symplectic-stages"
    set_default(None)
    assert differentiated(solver) == UPSTREAM


@pytest.mark.parametrize("choose", [use, set_default])
def test_mistakes_are_named_at_once(choose: Any) -> None:
    with pytest.raises(ValueError, match=r"""mode must be None or one of \{"symplectic".*but is 'symplectik'"""):
        choose("symplectik")
    with pytest.raises(ValueError, match="\"symplectic\" has no option 'chekpoint', only checkpoint, replay_check"):
        choose("symplectic", chekpoint="stages")
    with pytest.raises(ValueError, match="checkpoint"):
        choose("symplectic", checkpoint="everything")
    with pytest.raises(ValueError, match="replay_check"):
        choose("aca", replay_check="often")
    with pytest.raises(ValueError, match="without a mode there are no options"):
        choose(None, checkpoint="stages")
    assert name_of_current() is None


def test_unregistered_nothing_is_patched_and_choosing_is_an_error(differentiated: Callable[..., str]) -> None:
    solving: Any = sys.modules["torchdiffeq._impl.odeint"]
    unregister()
    upstream = solving.SOLVERS
    assert type(upstream) is dict
    with pytest.raises(RuntimeError, match="unregistered"), use("aca"):
        pass
    with pytest.raises(RuntimeError, match="unregistered"):
        set_default("aca")
    with use(None):
        assert differentiated() == UPSTREAM
    register()
    register()
    assert solving.SOLVERS is not upstream
    set_default("aca")
    with use("symplectic"):
        unregister()
        assert solving.SOLVERS is upstream
        assert differentiated() == UPSTREAM
        assert differentiated(torchdiffeq.odeint_adjoint) == UPSTREAM
        assert differentiated(torchdiffeq_symplectic.odeint_adjoint) == UPSTREAM
    register()
    assert differentiated() == UPSTREAM, "the default has outlived the registration"


def test_outside_of_a_choice_the_table_holds_upstreams_own_classes() -> None:
    solving: Any = sys.modules["torchdiffeq._impl.odeint"]
    unregister()
    upstream = solving.SOLVERS
    register()
    assert dict(solving.SOLVERS) == upstream
    assert list(solving.SOLVERS) == list(upstream)
    with use("symplectic"), torch.no_grad():
        assert dict(solving.SOLVERS) == upstream


def test_a_method_that_is_added_while_a_choice_holds_is_reached(
    differentiated: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    solving: Any = sys.modules["torchdiffeq._impl.odeint"]
    with use("aca"):
        monkeypatch.setitem(solving.SOLVERS, "mine", type("Mine", (torchdiffeq._impl.fixed_grid.RK4,), {}))
        solution = torchdiffeq.odeint(Mixing(2), uniform(2, seed=3), T, method="mine")
    assert solution.grad_fn.name() == "_GradientBackward"
