"""The command line of the studies: what it writes and says, and its manners."""

import csv
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic.__main__ import main

EXTRA = ["matplotlib", "rich", "sklearn"]
SMALL = {
    "depth": ["--depths", "8", "4", "8"],
    "memory-free": ["--depths", "4", "8"],
    "linear": ["--depths", "8", "4", "--steps", "3"],
    "tied": ["--depths", "2", "4", "--depth", "3", "--epochs", "1"],
}
FILES = {"depth": ["depth"], "memory-free": ["memory-free"], "linear": ["linear"], "tied": ["tied", "tied-memory"]}
HEUN = "heun2" in SOLVERS
ROWS = {"depth": 6, "memory-free": 2 + 2 * HEUN, "linear": 3 * 2 * 4, "tied": 6, "tied-memory": 12}

each_study = pytest.mark.parametrize("study", SMALL)
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in EXTRA), reason='needs the extra "resnet"'
)


def status(run: Callable[[], object]) -> object:
    with pytest.raises(SystemExit) as exit_:
        run()
    return exit_.value.code


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    """Run ``code``, to which ``sys`` and ``main`` are known, in a process of its own."""
    code = f"import sys\nfrom torchdiffeq_symplectic.__main__ import main\n{code}"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def read(path: Path) -> Sequence[Sequence[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@needs_extra
@each_study
def test_a_study_writes_a_picture_and_files_and_says_what_it_found(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "by it"
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    assert main(["study", study, "--out", str(out), *SMALL[study]]) == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert {path.name for path in out.iterdir()} == {f"{study}.png", *(f"{name}.csv" for name in FILES[study])}
    picture = (out / f"{study}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    for name in FILES[study]:
        titles, *rows = read(out / f"{name}.csv")
        assert len(rows) == ROWS[name]
        assert "[" in " ".join(titles)  # units
        assert {len(row) for row in rows} == {len(titles)}
    assert "Wrote" in capsys.readouterr().out


@needs_extra
def test_a_single_depth_has_no_slope_but_runs(tmp_path: Path) -> None:
    assert main(["study", "depth", "--out", str(tmp_path), "--depths", "4"]) == 0
    assert main(["study", "linear", "--out", str(tmp_path), "--depths", "4", "--steps", "1"]) == 0


@needs_extra
def test_a_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert main(["study", "memory-free", "--out", str(tmp_path / name), "--seed", "3", "--depths", "4"]) == 0
    assert read(tmp_path / "first" / "memory-free.csv") == read(tmp_path / "second" / "memory-free.csv")


def test_help_lists_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main(["study", "--help"])) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SMALL)


@each_study
def test_help_of_a_study_tells_options_and_defaults(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main(["study", study, "--help"])) == 0
    text = capsys.readouterr().out
    for word in ("--device", "--seed", "--out", "--depths", "torchdiffeq-symplectic-study"):
        assert word in text


@needs_extra
def test_defaults_that_help_tells_are_those_of_the_studies() -> None:
    from torchdiffeq_symplectic.resnet.studies import depth, linear, memory_free, tied

    assert depth.DEPTHS == linear.DEPTHS == (16, 32, 64, 128, 256, 512)
    assert memory_free.DEPTHS == (8, 16, 32, 64, 128, 256)
    assert tied.DEPTHS == (4, 8, 16, 32, 64, 128)
    assert (linear.STEPS, tied.DEPTH, tied.EPOCHS) == (60, 12, 12)


@pytest.mark.parametrize(
    ("study", "argument", "value"),
    [
        ("depth", "--device", "abacus"),
        ("depth", "--device", "cuda:99"),
        ("memory-free", "--depths", "1"),
        ("memory-free", "--depths", "few"),
        ("linear", "--steps", "0"),
        ("tied", "--epochs", "none"),
        ("tied", "--depth", "1"),
        ("tied", "--seed", "-1"),
    ],
)
def test_a_bad_value_names_its_argument(
    study: str, argument: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(lambda: main(["study", study, argument, value])) == 2
    error = capsys.readouterr().err
    assert f"argument {argument}" in error
    assert value in error


@needs_extra
def test_out_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert status(lambda: main(["study", "depth", "--out", str(tmp_path / "file")])) == 2
    assert "argument --out" in capsys.readouterr().err


def test_no_study_and_an_unknown_one_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main(["study"])) == 2
    assert "STUDY" in capsys.readouterr().err
    assert status(lambda: main(["study", "width"])) == 2
    assert "memory-free" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["rich", "sklearn"])  # needed by all studies, and by one
def test_a_missing_extra_is_named(module: str, tmp_path: Path) -> None:
    arguments = ["study", "tied", "--out", str(tmp_path), *SMALL["tied"]]
    result = run_python(f"sys.modules[{module!r}] = None  # as if it were not installed\nsys.exit(main({arguments}))\n")
    assert result.returncode == 1
    assert 'pip install "torchdiffeq-symplectic[resnet]"' in result.stderr
    assert module in result.stderr


def test_the_mathematics_of_the_studies_imports_no_extra() -> None:
    result = run_python(
        "from torchdiffeq_symplectic.resnet.studies import depth\n"
        f"depth.run(depths=(2,))\nsys.exit(len(set({EXTRA}) & set(sys.modules)))\n"
    )
    assert result.returncode == 0, result.stderr
