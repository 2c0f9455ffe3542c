"""The command line: help, version, suggestions, what is refused before anything is measured, and what is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("typer", reason='needs the extra "cli"')
from typer.testing import CliRunner

import torchdiffeq_symplectic
from torchdiffeq_symplectic.cli import app

COMMANDS = ["check", "demo", "benchmark", "resnet", "study"]
STUDIES = {
    "depth": (["--depths", "8,4,8"], {"depth": 6}),
    "memory-free": (["--depths", "4 8"], {"memory-free": 4}),
    "linear": (["--depths", "8,4", "--steps", "3"], {"linear": 24}),
    "tied": (["--depths", "2,4", "--depth", "3", "--epochs", "1"], {"tied": 6, "tied-memory": 12}),
    "training": (["--depths", "3", "--epochs", "1"], {"training": 8}),
}


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_version() -> None:
    assert run("--version") == (0, f"torchdiffeq-symplectic {torchdiffeq_symplectic.__version__}")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), *(["study", name] for name in STUDIES)])
def test_help(command: list[str]) -> None:
    status, text = run(*command, "--help")
    assert status == 0
    assert "Usage:" in text
    if not command:
        assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chek"], "Did you mean 'check'"),
        (["study", "depht"], "Did you mean 'depth'"),
        (["benchmark", "smal"], "Did you mean 'small'"),
        (["benchmark", "--mode", "symplectc"], "Did you mean 'symplectic'"),
        (["demo", "--stps", "3"], "--steps"),
        (["demo", "--steps", "0"], "'--steps'"),
        (["demo", "--device", "gpu"], "'gpu' is not a known device; use cpu or cuda"),
        (["demo", "--device", "cuda:99"], "PyTorch sees"),
        (["study", "depth", "--depths", "1,2"], "whole numbers of at least 2"),
        (["benchmark", "--readme", "nofile.md"], "nofile.md"),
        (["resnet", "--arch", "resnet19", "--size", "32"], "resnet18"),
    ],
)
def test_a_mistake_is_answered_by_what_would_do_and_leaves_nothing_behind(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "resnet" in arguments:
        pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    status, text = run(*arguments)
    assert status == 2
    assert words in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["demo"], ["benchmark", "small"], ["resnet"], ["study", "depth"]])
def test_a_directory_that_cannot_be_made_is_refused_first(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, text = run(*arguments, "--out", str(tmp_path / "file" / "below"))
    assert status == 2
    assert "is not a directory" in text


def test_a_file_without_the_place_for_results_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no place", encoding="utf8")
    status, text = run("benchmark", "small", "--readme", str(tmp_path / "README.md"), "--out", str(tmp_path / "out"))
    assert status == 2
    assert "<!-- benchmark -->" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys\nfrom torchdiffeq_symplectic.__main__ import main\n"
        "sys.modules['typer'] = None  # as if it were not installed\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == 'error: typer is missing; pip install "torchdiffeq-symplectic[cli]"\n'


@pytest.mark.parametrize(
    "name", ["depth", *(pytest.param(name, marks=pytest.mark.slow) for name in STUDIES if name != "depth")]
)
def test_a_study_writes_its_picture_and_its_numbers(name: str, tmp_path: Path) -> None:
    arguments, rows = STUDIES[name]
    out = tmp_path / "made" / "by it"
    status, text = run("study", name, *arguments, "--out", str(out))
    assert status == 0
    assert {path.name for path in out.iterdir()} == {f"{name}.png", *(f"{file}.csv" for file in rows)}
    for file, count in rows.items():
        frame = pd.read_csv(out / f"{file}.csv")
        assert len(frame) == count
    assert "nan" not in text
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_demo_learns_and_compares(tmp_path: Path) -> None:
    status, text = run("demo", "--steps", "12", "--device", "cpu", "--out", str(tmp_path))
    assert status == 0
    before, after = map(float, re.findall(r"dimension: ([\d.]+) before, ([\d.]+) after", text)[0])
    assert after < before
    frame = pd.read_csv(tmp_path / "demo.csv").set_index("contender")
    assert list(frame.index) == ["backpropagation", "adjoint", "baseline", "aca", "symplectic", "symplectic, stages"]
    assert frame.loc["symplectic", "gradient_error"] < 1e-13 < frame.loc["adjoint", "gradient_error"]
    assert frame.loc["symplectic", "peak_bytes"] == frame["peak_bytes"].min()
    assert (tmp_path / "demo.png").exists()


def test_resnet_takes_the_longest_stage_and_writes_the_report(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    arguments = ["--arch", "resnet18", "--size", "32", "--batch", "2", "--device", "cpu", "--out", str(tmp_path)]
    status, text = run("resnet", *arguments)
    assert status == 0
    assert "layer1: 2 blocks" in text
    assert {path.name for path in tmp_path.iterdir()} == {"report.png", "report.json"}
    status, text = run("resnet", *arguments, "--stage", "layer3")
    assert status == 2
    assert "those that do: layer1" in text


def test_a_network_without_stages_is_said_to_have_none() -> None:
    pytest.importorskip("torchvision")
    status, text = run("resnet", "--arch", "vgg16", "--size", "32", "--batch", "2")
    assert status == 2
    assert "vgg16 has no stage" in text
