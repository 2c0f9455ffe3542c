"""What fields in the wild do, in each mode, against backpropagation through ``odeint`` on the same steps.

How torchdiffeq is called is in ``test_torchdiffeq_patterns.py``, modules across copies and processes in
``test_torchdiffeq_modules.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic import MissingGradientWarning, ReplayError

Mode = dict[str, Any]
Agree = Callable[..., None]
T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
RK4: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.1}}
DOPRI5: dict[str, Any] = {"method": "dopri5", "options": {"first_step": 0.1}, "rtol": 1e-4, "atol": 1e-5}


def initial(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-1.3, 2.1, count, dtype=torch.float64).reshape(shape).requires_grad_()


def loss_of(solution: Any) -> Tensor:
    parts = solution if isinstance(solution, tuple) else (solution,)
    weights = [torch.linspace(0.5, 2, part.numel(), dtype=part.dtype).reshape(part.shape) for part in parts]
    terms = [(part * weight).sum() + part.pow(3).sum() for part, weight in zip(parts, weights, strict=True)]
    return torch.stack(terms).sum()


def gradients(solution: Any, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    result: tuple[Tensor | None, ...] = torch.autograd.grad(loss_of(solution), tuple(inputs), allow_unused=True)
    return result


def joined(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors if tensor is not None])


def network(*sizes: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for entering, leaving in pairwise(sizes):
        layers += [nn.Linear(entering, leaving), activation()]
    return nn.Sequential(*layers[:-1]).double()


class Plain(nn.Module):
    """A network of the state and the time, through ``layer``."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = network(4, 6), network(6, 3)
        self.layer = layer or nn.Tanh()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.last(self.layer(self.first(torch.cat([y, t.expand(len(y), 1)], dim=1))))
        return result


# Normalizing flows.


