"""README and CHANGELOG against the facts: examples run, tables and numbers are those of the package."""

import re
from pathlib import Path

import matrix
import pytest
import torch

import torchdiffeq_symplectic
from torchdiffeq_symplectic import MODES
from torchdiffeq_symplectic.benchmark.markdown import report, update
from torchdiffeq_symplectic.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.benchmark.results import Results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_examples_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "torchdyn.core" in code or "torchdyn.numerics" in code:
        pytest.importorskip("torchdyn")
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    claimed = re.findall(r"print\(.*\)\s+# (.*)", code)
    assert capsys.readouterr().out.splitlines() == claimed


def test_every_mode_has_its_row() -> None:
    rows = re.findall(r'^\| `"(\w+)"`', README, flags=re.MULTILINE)
    assert set(rows) == set(MODES)


def test_bounds_are_those_of_the_project_file() -> None:
    (dependencies,) = re.findall(r"^dependencies = \[(.*)\]", PYPROJECT, flags=re.MULTILINE)
    for requirement in re.findall(r'"(.*?)"', dependencies):
        assert requirement in README
    (python,) = re.findall(r'requires-python = ">=(.*)"', PYPROJECT)
    assert f"Python {python} or later" in README


def test_newest_entry_of_the_changelog_is_this_version() -> None:
    newest = re.findall(r"^## \[(.*?)\]", CHANGELOG, flags=re.MULTILINE)[0]
    assert newest == torchdiffeq_symplectic.__version__


def test_the_architecture_section_names_every_file() -> None:
    (section,) = re.findall(r"## Architecture\n(.*?)\n## ", README, flags=re.DOTALL)
    package = ROOT / "torchdiffeq_symplectic"
    names = [path.name for path in package.iterdir() if path.suffix == ".py" or path.is_dir()]
    assert [name for name in names if name not in section and name != "__pycache__"] == []


def test_the_table_of_versions_is_that_of_the_last_run() -> None:
    rows = matrix.read_csv(ROOT / "compat" / "matrix.csv")
    assert matrix.replaced(README, matrix.table(rows)) == README


def test_the_results_are_those_of_the_run_that_is_kept_beside_them(tmp_path: Path) -> None:
    results = Results.load(ROOT / "compat" / "benchmark" / "benchmark.json")
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    update(readme, results)
    assert readme.read_text(encoding="utf-8") == README
    assert report(results) == (ROOT / "compat" / "benchmark" / "benchmark.md").read_text(encoding="utf-8")


def test_the_csv_files_are_of_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs the extra "benchmark"')
    pytest.importorskip("rich", reason='needs the extra "benchmark"')
    from torchdiffeq_symplectic.benchmark.report import write_cases

    results = Results.load(ROOT / "compat" / "benchmark" / "benchmark.json")
    assert results.problems
    for name in results.problems:
        write_cases(results.of(name), tmp_path / "file.csv")
        kept = ROOT / "compat" / "benchmark" / f"{name}.csv"
        assert kept.read_bytes() == (tmp_path / "file.csv").read_bytes()
        assert kept.with_suffix(".png").exists()


def test_every_problem_is_told() -> None:
    (section,) = re.findall(r"## What is gained, and what it costs\n(.*?)\n## ", README, flags=re.DOTALL)
    assert [name for name in PROBLEMS if f"`{name}`" not in section] == []
