"""How code in the wild calls torchdyn, trained in each mode, against ``sensitivity="autograd"`` step by step.

What its layers and models do is in ``test_torchdyn_models.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.nn import Augmenter, DepthCat
from torchdyn.numerics import Euler, HyperEuler, Lorenz, VanDerPol
from torchdyn_cases import MODES, each_mode, first_step_held
from torchdyn_training import Build, Loss, assert_same_pass, assert_same_training, built

# Upstream says so to everyone whose tolerances are not odeint's defaults; ODEProblem's own defaults are not.
pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning"),
]

SOLVERS = ("euler", "midpoint", "rk4", "dopri5", "tsit5")


def mlp(inputs: int, outputs: int, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def uneven(count: int) -> Tensor:
    """Output times from 0 to 1."""
    return torch.linspace(0, 1, count).pow(1.5)


class Last(nn.Module):
    """The state at the last time, of all that a solve returns."""

    def forward(self, solution: Tensor) -> Tensor:
        return solution[-1]


class Lifted(nn.Module):
    """A field of time and state, as torchcfm wraps networks that take both in one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.net(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))
        return result


# Classifiers.


@functools.cache
def moons() -> tuple[Tensor, Tensor]:
    points, labels = make_moons(24, noise=0.1, random_state=3)
    return torch.tensor(points, dtype=torch.float64), torch.tensor(labels)


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:24] / 16, dtype=torch.float64), torch.tensor(labels[:24])


def cross_entropy_on_moons(model: nn.Module, step: int) -> Tensor:
    points, labels = moons()
    return nn.functional.cross_entropy(model(points), labels)


def cross_entropy_on_digits(model: nn.Module, step: int) -> Tensor:
    """A batch a step."""
    images, labels = digits()
    batch = slice(8 * step, 8 * step + 8)
    return nn.functional.cross_entropy(model(images[batch]), labels[batch])


def classifier(solver: str, **settings: Any) -> Build:
    """An augmented neural ODE in a Sequential; its times are set on the model, or [0, 1] by default."""

    def build(sensitivity: str) -> nn.Module:
        node = NeuralODE(mlp(4, 4), solver=solver, sensitivity=sensitivity, return_t_eval=False, **settings)
        if solver in ("euler", "midpoint", "rk4"):
            node.t_span = uneven(6)
        return nn.Sequential(Augmenter(1, 2), node, Last(), nn.Linear(4, 2))

    return build


@pytest.mark.parametrize("solver", SOLVERS)
@each_mode
def test_classifier_of_moons(mode: str, solver: str) -> None:
    assert_same_training(classifier(solver), cross_entropy_on_moons, mode)


@each_mode
def test_classifier_with_tight_tolerances(mode: str) -> None:
    assert_same_training(classifier("tsit5", atol=1e-7, rtol=1e-7), cross_entropy_on_moons, mode)


@each_mode
def test_classifier_of_digits_with_encoder_and_head(mode: str) -> None:
    def build(sensitivity: str) -> nn.Module:
        node = NeuralODE(mlp(6, 6), solver="dopri5", sensitivity=sensitivity, return_t_eval=False)
        return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), node, Last(), nn.Linear(6, 10))

    assert_same_training(build, cross_entropy_on_digits, mode)


@each_mode
def test_convolutional_classifier(mode: str) -> None:
    """States of rank four, which torchdyn's interpolated adjoint refuses."""

    def build(sensitivity: str) -> nn.Module:
        field = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Softplus(), nn.Conv2d(3, 2, 3, padding=1))
        node = NeuralODE(field, solver="rk4", sensitivity=sensitivity, return_t_eval=False)
        node.t_span = uneven(4)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), Augmenter(1, 1), node, Last(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 10)
        )

    assert_same_training(build, cross_entropy_on_digits, mode)


