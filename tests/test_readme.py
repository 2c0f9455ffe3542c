"""The READMEs and CHANGELOG against the facts: examples run as users run them, tables and numbers are the package's."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import matrix
import pytest

import torchdiffeq_symplectic
from torchdiffeq_symplectic import MODES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torchdiffeq_symplectic"
README = (ROOT / "README.md").read_text(encoding="utf8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
PROJECT = pytest.importorskip("tomllib", reason="needs Python 3.11").loads(
    (ROOT / "pyproject.toml").read_text(encoding="utf8")
)["project"]
DOCUMENTS = [ROOT / "README.md", PACKAGE / "hosts" / "README.md", PACKAGE / "resnet" / "README.md"]
SOURCE = PROJECT["urls"]["Source"]
HINT = "Your vector field callable"  # torchdyn's, that it adds the time to a field that takes none


def snippets() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for number, code in enumerate(
            re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf8"), flags=re.DOTALL)
        ):
            if not code.startswith("# doctest: skip"):
                found.append((f"{path.relative_to(ROOT)}, {number}", code))
    return found


@pytest.mark.parametrize(
    ("name", "code"),
    [pytest.param(*one, id=one[0], marks=pytest.mark.slow if i else []) for i, one in enumerate(snippets())],
)
def test_python_examples_run_in_a_process_of_their_own(name: str, code: str) -> None:
    if "torchdyn" in re.sub("torchdyn-|torchdyn_", "", code) and importlib.util.find_spec("torchdyn") is None:
        pytest.skip("needs torchdyn")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if not line.startswith(HINT)]
    assert printed == re.findall(r"print\(.*\)\s+# (.*)", code)


def test_every_mode_has_its_row() -> None:
    rows = re.findall(r'^\| `"(\w+)"`', README, flags=re.MULTILINE)
    assert set(rows) == set(MODES)


def test_bounds_are_those_of_the_project_file() -> None:
    assert all(requirement in README for requirement in PROJECT["dependencies"])
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} or later" in README


def test_the_first_screen_is_short() -> None:
    assert len(README.split()) <= 900


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_the_repository_lead_to_a_file(path: Path) -> None:
    raw = SOURCE.replace("github.com", "raw.githubusercontent.com")
    text = path.read_text(encoding="utf8")
    links = re.findall(rf"(?:{re.escape(SOURCE)}/(?:blob|tree)|{re.escape(raw)})/main/([^)\s]*)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_pictures_and_links_of_the_front_page_are_absolute() -> None:
    assert [link for link in re.findall(r"\]\(([^)]*)\)", README) if not link.startswith("https://")] == []


def test_newest_entry_of_the_changelog_is_this_version() -> None:
    newest = re.findall(r"^## \[(.*?)\]", CHANGELOG, flags=re.MULTILINE)[0]
    assert newest == torchdiffeq_symplectic.__version__
    assert f"\nversion: {newest}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf8")


def test_the_architecture_section_names_every_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
    names = [path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    assert [name for name in names if name not in text and name != "__pycache__"] == []


def test_the_table_of_versions_is_that_of_the_last_run() -> None:
    rows = matrix.read_csv(ROOT / "compat" / "matrix.csv")
    text = (ROOT / "compat" / "README.md").read_text(encoding="utf8")
    assert matrix.replaced(text, matrix.table(rows)) == text


def test_only_the_command_line_imports_the_experiments() -> None:
    inner = [path for path in PACKAGE.rglob("*.py") if "experiments" not in path.parts and path.name != "cli.py"]
    assert [str(path) for path in inner if "symplectic.experiments" in path.read_text(encoding="utf8")] == []


def test_the_experiments_import_the_public_api_alone() -> None:
    allowed = re.compile(r"torchdiffeq_symplectic( import|\.(experiments[\w.]*|resnet) import|$)")
    for path in (PACKAGE / "experiments").rglob("*.py"):
        imports = re.findall(r"^\s*(?:from|import) (torchdiffeq_symplectic.*)$", path.read_text(encoding="utf8"), re.M)
        assert [line for line in imports if not allowed.match(line)] == [], path