class ContinuousFlow(nn.Module):
    """FFJORD's and RNODE's field: it switches gradients on, marks what it is given, and has costs in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(3, 7, 2)
        self.noise: Tensor | None = None
        self.nfe = 0

    def before_odeint(self, noise: Tensor | None = None) -> None:
        self.noise, self.nfe = noise, 0

    def forward(self, t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = states[0]
        self.nfe += 1
        if self.noise is None:
            self.noise = torch.randint_like(z, 2) * 2 - 1
        with torch.enable_grad():
            z.requires_grad_(True)
            t.requires_grad_(True)
            slope = self.net(torch.cat([z, t.expand(len(z), 1)], dim=1))
            (product,) = torch.autograd.grad(slope, z, self.noise, create_graph=True)
            divergence = (product * self.noise).sum(dim=1, keepdim=True)
            kinetic = slope.square().mean(dim=1, keepdim=True)
            jacobian = product.square().mean(dim=1, keepdim=True)
        return slope, -divergence, kinetic, jacobian


def flow_states() -> tuple[Tensor, ...]:
    return initial(5, 2), *(torch.zeros(5, 1, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}], ids=["empty options", "first step"])
def test_a_continuous_flow_with_costs(options: dict[str, Any], mode: Mode, assert_agree: Agree) -> None:
    """FFJORD's call: ``options={}``, and tolerances that leave the costs out of the error."""
    flow, states = ContinuousFlow(), flow_states()
    tolerances = {"rtol": [1e-5, 1e-5, 1e20, 1e20], "atol": [1e-5, 1e-5, 1e20, 1e20]}
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    inputs = [states[0], *flow.parameters()]
    flow.before_odeint()
    found = torchdiffeq.odeint_adjoint(flow, states, t, method="dopri5", options=options, **tolerances, **mode)
    found_gradients = gradients(tuple(part[-1] for part in found), inputs)
    expected = torchdiffeq.odeint(flow, states, t, method="dopri5", options=options, **tolerances)
    expected_gradients = gradients(tuple(part[-1] for part in expected), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # With empty options odeint also differentiates its choice of the first step.
    assert_agree(found_gradients, expected_gradients, 1e-11 if options else 1e-3)


def test_noise_drawn_for_a_second_solve_does_not_reach_the_first(mode: Mode, assert_agree: Agree) -> None:
    flow, states = ContinuousFlow(), flow_states()
    inputs = [states[0], *flow.parameters()]
    flow.before_odeint()
    truth = gradients(torchdiffeq.odeint(flow, states, T, **RK4), inputs)
    first = torchdiffeq.odeint_adjoint(flow, states, T, **RK4, **mode)
    flow.before_odeint()
    second = torchdiffeq.odeint_adjoint(flow, flow_states(), T, **RK4, **mode)
    loss_of(second).backward()
    assert_agree(gradients(first, inputs), truth)


def test_a_field_that_detaches_in_eval_mode_gives_zero_products(mode: Mode, assert_agree: Agree) -> None:
    class Detaching(Plain):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            slope = super().forward(t, y)
            return slope if self.training else slope.detach()

    func, y0 = Detaching().eval(), initial(4, 3)
    inputs = [y0, *func.parameters()]
    found = torchdiffeq.odeint_adjoint(func, y0, T, **DOPRI5, **mode)
    assert_agree(gradients(found, inputs), gradients(torchdiffeq.odeint(func, y0, T, **DOPRI5), inputs))


# Counting evaluations.


class Budgeted(Plain):
    """GRAND's field: it counts its evaluations, and gives up beyond a number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.nfe, self.most = 0, 10**9
        self.register_buffer("total", torch.zeros((), dtype=torch.long))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.nfe >= self.most:
            raise TimeoutError("too many evaluations")
        self.nfe += 1
        return super().forward(t, y)


def test_a_counter_read_around_backward(mode: Mode) -> None:
    ours, theirs, y0 = Budgeted(), Budgeted(), initial(4, 3)
    theirs.load_state_dict(ours.state_dict())
    solution = torchdiffeq.odeint_adjoint(ours, y0, T, **DOPRI5, **mode)
    torchdiffeq.odeint(theirs, y0, T, **DOPRI5)
    forward, ours.nfe = ours.nfe, 0
    assert forward == theirs.nfe
    solution.sum().backward()
    assert 0 < ours.nfe <= 2 * forward


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_budget_that_runs_out(where: str, mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Budgeted(), initial(4, 3)
    inputs = [y0, *func.parameters()]
    expected = gradients(torchdiffeq.odeint(func, y0, T, **DOPRI5), inputs)
    needed, func.nfe = func.nfe, 0
    func.most = needed + 5 if where == "backward" else 5
    state = torch.get_rng_state()
    with pytest.raises(TimeoutError, match="too many evaluations"):
        loss_of(torchdiffeq.odeint_adjoint(func, y0, T, **DOPRI5, **mode)).backward()
    assert func.nfe == func.most
    assert all(tensor.grad is None for tensor in inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert func.training
    assert torch.is_grad_enabled()
    func.nfe, func.most = 0, 10**9
    assert_agree(gradients(torchdiffeq.odeint_adjoint(func, y0, T, **DOPRI5, **mode), inputs), expected)


# Attributes set before each solve.


class GraphDiffusion(nn.Module):
    """A graph network's field, its graph and its source set before each solve."""

    edges: Tensor
    source: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.score, self.strength = network(6, 1), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def set_graph(self, edges: Tensor, source: Tensor) -> None:
        self.edges, self.source = edges, source

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        origin, target = self.edges
        weight = torch.sigmoid(self.score(torch.cat([x[origin], x[target]], dim=1)))
        arriving = torch.zeros_like(x).index_add(0, target, weight * x[origin])
        return arriving - x + self.strength * torch.cos(t) * self.source


EDGES = torch.tensor([[0, 1, 2, 3, 3, 1], [1, 2, 3, 0, 1, 0]])


def test_a_graph_networks_attributes(mode: Mode, assert_agree: Agree) -> None:
    """The source is derived from an encoder and closed over; it is listed."""
    func, encoder = GraphDiffusion(), network(2, 3)
    features = initial(4, 2)
    inputs = [features, *encoder.parameters(), *func.parameters()]

    def solve(solver: Callable[..., Tensor], **adjoint: Any) -> tuple[Tensor | None, ...]:
        x = encoder(features)
        func.set_graph(EDGES, x)
        if adjoint:
            adjoint["adjoint_params"] = (*func.parameters(), x)
        return gradients(solver(func, x, T, **DOPRI5, **adjoint), inputs)

    assert_agree(solve(torchdiffeq.odeint_adjoint, **mode), solve(torchdiffeq.odeint))


def test_a_graph_replaced_before_backward_does_not_reach_the_solve(mode: Mode, assert_agree: Agree) -> None:
    func, x = GraphDiffusion(), initial(4, 3)
    inputs = [x, *func.parameters()]
    func.set_graph(EDGES, x.detach())
    truth = gradients(torchdiffeq.odeint(func, x, T, **DOPRI5), inputs)
    solution = torchdiffeq.odeint_adjoint(func, x, T, **DOPRI5, **mode)
    func.set_graph(EDGES.flip(0), x.detach())
    assert_agree(gradients(solution, inputs), truth)


def test_a_captured_tensor_that_is_not_listed_is_reported(mode: Mode) -> None:
    func, x = GraphDiffusion(), initial(4, 3)
    source = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    func.set_graph(EDGES, source)
    solution = torchdiffeq.odeint_adjoint(func, x, T, **RK4, **mode)
    with pytest.warns(MissingGradientWarning, match=r"\(4, 3\)"):
        loss_of(solution).backward()


def test_a_context_in_the_state(mode: Mode, assert_agree: Agree) -> None:
    """PointFlow's way to condition a field: an extra state that does not move."""
    func = network(5, 6, 3)
    y0, context = initial(4, 3), initial(4, 2)

    def field(t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, context = states
        return func(torch.cat([y * torch.cos(t), context], dim=1)), torch.zeros_like(context)

    params = tuple(func.parameters())
    inputs = [y0, context, *params]
    found = torchdiffeq.odeint_adjoint(field, (y0, context), T, adjoint_params=params, **DOPRI5, **mode)[0]
    expected = torchdiffeq.odeint(field, (y0, context), T, **DOPRI5)[0]
    assert_agree(gradients(found, inputs), gradients(expected, inputs))


def test_the_field_is_the_model_itself(mode: Mode, assert_agree: Agree) -> None:
    """The solution is kept on the module that is the field."""

    class Model(Plain):
        solution: Tensor

        def solve(self, solver: Callable[..., Tensor], y0: Tensor, **adjoint: Any) -> Tensor:
            self.solution = solver(self, y0, T, **DOPRI5, **adjoint)
            return self.solution

    model, y0 = Model(), initial(4, 3)
    inputs = [y0, *model.parameters()]
    expected = gradients(model.solve(torchdiffeq.odeint, y0), inputs)
    assert_agree(gradients(model.solve(torchdiffeq.odeint_adjoint, y0, **mode), inputs), expected)
    model.solve(torchdiffeq.odeint_adjoint, y0, **mode)  # in the place of a solution whose graph holds the model


def test_a_bound_method_with_listed_parameters(mode: Mode, assert_agree: Agree) -> None:
    model, y0 = Plain(), initial(4, 3)
    inputs = [y0, *model.parameters()]
    adjoint = {"adjoint_params": tuple(model.parameters()), **mode}
    found = gradients(torchdiffeq.odeint_adjoint(model.forward, y0, T, **DOPRI5, **adjoint), inputs)
    assert_agree(found, gradients(torchdiffeq.odeint(model.forward, y0, T, **DOPRI5), inputs))


# Modules that change with each call.


def test_training_mode_switched_before_backward(mode: Mode, assert_agree: Agree) -> None:
    """flowpde samples in evaluation mode and goes back to training before the caller's backward."""
    func, y0 = Plain(nn.BatchNorm1d(6, dtype=torch.float64)), initial(4, 3)
    inputs = [y0, *func.parameters()]
    func.eval()
    expected = gradients(torchdiffeq.odeint(func, y0, T, **RK4), inputs)
    solution = torchdiffeq.odeint_adjoint(func, y0, T, **RK4, **mode)
    func.train()
    assert_agree(gradients(solution, inputs), expected)
    assert all(module.training for module in func.modules())


def test_batch_statistics_move_in_the_forward_pass_alone(mode: Mode, assert_agree: Agree) -> None:
    ours, theirs = (Plain(nn.BatchNorm1d(6, dtype=torch.float64)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    y0 = initial(4, 3)
    found = gradients(torchdiffeq.odeint_adjoint(ours, y0, T, **RK4, **mode), [y0, *ours.parameters()])
    expected = gradients(torchdiffeq.odeint(theirs, y0, T, **RK4), [y0, *theirs.parameters()])
    # All at once, as the gradient of a bias before batch normalisation is nothing but rounding.
    assert_agree([joined(found)], [joined(expected)])
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(one, other)


def test_dropout_has_the_same_masks_in_the_replay(mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Plain(nn.Dropout(0.4)), initial(4, 3)
    inputs = [y0, *func.parameters()]
    state = torch.get_rng_state()
    found = torchdiffeq.odeint_adjoint(func, y0, T, **RK4, **mode)
    after = torch.get_rng_state()
    found_gradients = gradients(found, inputs)
    assert torch.equal(torch.get_rng_state(), after)
    torch.set_rng_state(state)
    expected = torchdiffeq.odeint(func, y0, T, **RK4)
    assert torch.equal(found, expected)
    assert_agree(found_gradients, gradients(expected, inputs))


def test_spectral_norm_in_training_is_reported(mode: Mode) -> None:
    func = Plain(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, dtype=torch.float64)))
    solution = torchdiffeq.odeint_adjoint(func, initial(4, 3), T, **RK4, **mode)
    with pytest.raises(ReplayError, match="spectral norm"):
        loss_of(solution).backward()


class ActNorm(nn.Module):
    """A layer that takes its parameters from the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.shift.copy_(-x.mean(dim=0))
            self.ready = True
        return torch.tanh(x + self.shift)


def test_parameters_that_the_first_evaluation_sets(mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Plain(ActNorm()), initial(4, 3)
    inputs = [y0, *func.parameters()]
    found = gradients(torchdiffeq.odeint_adjoint(func, y0, T, **DOPRI5, **mode), inputs)
    assert_agree(found, gradients(torchdiffeq.odeint(func, y0, T, **DOPRI5), inputs))


# What is done to the solution and the parameters before backward.


def test_the_solution_changed_in_place(mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Plain(), initial(4, 3)
    inputs = [y0, *func.parameters()]
    found, expected = (
        solver(func, y0, T, **DOPRI5, **adjoint).mul_(2)
        for solver, adjoint in ((torchdiffeq.odeint_adjoint, mode), (torchdiffeq.odeint, {}))
    )
    assert_agree(gradients(found, inputs), gradients(expected, inputs))


def test_parameters_changed_before_backward_are_pytorchs_error(mode: Mode) -> None:
    func = Plain()
    solution = torchdiffeq.odeint_adjoint(func, initial(4, 3), T, **DOPRI5, **mode)
    with torch.no_grad():
        next(func.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(solution).backward()


def test_autocast_around_the_forward_pass(mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Plain().float(), initial(4, 3).detach().float().requires_grad_()
    inputs = [y0, *func.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torchdiffeq.odeint_adjoint(func, y0, T.float(), **RK4, **mode)
        expected = torchdiffeq.odeint(func, y0, T.float(), **RK4)
    assert torch.equal(found, expected)
    assert_agree(gradients(found, inputs), gradients(expected, inputs), 2e-2)  # a few roundings of bfloat16


def test_a_solve_within_a_solve(mode: Mode, assert_agree: Agree) -> None:
    inner, outer, y0 = Plain(), Plain(), initial(2, 3)
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    settings: dict[str, Any] = {"method": "rk4"}

    def solve(solver: Callable[..., Tensor], **adjoint: Any) -> tuple[Tensor | None, ...]:
        def func(s: Tensor, y: Tensor) -> Tensor:
            result: Tensor = outer(s, solver(inner, y, t, **settings, **adjoint)[-1])
            return result

        listed = {"adjoint_params": (*outer.parameters(), *inner.parameters())} if adjoint else {}
        solution = solver(func, y0, t, **settings, **adjoint, **listed)
        return gradients(solution, [y0, *outer.parameters(), *inner.parameters()])

    assert_agree(solve(torchdiffeq.odeint_adjoint, **mode), solve(torchdiffeq.odeint))
