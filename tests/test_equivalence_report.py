"""What the equivalence report says, against backpropagation, closed forms and weights that are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from residual_blocks import (
    DOUBLE,
    FORMS,
    Dense,
    Dropping,
    PostActivation,
    PreActivation,
    forms,
    hidden_states,
    sequence_of,
    state,
)
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.memory import peak_bytes
from torchdiffeq_symplectic.resnet import equivalence_report
from torchdiffeq_symplectic.resnet.gradients import Agreement
from torchdiffeq_symplectic.resnet.verdict import DISCRETISES, NOT_AN_ODE, TOO_SHALLOW, Evidence, judge
from torchdiffeq_symplectic.resnet.weights import Weights


class Turning(nn.Module):
    """``A x``, a bare residual function."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.to(DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Scaled(nn.Module):
    """``a ⊙ x``, a bare residual function."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.factors * x


def turning(speed: float) -> nn.Module:
    return Turning(torch.tensor([[0.0, speed], [-speed, 0.0]]))


def noise(count: int, scale: float, mean: float = 0.0) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(count)
    return [Scaled(mean + scale * torch.randn(5, generator=generator, dtype=DOUBLE)) for _ in range(count)]


def parameters_of(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return list(nn.ModuleList(dict.fromkeys(blocks)).parameters())


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    difference = math.hypot(*(float((a - b).norm()) for a, b in zip(found, exact, strict=True)))
    return difference / math.hypot(*(float(b.norm()) for b in exact))


@pytest.mark.parametrize("name", FORMS)
def test_euler_on_the_host_is_the_network(name: str) -> None:
    blocks, keywords, shape = forms()[name]
    report = equivalence_report(blocks, state(*shape), **keywords)
    assert report.blocks == len(blocks)
    assert report.forward_error < 1e-13
    assert report.gradient_error < 1e-12


def euler_memory_free(blocks: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The paper's gradient of the sum of sines: the chain rule at x~_n = x~_{n+1} - r_n(x~_{n+1}), and at x_0."""
    after = hidden_states(blocks, x)[-1].detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(after.sin().sum(), after)
    gradients: list[Tensor] = []
    for block in reversed(blocks):
        with torch.no_grad():
            before = 2 * after - block(after.clone()) if block is not blocks[0] else x.detach()
        before.requires_grad_()
        cotangent, *own = torch.autograd.grad(block(before.clone()), (before, *block.parameters()), cotangent)
        gradients[:0] = own
        after = before.detach()
    return [cotangent, *gradients]


def test_memory_free_error_is_that_of_stepping_back() -> None:
    blocks, x = sequence_of(Dense, 6), state(4, 3)
    exact = torch.autograd.grad(hidden_states(blocks, x)[-1].sin().sum(), (x, *parameters_of(blocks)))
    found = equivalence_report(blocks, x, loss=lambda y: y.sin().sum()).memory_free_error["euler"]
    approximate = euler_memory_free(blocks, x)
    assert found.relative == pytest.approx(relative(approximate, exact), rel=1e-8)
    flat = [torch.cat([part.flatten() for part in gradient]) for gradient in (approximate, exact)]
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(flat[0], flat[1], dim=0)), rel=1e-9)
    for n, error in enumerate(found.by_block):
        own = slice(1 + 4 * n, 5 + 4 * n)
        assert error == pytest.approx(relative(approximate[own], exact[own]), rel=1e-8)


def test_smoothness_is_that_of_the_weights() -> None:
    blocks = sequence_of(Dense, 4)
    values = [dict(block.named_parameters()) for block in blocks]
    steps = [{name: float((b[name] - a[name]).detach().norm()) for name in a} for a, b in itertools.pairwise(values)]
    report = equivalence_report(blocks, state(2, 3))
    assert report.smoothness == pytest.approx(4 * max(math.hypot(*step.values()) for step in steps))
    assert report.smoothness_by_layer == pytest.approx({name: 4 * max(s[name] for s in steps) for name in values[0]})
    for name, entries in report.weights.items():
        stacked = torch.stack([value[name].detach().flatten() for value in values])
        ranges = stacked.amax(0) - stacked.amin(0)
        assert entries == stacked[:, int(ranges.argmax())].tolist()


def test_blocks_of_different_architectures_have_no_smoothness() -> None:
    blocks = [*sequence_of(PreActivation, 2, norm=True), *sequence_of(PostActivation, 2)]
    report = equivalence_report(blocks, state(3, 2, 4, 3))
    assert report.to_dict()["smoothness"] is None
    assert report.smoothness_by_layer == {}
    assert "norm.weight is missing in block 2, but of shape (2,) in block 0" in str(report.smoothness_reason)
    assert str(report.smoothness_reason) in str(report)


