"""The command line's manners, and that a short demo delivers what it claims."""

import contextlib
import csv
import importlib.util
import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from torchdiffeq_symplectic.__main__ import main

STEPS = 30
EXACT = ["backpropagation", "aca", "baseline", "symplectic", "symplectic, stages"]

EXTRA = ["matplotlib", "rich", "sklearn"]

needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in EXTRA), reason='needs the extra "demo"'
)


def status(run: Callable[[], object]) -> object:
    with pytest.raises(SystemExit) as exit_:
        run()
    return exit_.value.code


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    """Run ``code``, to which ``sys`` and ``main`` are known, in a process of its own."""
    code = f"import sys\nfrom torchdiffeq_symplectic.__main__ import main\n{code}"
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main(["--help"])) == 0
    assert "demo" in capsys.readouterr().out


def test_help_of_demo_tells_options_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main(["demo", "--help"])) == 0
    text = capsys.readouterr().out
    for word in ("--device", "--seed", "--steps", "--out", "torchdiffeq-symplectic-demo"):
        assert word in text


def test_version_names_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main(["--version"])) == 0
    assert capsys.readouterr().out.startswith("torchdiffeq-symplectic ")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--device", "abacus"),
        ("--device", "meta"),
        ("--device", "cuda:99"),
        ("--steps", "0"),
        ("--steps", "many"),
        ("--seed", "-1"),
        ("--seed", "4294967296"),
    ],
)
def test_a_bad_value_names_its_argument(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main(["demo", argument, value])) == 2
    error = capsys.readouterr().err
    assert f"argument {argument}" in error
    assert value in error


@needs_extra
@pytest.mark.parametrize("name", ["file", "file/below"])
def test_out_that_is_a_file_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert status(lambda: main(["demo", "--out", str(tmp_path / name)])) == 2
    assert "argument --out" in capsys.readouterr().err


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(lambda: main([])) == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("module", EXTRA)
def test_a_missing_extra_is_named(module: str, tmp_path: Path) -> None:
    result = run_python(
        f"sys.modules[{module!r}] = None  # as if it were not installed\n"
        f"sys.exit(main(['demo', '--out', {str(tmp_path)!r}]))\n"
    )
    assert result.returncode == 1
    assert 'pip install "torchdiffeq-symplectic[demo]"' in result.stderr
    assert module in result.stderr


def test_help_imports_no_extra() -> None:
    result = run_python(
        f"try: main(['demo', '--help'])\nexcept SystemExit: pass\nsys.exit(len(set({EXTRA}) & set(sys.modules)))\n"
    )
    assert result.returncode == 0


@dataclass
class Demo:
    """What a demo of few steps left behind."""

    out: Path
    terminal: str
    rows: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run it once for all tests; the global state must be as it was before."""
    out = tmp_path_factory.mktemp("demo") / "made" / "by it"
    random, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()) as terminal:
        assert main(["demo", "--device", "cpu", "--steps", str(STEPS), "--out", str(out)]) == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_default_dtype() is dtype
    assert torch.get_num_threads() == threads
    with (out / "demo.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["contender"]: row for row in csv.DictReader(file)}
    return Demo(out, terminal.getvalue(), rows)


@needs_extra
def test_demo_writes_a_picture(demo: Demo) -> None:
    picture = (demo.out / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


@needs_extra
def test_demo_improves_the_held_out_likelihood(demo: Demo) -> None:
    found = re.search(r"(\d\.\d+)\s+before,\s+(\d\.\d+)\s+after", demo.terminal)
    assert found is not None, demo.terminal
    assert float(found[2]) < float(found[1]) - 0.1


@needs_extra
def test_demo_compares_all_contenders(demo: Demo) -> None:
    names = ["backpropagation", "adjoint", "baseline", "aca", "symplectic", "symplectic, stages"]
    assert list(demo.rows) == names
    assert all(name in demo.terminal for name in names)


@needs_extra
@pytest.mark.parametrize("name", EXACT)
def test_exact_modes_have_errors_of_rounding(name: str, demo: Demo) -> None:
    assert float(demo.rows[name]["gradient_error"]) < 5e-6 < float(demo.rows["adjoint"]["gradient_error"])


@needs_extra
def test_symplectic_needs_the_least_memory_of_the_exact_modes(demo: Demo) -> None:
    memory = {name: int(demo.rows[name]["peak_bytes"]) for name in EXACT}
    assert min(memory, key=lambda name: memory[name]) == "symplectic"
    assert 3 * memory["symplectic"] < memory["backpropagation"]


@needs_extra
def test_the_modes_leave_the_forward_evaluations_as_they_are(demo: Demo) -> None:
    assert len({row["forward_evaluations"] for row in demo.rows.values()}) == 1
