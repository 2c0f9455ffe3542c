"""The studies find what the paper on residual networks says. Oracles are plain loops and closed forms."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic.experiments.blocks import tanh_blocks
from torchdiffeq_symplectic.experiments.studies import depth, digits, linear, memory_free, tied, training
from torchdiffeq_symplectic.experiments.studies.common import METHODS, slope
from torchdiffeq_symplectic.resnet import ResidualField


def rows_of(frame: pd.DataFrame) -> list[Any]:
    return list(frame.itertuples(index=False, name="Row"))


needs_heun = pytest.mark.skipif("heun2" not in SOLVERS, reason="this torchdiffeq has no heun2")

SMOOTH, ROUGH, AVERAGED = depth.FAMILIES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, exact))
    return float((a - b).norm() / b.norm())


def test_slope_is_the_exponent() -> None:
    assert slope([2, 8, 32], [3 * n**-1.5 for n in (2, 8, 32)]) == pytest.approx(-1.5)


def distance_rows(depths: Sequence[int] = depth.DEPTHS) -> list[Any]:
    names = {depth.KIND: "family", depth.LARGEST: "largest", depth.FINAL: "final"}
    return rows_of(depth.run(depths)["depth"].rename(columns=names))


@pytest.fixture(scope="module")
def distances() -> list[Any]:
    return distance_rows((16, 64, 256))


@pytest.mark.slow
@pytest.mark.parametrize("name", [SMOOTH, AVERAGED])
@pytest.mark.parametrize("measure", ["largest", "final"])
def test_distance_falls_as_one_over_depth(distances: list[Any], name: str, measure: str) -> None:
    of = [row for row in distances if row.family == name]
    assert slope([row.depth for row in of], [getattr(row, measure) for row in of]) == pytest.approx(-1, abs=0.1)


@pytest.mark.slow
def test_distance_at_scale_of_a_root_stays_that_of_ito_and_stratonovich(distances: list[Any]) -> None:
    of = [row for row in distances if row.family == ROUGH]
    assert [row.depth for row in of] == [16, 64, 256]
    assert all(0.8 < row.final <= row.largest < 1.4 for row in of)
    assert of[-1].final == pytest.approx(math.e - math.sqrt(math.e), rel=0.15)


@pytest.mark.parametrize("count", [16, 100])
def test_distances_are_those_of_the_closed_forms(count: int) -> None:
    # x' = rate(s) * x, rate linear between rate_n at n/N and constant behind the last: x = x_0 exp(integral).
    blocks = depth.FAMILIES[ROUGH].blocks(count, generator())
    rates = torch.stack([block.get_buffer("rate")[:50] for block in blocks])
    x = torch.randn(2, 50, generator=generator(1), dtype=torch.float64)
    field = ResidualField([depth.NoiseBlock(rate) for rate in rates], residual=True)
    areas = torch.cat([(rates[1:] + rates[:-1]) / 2, rates[-1:]]) / count
    ode = torch.cat([torch.ones(1, 50), areas.cumsum(0).exp()])
    network = torch.cat([torch.ones(1, 50), (1 + rates / count).cumprod(0)])
    exact = torch.stack([(x * factor).norm() for factor in network - ode])
    assert torch.allclose(depth.distances(field, x), exact, rtol=0, atol=1e-6 * float(x.norm()))


def plain_network(blocks: Sequence[nn.Module], x: Tensor, method: str) -> Tensor:
    size = 1 / len(blocks)
    if method == "euler":
        for block in blocks:
            x = x + size * block(x)
        return x
    for block, following in pairwise(blocks):
        first = block(x)
        x = x + size / 2 * (first + following(x + size * first))
    return x


@pytest.fixture(scope="module")
def errors() -> list[Any]:
    return rows_of(memory_free.run((16, 32, 64))["memory-free"])


@pytest.mark.parametrize("measure", ["x", "parameters", "largest", "state"])
def test_error_of_euler_falls_as_one_over_depth(errors: list[Any], measure: str) -> None:
    of = [row for row in errors if row.method == "Euler"]
    assert slope([row.depth for row in of], [getattr(row, measure) for row in of]) == pytest.approx(-1, abs=0.15)


@needs_heun
@pytest.mark.parametrize("measure", ["x", "parameters", "largest", "state"])
def test_error_of_heun_falls_as_fast_as_the_bound(errors: list[Any], measure: str) -> None:
    of = [row for row in errors if row.method == "Heun"]
    assert slope([row.depth for row in of], [getattr(row, measure) for row in of]) < -2


@pytest.mark.parametrize("method", ["euler", pytest.param("heun2", marks=needs_heun)])
def test_rows_compare_with_backpropagation(errors: list[Any], method: str) -> None:
    draws = generator()
    x, target = torch.randn(2, memory_free.BATCH, memory_free.WIDTH, generator=draws, dtype=torch.float64)
    blocks = tanh_blocks(16, memory_free.WIDTH, draws)
    x.requires_grad_()
    loss = (plain_network(blocks, x, method) - target).square().sum() / (2 * len(x))
    field = ResidualField(blocks, residual=True)
    exact = torch.autograd.grad(loss, (x, *field.parameters()))
    found = [
        memory_free.gradients(field, x, target, method, "symplectic"),
        memory_free.gradients(field, x, target, method, "memory_free", corrections=0),
    ]
    assert relative(found[0], exact) < 1e-12
    row = next(row for row in errors if row.method == METHODS[method])
    assert row.depth == 16
    assert row.x == pytest.approx(relative(found[1][:1], exact[:1]), rel=1e-6)
    assert row.parameters == pytest.approx(relative(found[1][1:], exact[1:]), rel=1e-6)
    assert row.largest >= row.parameters


def plain_descent(theta: Tensor, target: Tensor, steps: int) -> tuple[float, Tensor]:
    for _ in range(steps):
        theta = theta.detach().requires_grad_()
        product = torch.eye(len(target), dtype=torch.float64)
        for matrix in theta:
            product = product + matrix @ product / len(theta)
        loss = (product - target).square().sum() / 2
        loss.backward()
        assert theta.grad is not None
        last, theta = theta, theta.detach() - linear.LEARNING_RATE * len(theta) * theta.grad
    return float(loss.detach()), last.detach()


def largest_in_training(rows: list[Any], start: str) -> dict[int, float]:
    of = [row for row in rows if row.start == start]
    return {n: max(row.roughness for row in of if row.depth == n) for n in sorted({row.depth for row in of})}


def check_descent(rows: list[Any]) -> None:
    """What the study is to show, at any depths."""
    for start in ("zero", "smooth"):
        largest = largest_in_training(rows, start)
        assert max(largest.values()) < 1.02 * min(largest.values())  # uniformly over depth
    assert max(largest_in_training(rows, "zero").values()) < 0.2
    first = {(row.start, row.depth): row for row in rows if row.step == 0}
    for row in rows:  # uniformly over the optimisation
        before = first[row.start, row.depth]
        if row.start == "smooth":
            assert row.roughness < 1.05 * before.roughness
        if row.start == "independent":
            assert row.roughness > 0.95 * before.roughness
        if row.step == linear.STEPS:
            assert row.loss < 1e-4 * before.loss
    rough = largest_in_training(rows, "independent")
    assert slope(list(rough), list(rough.values())) > 0.9


@pytest.fixture(scope="module")
def descents() -> list[Any]:
    return rows_of(linear.run((16, 32, 64))["linear"])


@pytest.mark.slow
def test_roughness_stays_bounded_but_where_it_was_not_at_the_start(descents: list[Any]) -> None:
    check_descent(descents)


@pytest.mark.slow
def test_trained_weights_tend_to_a_function_as_one_over_depth(descents: list[Any]) -> None:
    for start, low, high in (("zero", -1.1, -0.9), ("smooth", -1.1, -0.9), ("independent", -0.2, 0.2)):
        of = [row for row in descents if (row.start, row.step) == (start, linear.STEPS)]
        assert math.isnan(of[0].apart)
        assert low < slope([row.depth for row in of[1:]], [row.apart for row in of[1:]]) < high


@pytest.mark.parametrize("k", range(len(linear.STARTS)), ids=linear.STARTS)
def test_each_start_is_gradient_descent_on_its_own(k: int) -> None:
    losses, weights = linear.descend(8, 5, 3, "cpu")
    draws = generator(3)
    target = torch.randn(linear.WIDTH, linear.WIDTH, generator=draws, dtype=torch.float64) / (2 * linear.WIDTH)
    loss, theta = plain_descent(weights[0][:, k], target + torch.eye(linear.WIDTH, dtype=torch.float64), 6)
    assert float(losses[5][k]) == pytest.approx(loss, rel=1e-11)
    assert torch.allclose(weights[5][:, k], theta, rtol=0, atol=1e-12)
    assert not torch.equal(weights[0][:, k], theta)


def test_logits_are_those_of_the_plain_network_in_every_way() -> None:
    network = digits.Network(5, seed=0)
    pixels = torch.rand(4, 1, 8, 8, generator=generator())
    x = network.stem(pixels)
    for block in network.field:
        x = x + block(x) / 5
    for way in digits.WAYS:
        for net in (network, network.untied()):
            assert torch.allclose(net(pixels, way), network.head(x), atol=1e-6)


@pytest.mark.slow
def test_memory_over_depth() -> None:
    images = digits.read_digits(0, "cpu")[0]
    shallow, deep = (
        {(row.blocks, row.gradient): row.peak for row in rows_of(tied.memory(n, images, seed=0))} for n in (6, 26)
    )
    growth = {key: (deep[key] - shallow[key]) / 20 for key in deep}
    state = 4 * digits.BATCH * digits.CHANNELS * 8 * 8
    block = sum(4 * p.numel() for p in digits.ConvolutionBlock(digits.CHANNELS).parameters())
    assert deep["tied", "memory_free"] == pytest.approx(shallow["tied", "memory_free"], rel=0.05)
    assert 0 <= growth["tied", "memory_free"] < 100  # the times of a step
    assert growth["untied", "memory_free"] == pytest.approx(block, rel=0.05)
    assert growth["tied", "symplectic"] == pytest.approx(state, rel=0.02)
    assert growth["untied", "symplectic"] == pytest.approx(state + block, rel=0.02)
    assert growth["tied", "backpropagation"] > 2.5 * state


@pytest.fixture(scope="module")
def outcome() -> dict[str, pd.DataFrame]:
    return tied.run(depths=(2,), depth=3, epochs=1, seed=1)


@pytest.mark.slow
def test_refining_starts_where_training_with_tied_blocks_ended(outcome: dict[str, pd.DataFrame]) -> None:
    rows = rows_of(outcome["tied"])
    assert [(row.blocks, row.gradient, row.epoch) for row in rows] == [
        (kind, gradient, epoch)
        for kind, gradient in (("tied", "symplectic"), ("untied", "memory_free"), ("untied", "backpropagation"))
        for epoch in (0, 1)
    ]
    assert rows[1].accuracy == rows[2].accuracy == rows[4].accuracy > rows[0].accuracy
    assert rows[3].loss == pytest.approx(rows[5].loss, rel=0.02)
    assert rows[3].loss != rows[5].loss


@pytest.mark.slow
def test_a_seed_fixes_training_and_the_global_generator_is_left(outcome: dict[str, pd.DataFrame]) -> None:
    torch.rand(3)
    state = torch.get_rng_state()
    again = tied.run(depths=(2,), depth=3, epochs=1, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(again[name].equals(outcome[name]) for name in outcome)


@pytest.mark.slow
@pytest.mark.parametrize("run", [depth.run, memory_free.run, linear.run], ids=["depth", "memory-free", "linear"])
def test_a_seed_fixes_weights_and_the_global_generator_is_left(run: Callable[..., dict[str, pd.DataFrame]]) -> None:
    state = torch.get_rng_state()
    first = run((4, 8), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    same, other = run((4, 8), seed=5), run((4, 8), seed=6)
    assert all(same[name].equals(first[name]) and not other[name].equals(first[name]) for name in first)


def test_gradients_in_training_are_those_of_the_plain_network() -> None:
    network = digits.Network(5, seed=0).untied().double()
    images = digits.Images(torch.rand(4, 1, 8, 8, generator=generator()).double(), torch.tensor([0, 1, 2, 3]))
    x = network.stem(images.pixels)
    for block in network.field:
        x = x + block(x) / 5
    loss = nn.functional.cross_entropy(network.head(x), images.digits)
    exact = torch.autograd.grad(loss, tuple(network.parameters()))
    assert relative(training.gradient(network, images, "symplectic"), exact) < 1e-12
    assert 1e-6 < relative(training.gradient(network, images, "memory_free"), exact) < 0.1
