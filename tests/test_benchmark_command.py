"""The command ``benchmark`` keeps what it has measured, goes on after an interruption, and writes what it says."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.__main__ import main
from torchdiffeq_symplectic.benchmark import command, markdown, torchdiffeqs
from torchdiffeq_symplectic.benchmark import run as running
from torchdiffeq_symplectic.benchmark.compare import Row
from torchdiffeq_symplectic.benchmark.problem import Problem
from torchdiffeq_symplectic.benchmark.results import Measured, OtherRunError, Results, Settings
from torchdiffeq_symplectic.benchmark.series import Axis, Case, Series

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("matplotlib", "rich", "sklearn")),
    reason='needs the extra "benchmark"',
)


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


def build(steps: int, seed: int) -> Problem:
    y0 = torch.full((3,), 1.0 + seed)
    return Problem(Decay(), y0, torch.tensor([0.0, 1.0]), loss, "rk4", options={"step_size": 1 / steps})


def loss(solution: Any) -> Tensor:
    result: Tensor = solution[-1].sum()
    return result


def case(steps: int) -> Case:
    return Case(f"{steps} steps", partial(build, steps), steps)


SERIES = {
    "decay": Series("decay", "What do steps cost?", (case(2), case(4)), Axis("steps"), ("relative_time", "peak_bytes")),
    "single": Series("single", "What is gained?", (Case("one", partial(build, 3)),)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small series, and torchdiffeq's contenders alone."""
    monkeypatch.setattr(command, "PROBLEMS", SERIES)
    monkeypatch.setattr(markdown, "PROBLEMS", SERIES)
    monkeypatch.setattr(command, "installed", torchdiffeqs.installed)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the problems that have been measured, by a stand-in that takes no time."""
    seen: list[str] = []
    monkeypatch.setattr(running, "compare", stand_in(seen))
    return seen


def stand_in(seen: list[str]) -> Callable[..., list[Row]]:
    """For ``compare``; writes labels of problems to ``seen``."""

    def compare(
        problem: Problem, contenders: Any, repeats: int, budget: int, tell: Callable[[str], object]
    ) -> list[Row]:
        seen.append(f"{round(1 / problem.options['step_size'])} steps")
        tell("measuring")
        return [row(contender.name) for contender in contenders]

    return compare


def row(name: str, **changes: Any) -> Row:
    return Row(name, **{**dict.fromkeys(Row.columns()[1:-1], 1), "note": "", **changes})


def call(*arguments: str, out: Path) -> int:
    return main(["benchmark", *arguments, "--device", "cpu", "--out", str(out)])


def status(run: Callable[[], object]) -> object:
    with pytest.raises(SystemExit) as exit_:
        run()
    return exit_.value.code


def test_files_have_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("decay", "--modes", "symplectic", "adjoint", "--repeats", "1", out=tmp_path / "new") == 0
    out = tmp_path / "new"
    assert sorted(path.name for path in out.iterdir()) == ["benchmark.json", "benchmark.md", "decay.csv", "decay.png"]
    with (out / "decay.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(one["case"], one["contender"]) for one in rows] == [
        (f"{steps} steps", name) for steps in (2, 4) for name in ("backpropagation", "adjoint", "symplectic")
    ]
    assert [int(one["forward_evaluations"]) for one in rows] == [8] * 3 + [16] * 3
    assert [int(one["steps"]) for one in rows] == [2] * 3 + [4] * 3
    assert float(rows[0]["relative_time"]) == 1.0
    assert float(rows[2]["gradient_error"]) < 1e-6
    content = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    assert content["settings"]["repeats"] == 1
    assert content["settings"]["versions"]["torch"] == torch.__version__
    assert (out / "decay.png").read_bytes().startswith(b"\x89PNG")
    terminal = capsys.readouterr().out
    assert "decay: 4 steps" in terminal
    assert "symplectic" in terminal


def test_a_contender_that_is_left_out_of_a_case_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = Case("one", partial(build, 3), without={"adjoint": "takes too long"})
    monkeypatch.setitem(SERIES, "single", Series("single", "What is gained?", (left_out,)))
    assert call("single", "--modes", "adjoint", "--repeats", "1", out=tmp_path) == 0
    (found,) = Results.load(tmp_path / "benchmark.json").of("single")
    assert [(one.contender, one.note) for one in found.rows] == [("backpropagation", ""), ("adjoint", "takes too long")]


def test_series_without_an_axis_is_drawn(tmp_path: Path, measured: list[str]) -> None:
    assert call("single", out=tmp_path) == 0
    assert (tmp_path / "single.png").read_bytes().startswith(b"\x89PNG")


def test_all_problems_by_default(tmp_path: Path, measured: list[str]) -> None:
    assert call(out=tmp_path) == 0
    assert measured == ["2 steps", "4 steps", "3 steps"]


def test_what_is_there_is_not_measured_again(tmp_path: Path, measured: list[str]) -> None:
    call("decay", out=tmp_path)
    call(out=tmp_path)
    assert measured == ["2 steps", "4 steps", "3 steps"]
    call("decay", "--fresh", out=tmp_path)
    assert measured[3:] == ["2 steps", "4 steps"]


def test_fresh_replaces_the_problems_that_it_measures_alone(tmp_path: Path, measured: list[str]) -> None:
    call(out=tmp_path)
    call("decay", "--fresh", out=tmp_path)
    assert set(Results.load(tmp_path / "benchmark.json").problems) == {"decay", "single"}


def test_more_contenders_are_measured_with_all_others(tmp_path: Path, measured: list[str]) -> None:
    call("single", "--modes", "aca", out=tmp_path)
    call("single", "--modes", "symplectic, stages", out=tmp_path)
    assert measured == ["3 steps", "3 steps"]
    (found,) = Results.load(tmp_path / "benchmark.json").of("single")
    assert [one.contender for one in found.rows] == ["backpropagation", "symplectic, stages"]


def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    compare = stand_in(measured)

    def interrupted(problem: Problem, *arguments: Any) -> Any:
        if problem.options["step_size"] == 1 / 4:
            raise KeyboardInterrupt
        return compare(problem, *arguments)

    monkeypatch.setattr(running, "compare", interrupted)
    assert call(out=tmp_path) == 130
    assert "goes on from here" in capsys.readouterr().out
    assert (tmp_path / "decay.csv").read_text(encoding="utf-8").count("2 steps") == len(torchdiffeqs.installed())
    monkeypatch.setattr(running, "compare", compare)
    assert call(out=tmp_path) == 0
    assert measured == ["2 steps", "4 steps", "3 steps"]


def test_an_error_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    compare = stand_in(measured)

    def failing(problem: Problem, *arguments: Any) -> Any:
        if problem.options["step_size"] == 1 / 4:
            raise ArithmeticError
        return compare(problem, *arguments)

    monkeypatch.setattr(running, "compare", failing)
    with pytest.raises(ArithmeticError):
        call(out=tmp_path)
    assert [one.case for one in Results.load(tmp_path / "benchmark.json").of("decay")] == ["2 steps"]


def test_figures_of_another_run_are_not_mixed(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call("single", out=tmp_path)
    before = (tmp_path / "benchmark.json").read_text(encoding="utf-8")
    assert status(lambda: call("single", "--repeats", "3", out=tmp_path)) == 2
    error = capsys.readouterr().err
    assert "argument --out" in error
    assert "repeats was 5, is 3" in error
    assert "--fresh" in error
    assert (tmp_path / "benchmark.json").read_text(encoding="utf-8") == before


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "benchmark.json").write_text("{}", encoding="utf-8")
    assert status(lambda: call("single", out=tmp_path)) == 2
    assert "does not hold results of this version" in capsys.readouterr().err
    assert (tmp_path / "benchmark.json").read_text(encoding="utf-8") == "{}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cnff"], ["argument PROBLEM", "'cnff'", "decay"]),
        (["--modes", "symplektic"], ["argument --modes", "'symplektic'", '"symplectic, stages"']),
        (["--repeats", "0"], ["argument --repeats", "'0'"]),
    ],
)
def test_a_bad_value_names_its_argument(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(lambda: call(*arguments, out=tmp_path)) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_readme_gets_the_results_between_its_marks(tmp_path: Path, measured: list[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nafter\n", encoding="utf-8")
    assert call("single", "--readme", str(readme), out=tmp_path / "out") == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- benchmark -->\n")
    assert text.endswith("\n<!-- /benchmark -->\nafter\n")
    assert "old" not in text
    assert "medians over 5 rounds" in text


def test_readme_without_marks_is_named_and_kept(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing", encoding="utf-8")
    assert status(lambda: call("single", "--readme", str(readme), out=tmp_path / "out")) == 2
    assert "argument --readme" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "nothing"
    assert (tmp_path / "out" / "single.csv").exists()


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    settings = Settings.here(torch.device("cpu"), 3, 7)
    case = Measured("decay", "2 steps", 2.0, "", (row("backpropagation"), Row("adjoint", note="stopped")))
    results = Results(settings, [case])
    results.save(tmp_path / "file.json")
    again = Results.resume(tmp_path / "file.json", settings)
    assert again.of("decay") == [case]
    assert again.has("decay", "2 steps", ["adjoint"])
    assert not again.has("decay", "2 steps", ["adjoint", "aca"])
    with pytest.raises(OtherRunError, match="seed was 7, is 8"):
        Results.resume(tmp_path / "file.json", Settings.here(torch.device("cpu"), 3, 8))


def test_section_says_what_was_gained_and_where_others_are_better() -> None:
    outputs = Measured(
        "outputs",
        "20 outputs",
        20,
        "",
        (
            row("backpropagation", seconds=2.0, relative_time=1.0, peak_bytes=1000),
            row("adjoint", seconds=30.0, relative_time=15.0, peak_bytes=50),
            row("symplectic", seconds=3.0, relative_time=1.5, peak_bytes=100, gradient_error=2e-7),
            Row("zuko", note="stopped"),
        ),
    )
    text = markdown.section(Results(Settings.here(torch.device("cpu"), 5, 0), [outputs]))
    assert "| `symplectic` | 1.50 / 0.1 |" in text
    assert "| `symplectic` | 2e-07 |" in text
    assert "| zuko" not in text
    assert "`outputs`, 20: `symplectic` takes 1/10.0 of the upstream adjoint's time." in text
    assert "Faster than every mode of this package: `outputs`, 20: backpropagation." in text
    assert "Smaller than every mode of this package: `outputs`, 20: adjoint." in text
