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
    heun_states,
    hidden_states,
    needs_heun,
    sequence_of,
    state,
)
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.memory import peak_bytes
from torchdiffeq_symplectic.resnet import EquivalenceReport, ResidualField, equivalence_report
from torchdiffeq_symplectic.resnet.gradients import Agreement, network_gradient, network_states
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


def dense_report(count: int = 5, **keywords: Any) -> EquivalenceReport:
    return equivalence_report(sequence_of(Dense, count), state(4, 3), **keywords)


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


@pytest.mark.parametrize("name", FORMS)
def test_gradient_of_the_network_is_backpropagation_through_it(name: str) -> None:
    blocks, keywords, shape = forms()[name]
    x = state(*shape)
    exact = torch.autograd.grad(hidden_states(blocks, x, **keywords)[-1].sin().sum(), (x, *parameters_of(blocks)))
    field = ResidualField(blocks, **keywords)
    states = network_states(field, x.detach())
    found = network_gradient(field, states, lambda y: y.sin().sum())
    assert relative(found, exact) < 1e-13


def test_a_solve_that_is_not_the_network_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ResidualField.forward
    monkeypatch.setattr(ResidualField, "forward", lambda field, t, x: 1.01 * original(field, t, x))
    report = dense_report()
    assert 1e-4 < report.forward_error < 1e-1
    assert 1e-4 < report.gradient_error < 1e-1


def test_all_can_be_done_in_single_precision() -> None:
    expected, found = dense_report(), dense_report(dtype=torch.float32)
    assert found.distance == pytest.approx(expected.distance, rel=1e-2)
    assert found.bound[-1] == pytest.approx(expected.bound[-1], rel=1e-2)
    assert 1e-12 < found.gradient_error < 1e-5


def test_frozen_parameters_have_no_gradient_to_compare() -> None:
    blocks = sequence_of(Dense, 3)
    for block in blocks:
        block.requires_grad_(False)
    assert equivalence_report(blocks, state(2, 3)).gradient_error < 1e-12


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


@needs_heun
def test_memory_free_heun_is_compared_with_the_heun_network() -> None:
    blocks, x = sequence_of(Dense, 6), state(4, 3)
    exact = torch.autograd.grad(heun_states(blocks, x)[-1].sin().sum(), (x, *parameters_of(blocks)))
    euler = torch.autograd.grad(hidden_states(blocks, x)[-1].sin().sum(), (x, *parameters_of(blocks)))
    found = equivalence_report(blocks, x, loss=lambda y: y.sin().sum()).memory_free_error["heun2"]
    assert relative(euler, exact) > 10 * found.relative > 0
    assert found.cosine == pytest.approx(1, abs=1e-3)


def test_memory_free_error_of_tied_blocks_is_not_one_by_block() -> None:
    report = equivalence_report([Dense()] * 4, state(2, 3))
    assert all(found.by_block == [] for found in report.memory_free_error.values())


@needs_heun
def test_memory_free_error_is_in_the_dtype_of_the_batch() -> None:
    (block,) = sequence_of(Dense, 1, scale=0.01)
    precise = equivalence_report([block] * 20, state(2, 3)).memory_free_error["heun2"].relative
    single = equivalence_report([block.float()] * 20, state(2, 3).float())
    assert precise < 1e-9 < single.memory_free_error["heun2"].relative
    assert single.gradient_error < 1e-12


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


def test_smoothness_of_weights_linear_in_depth_does_not_depend_on_it() -> None:
    for count in (4, 16):
        blocks = [Scaled(torch.full((3,), n / count, dtype=DOUBLE)) for n in range(count)]
        found = equivalence_report(blocks, state(2, 3), residual=True).smoothness
        assert found == pytest.approx(math.sqrt(3))


def test_smoothness_of_tied_weights_is_zero() -> None:
    report = equivalence_report([Dense(scale=0.1)] * 4, state(2, 3))
    assert report.smoothness == 0
    assert report.jump == 0
    assert report.growth is None


def test_blocks_of_different_architectures_have_no_smoothness() -> None:
    blocks = [*sequence_of(PreActivation, 2, norm=True), *sequence_of(PostActivation, 2)]
    report = equivalence_report(blocks, state(3, 2, 4, 3))
    assert report.to_dict()["smoothness"] is None
    assert report.smoothness_by_layer == {}
    assert "norm.weight is missing in block 2, but of shape (2,) in block 0" in str(report.smoothness_reason)
    assert str(report.smoothness_reason) in str(report)


