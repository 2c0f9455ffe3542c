"""What a residual network costs as a solve: evaluations and Python calls a block do not grow with the depth."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from harness import MODES
from residual_blocks import DOUBLE, Dense, PostActivation, calls, needs_heun, sequence_of, state
from torch import Tensor, nn

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.resnet import ResidualField

# Of one step: those of the solve, those of its backward pass.
EVALUATIONS = {
    ("euler", "symplectic"): (1, 1),
    ("euler", "stages"): (1, 1),
    ("euler", "aca"): (1, 1),
    ("euler", "baseline"): (1, 1),
    ("heun2", "symplectic"): (2, 3),
    ("heun2", "stages"): (2, 2),
    ("heun2", "aca"): (2, 2),
    ("heun2", "baseline"): (2, 2),
}
BLOCKS: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "dense": (Dense, {}, (2, 3)),
    # So few parameters that all of the shallow network's are asked for at each stage.
    "one parameter": (nn.Linear, {"in_features": 3, "out_features": 3, "bias": False, "dtype": DOUBLE}, (2, 3)),
    "post-activation, training": (PostActivation, {}, (2, 2, 3, 3)),
}
MARKS: dict[str, Any] = {"euler": (), "heun2": needs_heun}
SHALLOW, DEEP = 40, 200


def train(field: ResidualField, x: Tensor, mode: str, method: str = "euler") -> None:
    """Forward and backward pass."""
    settings = MODES.get(mode, {"adjoint_method": mode})
    solution = odeint_adjoint(field, x, field.grid(method), method=method, **settings)
    solution[-1].square().sum().backward()


def bytecodes(run: Callable[[], object]) -> int:
    """How many instructions of Python ``run`` executes: loops that call nothing count, too."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def calls_a_block(kind: str, mode: str, method: str, count: int) -> float:
    block, arguments, shape = BLOCKS[kind]
    field, x = ResidualField(sequence_of(block, count, **arguments)), state(*shape)
    train(field, x, mode, method)  # what is measured once is measured now
    return calls(lambda: train(field, x, mode, method)) / count


@pytest.mark.parametrize(("method", "mode"), [pytest.param(*case, marks=MARKS[case[0]]) for case in EVALUATIONS])
def test_evaluations_of_each_block(method: str, mode: str) -> None:
    blocks = [block for block in sequence_of(Dense, 20) if isinstance(block, Dense)]
    forward, backward = EVALUATIONS[method, mode]
    field, x = ResidualField(blocks), state(2, 3)
    solution = odeint_adjoint(field, x, field.grid(method), method=method, **MODES[mode])
    ends = (1, 1) if method == "heun2" else (forward, forward)  # a step uses a block and the next
    assert [block.calls for block in blocks] == [ends[0], *[forward] * 18, ends[1]]
    for block in blocks:
        block.calls = 0
    solution[-1].square().sum().backward()
    if method == "heun2":
        # Slopes at a step's start are evaluated once more where they are not kept.
        assert [block.calls for block in blocks] == [backward - 1, *[backward] * 18, 1]
    else:
        assert [block.calls for block in blocks] == [backward] * 20


CASES = [
    *[("dense", mode, "euler") for mode in (*MODES, "memory_free")],
    *[pytest.param("dense", mode, "heun2", marks=needs_heun) for mode in ("symplectic", "aca")],
    *[(kind, "symplectic", "euler") for kind in BLOCKS if kind != "dense"],
]


@pytest.mark.parametrize(("kind", "mode", "method"), CASES)
def test_python_work_a_block_does_not_grow_with_depth(kind: str, mode: str, method: str) -> None:
    shallow, deep = (calls_a_block(kind, mode, method, count) for count in (SHALLOW, DEEP))
    assert deep <= 1.3 * shallow


@pytest.mark.parametrize("mode", ["symplectic", pytest.param("aca", marks=pytest.mark.slow)])
def test_a_step_does_not_loop_over_what_belongs_to_other_blocks(mode: str) -> None:
    """Asked for all parameters at every step, autograd answers in one call, which no count of calls shows."""

    def a_block(count: int) -> float:
        field, x = ResidualField(sequence_of(Dense, count)), state(2, 3)
        train(field, x, mode)
        return bytecodes(lambda: train(field, x, mode)) / count

    assert a_block(200) <= 1.1 * a_block(SHALLOW)
