"""What the equivalence report shows: its dictionary, table and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from residual_blocks import DOUBLE, Dense, forms, needs_heun, sequence_of, state
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet import EquivalenceReport, equivalence_report

NEEDED = [
    "forward_error",
    "gradient_error",
    "distance",
    "bound",
    "smoothness",
    "memory_free_error",
    "verdict",
]


def dense_report(count: int = 5, **keywords: Any) -> EquivalenceReport:
    return equivalence_report(sequence_of(Dense, count), state(4, 3), **keywords)


@needs_heun
def test_dictionary_has_the_names_and_is_json() -> None:
    found = dense_report().to_dict()
    assert set(NEEDED) <= set(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["distance"]) == len(found["bound"]) == 6
    assert found["distance"][0] == found["bound"][0] == 0
    assert set(found["memory_free_error"]) == {"euler", "heun2"}
    assert {"relative", "cosine"} <= set(found["memory_free_error"]["euler"])


def test_print_shows_the_figures_and_the_verdict() -> None:
    report = dense_report()
    text = str(report)
    assert f"Verdict: {report.verdict}" in text
    assert all(reason in text for reason in report.reasons)
    for figure in (report.distance[-1], report.bound[-1], report.smoothness, report.amplification, report.step_error):
        assert f"{figure:.3g}" in text
    for found in report.memory_free_error.values():
        assert f"{found.relative:.1e}, cosine {found.cosine:.6f}" in text
    assert all(f"  {name}" in text for name in report.smoothness_by_layer)
    assert repr(report) == f"<EquivalenceReport of 5 blocks: {report.verdict}>"


@pytest.mark.parametrize("name", ["dense", "tied", "mixed"])
def test_plot_can_be_read_without_colours(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("seaborn")
    from matplotlib.figure import Figure

    blocks, keywords, shape = forms()[name]
    report = equivalence_report(blocks, state(*shape), **keywords)
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **settings: figures.append(figure))
    report.plot(tmp_path / "report.png")
    monkeypatch.undo()
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    for axes, least in zip(
        figures[0].axes, (2, 0 if name == "mixed" else 1, len(report.memory_free_error)), strict=True
    ):
        lines = [line for line in axes.lines if np.size(line.get_xdata())]  # the others are the legend's
        assert len(lines) >= least
        looks = [(line.get_linestyle(), line.get_marker()) for line in lines]
        assert len(set(looks)) == len(looks)
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_plot_of_what_is_not_finite(tmp_path: Path) -> None:
    pytest.importorskip("seaborn")

    class Bursting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 8 * x.square()

    report = equivalence_report([Bursting()] * 2, torch.ones(2, dtype=DOUBLE), residual=True)
    report.plot(str(tmp_path / "report.svg"))
    assert "<svg" in (tmp_path / "report.svg").read_text(encoding="utf8")