def test_a_deep_smooth_network_discretises_an_ode() -> None:
    matrices = [torch.tensor([[0.0, 1 + n / 40], [-2.0, n / 40]]) for n in range(40)]
    report = equivalence_report([Turning(matrix) for matrix in matrices], state(3, 2), residual=True)
    assert report.verdict == DISCRETISES
    assert report.growth == pytest.approx(2, rel=0.01)
    assert report.relative_distance < 0.1


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


def test_noise_that_averages_out_is_said_to() -> None:
    report = equivalence_report(noise(64, 1.0, mean=1.0), state(2, 5), residual=True)
    assert report.verdict == DISCRETISES
    assert any("not smooth in depth" in reason for reason in report.reasons)
    assert any("averages out" in reason for reason in report.reasons)


def test_blocks_that_do_nothing_are_an_ode() -> None:
    report = equivalence_report([nn.Identity()] * 3, state(2, 3))
    assert report.verdict == DISCRETISES
    assert report.distance == pytest.approx([0.0] * 4, abs=1e-13)
    assert report.jump is None
    assert report.memory_free_error["euler"].relative == 0


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


def test_blocks_are_copied_before_they_are_evaluated() -> None:
    blocks = [Dense(), Dense()]
    equivalence_report(blocks, state(2, 3))
    assert [block.calls for block in blocks] == [0, 0]


def test_the_mode_of_the_blocks_decides() -> None:
    blocks, x = sequence_of(PostActivation, 3), state(3, 2, 4, 4)
    training = equivalence_report(blocks, x)
    evaluation = equivalence_report([block.eval() for block in blocks], x)
    assert training.distance[-1] != pytest.approx(evaluation.distance[-1], rel=1e-3)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(context: Any) -> None:
    expected = dense_report().to_dict()
    with context():
        assert dense_report().to_dict() == expected


def test_reports_can_be_repeated() -> None:
    torch.manual_seed(0)
    first = dense_report().to_dict()
    torch.manual_seed(1)
    assert dense_report().to_dict() == first


def test_a_field_stands_for_its_blocks() -> None:
    blocks, keywords, shape = forms()["bare residual"]
    field = ResidualField(blocks, **keywords)
    assert equivalence_report(field, state(*shape)).to_dict() == (
        equivalence_report(iter(blocks), state(*shape), **keywords).to_dict()
    )


@pytest.mark.parametrize("interpolate", ["outputs", "weights", "piecewise"])
def test_interpolation_is_that_asked_for(interpolate: str) -> None:
    report = dense_report(interpolate=interpolate)
    assert report.interpolate == interpolate
    expected = equivalence_report(ResidualField(sequence_of(Dense, 5), interpolate=interpolate), state(4, 3))
    assert report.distance == expected.distance


@pytest.mark.parametrize("keywords", [{"residual": True}, {"interpolate": "weights"}], ids=str)
def test_keywords_beside_a_field_are_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a ResidualField has its own"):
        equivalence_report(ResidualField(sequence_of(Dense, 2)), state(2, 3), **keywords)


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


@pytest.mark.parametrize("accuracy", [0, 1, -1e-3, math.nan])
def test_an_accuracy_that_is_none_is_refused(accuracy: float) -> None:
    with pytest.raises(ValueError, match="accuracy must be between 0 and 1"):
        dense_report(accuracy=accuracy)


def test_a_block_that_changes_the_shape_is_named() -> None:
    blocks = [Dense(), nn.Linear(3, 2, dtype=DOUBLE)]
    with pytest.raises(ValueError, match=r"block 1 \(Linear\)"):
        equivalence_report(blocks, state(2, 3))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_report_on_a_gpu_is_that_on_the_cpu() -> None:
    blocks, x = sequence_of(PostActivation, 3), state(3, 2, 4, 4).detach()
    expected = equivalence_report(blocks, x)
    found = equivalence_report([block.cuda() for block in blocks], x.cuda())
    assert found.verdict == expected.verdict
    assert found.distance == pytest.approx(expected.distance, rel=1e-2)
    assert found.gradient_error < 1e-12
