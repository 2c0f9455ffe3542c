"""``benchmark`` keeps what it measures, goes on from there, and what it writes is what it measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Net, initial, loss_of, times

pytest.importorskip("seaborn", reason='needs the extra "cli"')
import pandas as pd
from matplotlib.figure import Figure

from torchdiffeq_symplectic.experiments.benchmark import Problem, installed, publication, run
from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Series
from torchdiffeq_symplectic.experiments.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.experiments.benchmark.results import OtherRunError, Results, Settings
from torchdiffeq_symplectic.experiments.figures import FLOOR, STYLES

KEPT = Path(__file__).parent.parent / "compat" / "benchmark"
CHOSEN = [one for one in installed() if one.name in ("backpropagation", "adjoint", "symplectic", "memory_free")]
LEFT_OUT = {"adjoint": "takes too long"}
SETTINGS = Settings.here(torch.device("cpu"), repeats=1, seed=0)


def build(seed: int) -> Problem:
    return Problem(Net(), initial().detach(), times(0.0, 1.0), loss_of, "dopri5", 1e-3, 1e-3, {"first_step": 0.1})


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> list[Series]:
    """A series of two cases with an axis, and one of a single case."""
    found = [
        Series("small", "Small?", (Case("one", build),)),
        Series(
            "steps",
            "Steps?",
            (Case("10 steps", build, 10.0), Case("100 steps", build, 100.0, without=LEFT_OUT)),
            "steps N",
        ),
    ]
    for one in found:
        monkeypatch.setitem(PROBLEMS, one.name, one)
    return found


def test_all_is_written(series: list[Series], tmp_path: Path) -> None:
    assert run.run(series, CHOSEN, SETTINGS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "benchmark.json",
        "benchmark.md",
        "overview.png",
        *(f"{name}.{ending}" for name in ("small", "steps") for ending in ("csv", "png")),
    }
    frame = pd.read_csv(tmp_path / "steps.csv")
    assert list(frame["case"].unique()) == ["10 steps", "100 steps"]
    assert list(frame["contender"].unique()) == [one.name for one in CHOSEN]
    text = (tmp_path / "benchmark.md").read_text(encoding="utf8")
    assert "nan" not in text
    assert "- adjoint: takes too long" in text


def test_it_goes_on_where_it_stopped(series: list[Series], tmp_path: Path) -> None:
    stopping = dataclasses.replace(series[1].cases[1], build=interrupt)
    stopped = [series[0], dataclasses.replace(series[1], cases=(series[1].cases[0], stopping))]
    assert not run.run(stopped, CHOSEN, SETTINGS, tmp_path)
    before = Results.load(tmp_path / run.FILE)
    assert list(before.frame["case"].unique()) == ["one", "10 steps"]
    assert run.run(series, CHOSEN, SETTINGS, tmp_path)
    after = Results.load(tmp_path / run.FILE)
    assert list(after.frame["case"].unique()) == ["one", "10 steps", "100 steps"]
    pd.testing.assert_frame_equal(after.of("small", "one"), before.of("small", "one"), check_dtype=False)


def interrupt(seed: int) -> Problem:
    raise KeyboardInterrupt


def test_figures_of_other_settings_are_not_mixed(series: list[Series], tmp_path: Path) -> None:
    run.run(series[:1], CHOSEN, SETTINGS, tmp_path)
    other = dataclasses.replace(SETTINGS, seed=1)
    with pytest.raises(OtherRunError, match="seed was 0, is 1"):
        run.run(series[:1], CHOSEN, other, tmp_path)
    assert run.run(series[:1], CHOSEN, other, tmp_path, fresh=True)
    (tmp_path / run.FILE).write_text("{}", encoding="utf8")
    with pytest.raises(OtherRunError, match="does not hold results"):
        run.run(series[:1], CHOSEN, SETTINGS, tmp_path)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    results = Results.load(KEPT / "benchmark.json")
    results.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((KEPT / "benchmark.json").read_text())


def test_the_kept_tables_are_those_of_the_run_beside_them(tmp_path: Path) -> None:
    results = Results.load(KEPT / "benchmark.json")
    assert publication.report(results) == (KEPT / "benchmark.md").read_text(encoding="utf8")
    text = (KEPT / "README.md").read_text(encoding="utf8")
    (tmp_path / "README.md").write_text(text, encoding="utf8")
    publication.update(tmp_path / "README.md", results)
    assert (tmp_path / "README.md").read_text(encoding="utf8") == text
    for name in results.problems:
        results.of(name).drop(columns="problem").to_csv(tmp_path / "file.csv", index=False)
        assert (KEPT / f"{name}.csv").read_bytes() == (tmp_path / "file.csv").read_bytes()
        assert (KEPT / f"{name}.png").exists()
    assert [name for name in PROBLEMS if f"`{name}`" not in text] == []


def test_the_figure_of_the_front_page_is_the_runs() -> None:
    front = (KEPT.parent.parent / "README.md").read_text(encoding="utf8")
    rows = Results.load(KEPT / "benchmark.json").of("steps", "100 steps").set_index("contender")
    memory = rows.loc["backpropagation", "peak_bytes"] / rows.loc["symplectic", "peak_bytes"]
    time = rows.loc["symplectic", "relative_time"]
    assert f"**1/{memory:.0f} of backpropagation's memory at {time:.2f} times its time**" in front


def test_every_contender_has_a_look_of_its_own() -> None:
    names = [one.name.removeprefix("torchdyn, ") for one in installed()]
    assert [name for name in names if name not in STYLES] == []
    here = [look for name, look in STYLES.items() if name not in ("autograd", "interpolated_adjoint")]
    assert len(set(map(str, here))) == len(here)


@pytest.mark.parametrize("name", ["tolerance", "small"])
def test_a_picture_shows_every_figure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **settings: figures.append(figure))
    frame = Results.load(KEPT / "benchmark.json").of(name)
    publication.draw(PROBLEMS[name], frame, tmp_path / "picture.png")
    (figure,) = figures
    drawn = frame[frame["gradient_error"].notna()]
    points: int = 0
    for axes in figure.axes:
        if "error" in axes.get_ylabel() + axes.get_xlabel():
            points += sum(np.size(line.get_xdata()) for line in axes.lines)
            points += sum(len(np.asarray(dots.get_offsets())) for dots in axes.collections)
    assert points == len(drawn)
    if name == "tolerance":
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.get_texts()} == set(drawn["contender"])
        errors = [axes for axes in figure.axes if "error" in axes.get_ylabel()]
        assert min(np.min(np.asarray(line.get_ydata())) for axes in errors for line in axes.lines) == FLOOR