def test_a_shallow_smooth_network_is_too_shallow_and_told_how_deep_is_enough() -> None:
    report = equivalence_report([turning(3.0)] * 5, state(3, 2), residual=True)
    assert report.verdict == TOO_SHALLOW
    (advice,) = [reason for reason in report.reasons if "blocks on the same smooth weights would do" in reason]
    enough = int(advice.split("roughly ")[1].split()[0])
    deeper = equivalence_report([turning(3.0)] * (enough + enough // 4), state(3, 2), residual=True)
    assert deeper.verdict == DISCRETISES
    assert deeper.relative_distance > 0.05


@pytest.mark.parametrize("count", [16, 64])
def test_noise_of_size_one_over_the_root_of_the_depth_is_no_ode(count: int) -> None:
    report = equivalence_report(noise(count, math.sqrt(count)), state(2, 5), residual=True)
    assert report.verdict == NOT_AN_ODE
    assert report.jump == pytest.approx(math.sqrt(2), rel=0.35)
    assert report.growth == pytest.approx(1, rel=0.35)


@pytest.mark.parametrize(
    ("distance", "jump", "growth", "verdict"),
    [
        (0.1, 1.4, 1.0, DISCRETISES),
        (0.11, 0.25, 1.0, TOO_SHALLOW),
        (0.11, 0.26, 1.7, TOO_SHALLOW),
        (0.11, None, None, TOO_SHALLOW),
        (0.11, 0.26, 1.69, NOT_AN_ODE),
        (0.11, 0.26, None, NOT_AN_ODE),
        (math.inf, 1.4, 1.0, NOT_AN_ODE),
    ],
)
def test_verdict_by_its_thresholds(distance: float, jump: float | None, growth: float | None, verdict: str) -> None:
    weights = Weights(None, {}, "of two kinds", math.nan, {})
    found, reasons = judge(Evidence(8, distance, jump, growth, None), weights, {"euler": Agreement(0.2, 0.9, [])})
    assert found == verdict
    text = " ".join(reasons)
    for figure in (distance, jump, growth, 0.2):
        assert figure is None or f"{figure:.2g}" in text
    assert "of two kinds" in text


def test_a_solver_that_gives_up_is_a_reason() -> None:
    class Bursting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 8 * x.square()

    report = equivalence_report([Bursting()] * 3, torch.ones(2, dtype=DOUBLE), residual=True)
    assert any("gave up between blocks 0 and 1" in reason for reason in report.reasons)
    assert report.to_dict()["distance"] == [0.0, None, None, None]
    assert report.relative_distance == math.inf


def test_nothing_of_the_callers_changes() -> None:
    blocks = sequence_of(PostActivation, 3)
    blocks[1].eval()
    blocks[2].get_parameter("conv1.weight").requires_grad_(False)
    blocks[0].get_parameter("conv1.weight").grad = torch.ones(2, 2, 3, 3, dtype=DOUBLE)
    modules = nn.ModuleList(blocks)
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    flags = [module.training for module in modules.modules()], [p.requires_grad for p in modules.parameters()]
    x = state(3, 2, 4, 4)
    values, random = x.detach().clone(), torch.get_rng_state()
    equivalence_report(blocks, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert flags == ([module.training for module in modules.modules()], [p.requires_grad for p in modules.parameters()])
    assert all(torch.equal(value, before[name]) for name, value in modules.state_dict().items())
    grads = [name for name, parameter in modules.named_parameters() if parameter.grad is not None]
    assert grads == ["0.conv1.weight"]
    assert torch.equal(x, values)
    assert x.grad is None


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, "x must be a tensor, but is a list"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            ValueError,
            "x must be of dtype float32 or float64, but is of torch.int64",
        ),
        (torch.ones(2, 3, dtype=torch.bfloat16), ValueError, "bfloat16; convert it and the blocks"),
        (torch.ones(0, 3, dtype=DOUBLE), ValueError, r"x must have entries, but is of shape \(0, 3\)"),
        (
            torch.ones(2, 3, dtype=DOUBLE, device="meta"),
            ValueError,
            "x is on meta, but blocks.0.inner.weight is on cpu",
        ),
        (torch.ones(2, 4, dtype=DOUBLE), ValueError, r"block 0 \(Dense\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(x: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        equivalence_report(sequence_of(Dense, 2), x)


def test_blocks_that_draw_random_numbers_are_refused_in_training_mode_only() -> None:
    blocks, random = sequence_of(Dropping, 3), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"blocks draw random numbers.*\.eval\(\)"):
        equivalence_report(blocks, state(2, 3))
    assert torch.equal(torch.get_rng_state(), random)
    assert equivalence_report([block.eval() for block in blocks], state(2, 3)).gradient_error < 1e-12


def test_memory_grows_by_states_alone() -> None:
    x = state(512, 4).detach()
    wide = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 4)).to(DOUBLE)
    state_bytes, graph_bytes = x.numel() * 8, 2 * 512 * 256 * 8

    def peak(count: int) -> int:
        return peak_bytes(lambda: equivalence_report([wide] * count, x, residual=True), "cpu")

    assert peak(8) - peak(3) <= 5 * 5 * state_bytes < 5 * graph_bytes / 10