@each_mode
def test_stacked_neural_odes(mode: str) -> None:
    """Weights that are constant piece by piece, with a layer in between and two solvers."""

    def build(sensitivity: str) -> nn.Module:
        def piece(solver: str) -> Any:
            return NeuralODE(mlp(3, 3), solver=solver, sensitivity=sensitivity, return_t_eval=False)

        layers = [Augmenter(1, 1), piece("dopri5"), Last(), nn.Linear(3, 3), piece("tsit5"), Last(), piece("euler")]
        return nn.Sequential(*layers, Last(), nn.Linear(3, 2))

    assert_same_training(build, cross_entropy_on_moons, mode)


@each_mode
def test_one_neural_ode_used_twice(mode: str) -> None:
    def build(sensitivity: str) -> nn.Module:
        node = NeuralODE(mlp(2, 2), solver="dopri5", sensitivity=sensitivity, return_t_eval=False)
        return nn.Sequential(node, Last(), nn.Tanh(), node, Last())

    assert_same_training(build, cross_entropy_on_moons, mode)


# Calls.

POINTS = torch.linspace(-1.2, 1.6, 10, dtype=torch.float64).reshape(5, 2)
TARGET = torch.linspace(0.7, -0.4, 10, dtype=torch.float64).reshape(5, 2)


def neural_ode(solver: Any = "dopri5", field: Any = None, **settings: Any) -> Build:
    """A model of two dimensions."""

    def build(sensitivity: str) -> Any:
        return NeuralODE(mlp(2, 2) if field is None else field(), solver=solver, sensitivity=sensitivity, **settings)

    return build


def last_state(solution: Tensor) -> Tensor:
    return (solution[-1] - TARGET).square().mean()


def every_state(solution: Tensor) -> Tensor:
    """Weighs each output differently."""
    weights = torch.linspace(0.3, 1.5, len(solution))
    return (weights * (solution - TARGET).square().mean((1, 2))).sum()


def last_of_thirty(model: Any, step: int) -> Tensor:
    times, solution = model(POINTS, torch.linspace(0, 1, 30))
    assert len(times) == len(solution) == 30
    return last_state(solution)


def all_of_uneven(model: Any, step: int) -> Tensor:
    return every_state(model(POINTS, uneven(7))[1])


def backwards(model: Any, step: int) -> Tensor:
    times, solution = model(POINTS, uneven(5).flip(0))
    assert float(times[0].detach()) == -1  # upstream returns them so
    return every_state(solution)


def there_and_back(model: Any, step: int) -> Any:
    """As flows are sampled: the end of one solve is the start of the other."""
    _, there = model(POINTS, uneven(3))
    _, back = model(there[-1] + 0.1, uneven(3).flip(0))
    return last_state(back) + there.square().mean()


def with_saved_times(model: Any, step: int) -> Tensor:
    times, solution = model(POINTS, uneven(9), save_at=uneven(9)[[2, 5, 8]])
    assert len(times) == len(solution) == 3
    return every_state(solution)


def with_arguments(model: Any, step: int) -> Tensor:
    return last_state(model(POINTS, uneven(5), args={"gain": torch.tensor(3.0)})[1])


def with_times_as_list(model: Any, step: int) -> Tensor:
    return every_state(model(POINTS, [torch.tensor([time]) for time in (0.0, 0.3, 1.0)])[1])


def of_single_precision_times(model: Any, step: int) -> Tensor:
    return every_state(model(POINTS, torch.linspace(0, 1, 4, dtype=torch.float32))[1])


def along_a_trajectory(model: Any, step: int) -> Tensor:
    return every_state(model.trajectory(POINTS, uneven(6)))


def solve_of_steps(model: Any, step: int) -> Tensor:
    """An ODE-RNN: each observation moves the state, and the solve goes on from there to the next."""
    state = torch.zeros(5, 2)
    for k, observation in enumerate(torch.linspace(0, 1, 4)):
        state = torch.tanh(state + POINTS * observation)
        state = model(state, torch.tensor([0.2 * k, 0.2 * k + 0.2]))[1][-1]
    return (state - TARGET).square().mean()


CALLS: dict[str, tuple[Build, Loss]] = {
    "thirty outputs, dopri5": (neural_ode(), last_of_thirty),
    "thirty outputs, tsit5": (neural_ode("tsit5"), last_of_thirty),
    "thirty outputs, euler": (neural_ode("euler"), last_of_thirty),
    "all outputs, dopri5": (neural_ode(), all_of_uneven),
    "all outputs, rk4": (neural_ode("rk4"), all_of_uneven),
    "interpolated": (neural_ode(interpolator="4th", atol=1e-4, rtol=1e-4), last_of_thirty),
    "interpolated, all outputs": (neural_ode(interpolator="4th"), all_of_uneven),
    "depth in the state": (neural_ode(field=lambda: nn.Sequential(DepthCat(1), mlp(3, 2))), all_of_uneven),
    "time and state": (neural_ode("tsit5", field=lambda: Lifted(mlp(3, 2)), atol=1e-4, rtol=1e-4), all_of_uneven),
    "backwards, dopri5": (neural_ode(field=lambda: Lifted(mlp(3, 2))), backwards),
    "backwards, midpoint": (neural_ode("midpoint", field=lambda: Lifted(mlp(3, 2))), backwards),
    "there and back": (neural_ode(field=lambda: Lifted(mlp(3, 2))), there_and_back),
    "save_at": (neural_ode("euler"), with_saved_times),
    "args, rk4": (neural_ode("rk4"), with_arguments),
    "args, dopri5": (neural_ode(), with_arguments),
    "list of times": (neural_ode("tsit5"), with_times_as_list),
    "single precision times, rk4": (neural_ode("rk4"), of_single_precision_times),
    "single precision times, dopri5": (neural_ode(), of_single_precision_times),
    "trajectory, rk4": (neural_ode("rk4"), along_a_trajectory),
    "trajectory, dopri5": (neural_ode(), along_a_trajectory),
    "ODE-RNN": (neural_ode("tsit5"), solve_of_steps),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@each_mode
def test_call(mode: str, call: str) -> None:
    assert_same_training(*CALLS[call], mode)


# Fields and solvers of one's own.


class Forced(nn.Module):
    """A field whose further arguments are bound by functools.partial."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 2)

    def forward(self, t: Tensor, x: Tensor, u: Tensor, v: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(x + u * torch.cos(t)) * v
        return result


def of_partial(sensitivity: str) -> Any:
    field = Forced()
    bound = functools.partial(field.forward, u=torch.tensor([0.4, -0.3]), v=torch.tensor(0.8))
    return NeuralODE(bound, solver="euler", sensitivity=sensitivity, optimizable_params=field.parameters())


def of_function(sensitivity: str) -> Any:
    net = mlp(3, 2)

    def field(t: Tensor, x: Tensor, args: Any = None) -> Any:
        result: Tensor = net(torch.cat([x, torch.ones(len(x), 1) * t], 1))
        return result

    return NeuralODE(field, solver="dopri5", sensitivity=sensitivity, optimizable_params=net.parameters())


class InTurn(Euler):  # type: ignore[misc]
    """Takes what the field returns as the next state; such a step is of no Runge-Kutta form."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[None, Any, None]:
        _, state = f(t, x, args)
        return None, state, None


def of_dictionary(sensitivity: str) -> Any:
    net = mlp(2, 2)

    def field(t: Tensor, x: dict[str, Tensor], args: Any) -> Any:
        both = torch.cat([x["left"], x["right"]], -1)
        moved = both + 0.2 * net(both) * torch.cos(t)
        return t, {"left": moved[..., :1], "right": moved[..., 1:]}

    return NeuralODE(field, solver=InTurn(), sensitivity=sensitivity, optimizable_params=net.parameters())


def both_parts(model: Any, step: int) -> Tensor:
    _, solution = model({"left": POINTS[:, :1], "right": POINTS[:, 1:]}, uneven(6))
    return every_state(torch.cat([solution["left"], solution["right"]], -1))


def of_learned_solver(sensitivity: str) -> Any:
    """A hypersolver, its network trained with the field."""
    return NeuralODE(mlp(2, 2), solver=HyperEuler(Lifted(mlp(3, 2))), sensitivity=sensitivity)


def by_a_hypersolver(model: Any, step: int) -> Tensor:
    """Without a last step of no length, or hypernet of time: t is 0-d there, and `Lifted` repeats it."""
    return every_state(model(POINTS, uneven(5))[1])


OWN: dict[str, tuple[Build, Loss]] = {
    "partial": (of_partial, all_of_uneven),
    "function": (of_function, all_of_uneven),
    "dictionary": (of_dictionary, both_parts),
    "hypersolver": (of_learned_solver, by_a_hypersolver),
}


@pytest.mark.parametrize("own", OWN)
@each_mode
def test_field_or_solver_of_ones_own(mode: str, own: str) -> None:
    model = assert_same_training(*OWN[own], mode)
    assert len(list(model.parameters())) >= 4


# The mode given in other ways.


@each_mode
def test_mode_as_solver_adjoint(mode: str) -> None:
    def build(sensitivity: str) -> Any:
        if sensitivity == "autograd":
            return NeuralODE(mlp(2, 2), solver="dopri5")
        return NeuralODE(mlp(2, 2), solver="dopri5", sensitivity="adjoint", solver_adjoint=sensitivity)

    assert_same_training(build, all_of_uneven, mode)


@pytest.mark.parametrize("before", ["autograd", "adjoint", "interpolated_adjoint"])
@each_mode
def test_mode_changed_after_construction(mode: str, before: str) -> None:
    def build(sensitivity: str) -> Any:
        model = NeuralODE(mlp(2, 2), solver="rk4", sensitivity=before)
        model.sensitivity = sensitivity
        if sensitivity == "autograd":
            model.sensalg = sensitivity  # upstream looks at this one alone
        return model

    assert_same_training(build, all_of_uneven, mode)


@each_mode
def test_mode_changed_between_two_passes(mode: str) -> None:
    """One model by one mode and then by backpropagation, as torchdyn's own tests compare them."""

    def build(sensitivity: str) -> Any:
        return NeuralODE(mlp(2, 2), solver="dopri5", sensitivity=sensitivity, return_t_eval=False)

    def alternating(model: Any, step: int) -> Tensor:
        model.sensitivity = MODES[mode]["sensitivity"] if step % 2 else "autograd"
        return every_state(model(POINTS, uneven(4)))

    with first_step_held():
        assert_same_training(build, alternating, mode, steps=4)


# Problems without parameters: gradients of initial states and times.


def of_van_der_pol(solver: str, stiffness: float, **settings: Any) -> Build:
    def build(sensitivity: str) -> Any:
        return ODEProblem(VanDerPol(stiffness), sensitivity=sensitivity, solver=solver, **settings)

    return build


def end_of(model: Any, leaves: Mapping[str, Tensor]) -> Tensor:
    return model.odeint(leaves["x"], leaves["t_span"])[1][-1].sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("stiffness", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("solver", SOLVERS)
@each_mode
def test_problem_of_van_der_pol(mode: str, solver: str, stiffness: float) -> None:
    inputs = {"x": torch.randn(16, 2), "t_span": torch.linspace(0, 1, 12)}
    assert_same_pass(of_van_der_pol(solver, stiffness), end_of, mode, inputs)


@each_mode
def test_problem_interpolated(mode: str) -> None:
    inputs = {"x": torch.randn(8, 2), "t_span": torch.linspace(0, 1, 40)}
    assert_same_pass(of_van_der_pol("dopri5", 0.5, interpolator="4th"), end_of, mode, inputs)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_problem_of_lorenz(mode: str, solver: str) -> None:
    """Fast, with rejected steps, from far off the attractor; torchdyn's Lorenz has parameters that it never uses."""

    def build(sensitivity: str) -> Any:
        return ODEProblem(Lorenz(), solver, sensitivity=sensitivity)

    inputs = {"x": torch.randn(4, 3) + 15, "t_span": torch.linspace(0, 0.3, 20)}
    assert_same_pass(build, end_of, mode, inputs)


class Rabi(nn.Module):
    """A quantum system of two levels, on density matrices: a complex state, and no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.tensor([[0, 0.7], [0.7, 0.2]], dtype=torch.complex128)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        slope = -1j * (1 + 0.3 * torch.cos(t)) * self.generator @ x
        return slope + slope.mH


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_problem_with_complex_states(mode: str, solver: str) -> None:
    def build(sensitivity: str) -> Any:
        return ODEProblem(Rabi(), solver, sensitivity=sensitivity)

    def loss(model: Any, leaves: Mapping[str, Tensor]) -> Tensor:
        solution = model.odeint(leaves["x"], torch.linspace(0, 2, 10))[1]
        return solution[-1, 0, 0].real + 2 * solution[4, 0, 1].imag + solution.abs().square().mean()  # type: ignore[no-any-return]

    half = torch.randn(2, 2, dtype=torch.complex128)
    assert_same_pass(build, loss, mode, {"x": half + half.mH})


class Slow(nn.Module):
    """So slow that one step reaches over all output times."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1e-3))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.rate * torch.ones_like(x)


@pytest.mark.parametrize(
    ("times", "outputs"), [([0.03, 0.29], 1), ([0.03, 0.29, 1.29], 3)], ids=["the last", "one in between"]
)
@each_mode
def test_output_time_that_rounding_misses(mode: str, times: list[float], outputs: int) -> None:
    """0.03 + (0.29 - 0.03) is more than 0.29: torchdyn loses the last output there, and goes back for another one."""

    def loss(model: Any, leaves: Mapping[str, Tensor]) -> Tensor:
        _, solution = model(leaves["x"], leaves["t_span"])
        assert len(solution) == outputs
        return every_state(solution)

    inputs = {"x": POINTS, "t_span": torch.tensor(times)}
    assert_same_pass(neural_ode("dopri5", Slow), loss, mode, inputs)


# Sampling.


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@each_mode
def test_samples_without_gradient(mode: str, solver: str) -> None:
    """As torchcfm draws them: a network trained by itself, then `trajectory` under no_grad; the bits are upstream's."""
    net = mlp(3, 2)
    noise, times = torch.randn(32, 2), torch.linspace(0, 1, 11)
    samples = {}
    for name in ("autograd", mode):
        node = built(
            lambda sensitivity: NeuralODE(Lifted(net), solver=solver, sensitivity=sensitivity, atol=1e-4, rtol=1e-4),
            name,
        )
        with torch.no_grad():
            samples[name] = node.trajectory(noise, t_span=times)
        node.requires_grad_(False)
        assert torch.equal(node(noise, times)[1], samples[name])
    assert torch.equal(samples[mode], samples["autograd"])
    assert not samples[mode].requires_grad


@each_mode
def test_flow_matching_and_its_samples(mode: str) -> None:
    """Trained without a solve; then the network is tuned through its samples."""

    def build(sensitivity: str) -> Any:
        return NeuralODE(Lifted(mlp(3, 2)), solver="dopri5", sensitivity=sensitivity, atol=1e-4, rtol=1e-4)

    def loss(model: Any, step: int) -> Tensor:
        start, end, t = torch.randn(8, 2), torch.randn(8, 2) + 2, torch.rand(8, 1)
        if step < 2:
            moving = t * end + (1 - t) * start
            return (model.vf.vf.net(torch.cat([moving, t], 1)) - (end - start)).square().mean()  # type: ignore[no-any-return]
        with torch.no_grad():
            reference = model.trajectory(start, torch.linspace(0, 1, 5))
        solution = model.trajectory(start, torch.linspace(0, 1, 5))
        assert torch.equal(solution, reference)
        return (solution[-1] - end).square().mean()  # type: ignore[no-any-return]

    assert_same_training(build, loss, mode, steps=4)


# Integral losses. The modes take them as torchdyn's adjoint does: the loss shows in the gradient alone.


def reference(t: Tensor) -> Tensor:
    return torch.stack([torch.cos(3 * t), torch.sin(3 * t)], -1)


class Tracking(nn.Module):
    """The distance to a reference that moves."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (reference(t) - x).square().sum(1, keepdim=True)


def controlled(field: Any = None, solver: str = "rk4", cost: Any = None) -> Build:
    def build(sensitivity: str) -> Any:
        vector_field = Lifted(mlp(3, 2)) if field is None else field()
        return NeuralODE(vector_field, solver=solver, sensitivity=sensitivity, integral_loss=cost or Tracking())

    return build


def with_the_loss_in_front(model: Any, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Solution and integral as ``sensitivity="autograd"`` has them: in a first column of the state."""
    _, solution = model(torch.cat([torch.zeros(len(x), 1), x], 1), times)
    return solution[..., 1:], solution[-1, :, 0].sum()


def tracking_loss(weight: float) -> Loss:
    """The integral alone where the weight is 0, as torchdyn's tutorial has it."""

    def loss(model: Any, step: int) -> Tensor:
        if model.sensitivity != "autograd":
            return weight * every_state(model(POINTS, uneven(8))[1])
        solution, integral = with_the_loss_in_front(model, POINTS, uneven(8))
        return weight * every_state(solution) + integral

    return loss


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
@each_mode
def test_integral_loss_is_trained(mode: str, solver: str, weight: float) -> None:
    assert_same_training(controlled(solver=solver), tracking_loss(weight), mode, same_losses=False)


@each_mode
def test_integral_loss_of_van_der_pol(mode: str) -> None:
    """torchdyn's own test of it: the gradient of the initial states, and a cost with a column of its own."""
    x, times = torch.randn(32, 2), torch.linspace(0, 1, 40)
    gradients: list[Any] = []
    for name in ("autograd", mode):
        model, leaf = built(controlled(lambda: VanDerPol(0.5), cost=lambda t, x: 0.1 * x[:, :1]), name), x.clone()
        leaf.requires_grad_()
        if name == "autograd":
            _, loss = with_the_loss_in_front(model, leaf, times)
        else:
            loss = 0.0 * model(leaf, times)[1][-1].sum()
        gradients += torch.autograd.grad(loss, leaf)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-11, atol=1e-13)


@each_mode
def test_integral_loss_by_adaptive_steps(mode: str) -> None:
    """As accurate as the solve, which is all that a run with the loss as a column can tell of it."""
    x, times = torch.randn(32, 2).requires_grad_(), torch.linspace(0, 1, 40)
    field = functools.partial(VanDerPol, 0.5)
    fine = built(controlled(field, cost=lambda t, x: 0.1 * x[:, :1]), "autograd")
    (expected,) = torch.autograd.grad(with_the_loss_in_front(fine, x, torch.linspace(0, 1, 200))[1], x)

    def build(sensitivity: str) -> Any:
        settings: dict[str, Any] = {"interpolator": "4th", "atol": 1e-6, "rtol": 1e-6}
        cost = lambda t, x: 0.1 * x[:, :1]  # noqa: E731
        return NeuralODE(field(), solver="dopri5", sensitivity=sensitivity, integral_loss=cost, **settings)

    (found,) = torch.autograd.grad(0.0 * built(build, mode)(x, times)[1][-1].sum(), x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@each_mode
def test_integral_loss_looked_at_while_training(mode: str) -> None:
    """As torchdyn's tutorial does it: to "autograd" and back within a step, the field's own attribute with it."""

    def loss(model: Any, step: int) -> Tensor:
        with torch.no_grad():
            kept = model.sensitivity
            model.sensitivity = model.vf.sensitivity = "autograd"
            _, integral = with_the_loss_in_front(model, POINTS, uneven(8))
            model.sensitivity = model.vf.sensitivity = kept
        assert 0 < float(integral) < 100
        return tracking_loss(0.0)(model, step)

    assert_same_training(controlled(), loss, mode, same_losses=False)
