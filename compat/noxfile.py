"""The compatibility tests and ``check`` on each pair of host releases, with the lowest and the newest PyTorch.

Run ``nox -f compat/noxfile.py``; arguments after ``--`` are pytest's, in place of ``-n auto``. One session alone is
``-s "matrix(lowest)"``. Each of the three environments has a PyTorch of its own, of some 6 GB; ``-r`` uses those that
are there. The results are kept with the environments (in ``compat/.nox``, or where ``--envdir`` says), and the session
``table`` makes ``compat/matrix.csv`` and the table in ``compat/README.md`` of them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

sys.path.insert(0, str(Path(__file__).parent))  # where nox does not look for modules

import matrix as results

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf8")

nox.options.sessions = ["matrix", "clients", "table"]


@nox.session
@nox.parametrize("torch", [results.lowest("torch", PROJECT), results.NEWEST], ids=["lowest", "newest"])
def matrix(session: nox.Session, torch: str) -> None:
    """The tests and the check for every pair of hosts with one PyTorch; a failure does not stop the others."""
    folders = {plan: _results(session) / plan.folder for plan in results.planned(PROJECT) if plan.torch == torch}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir(parents=True)
    session.chdir(ROOT)
    session.install("--upgrade", _requirement(torch), "--editable", ".[test]")
    failed = []
    for plan, folder in folders.items():
        failed += [f"{part} of {plan.folder}" for part in _run(session, plan, folder)]
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def _run(session: nox.Session, plan: results.Versions, folder: Path) -> list[str]:
    """Run all for one combination, with its results in ``folder``; returns what failed."""
    hosts = [f"torchdiffeq=={plan.torchdiffeq}", f"torchdyn=={plan.torchdyn}"]
    try:
        # Always, so not by `session.install`, which -R leaves out. torchdyn 1.0.5 says that it needs torch<2, but its
        # code is that of 1.0.6, which does not.
        session.run("python", "-m", "pip", "install", "--quiet", "--no-deps", *hosts)
    except CommandFailed:
        return ["installation"]
    tests = ["compat", "--ignore", "compat/test_matrix.py", "--quiet", *(session.posargs or ["-n", "auto"])]
    commands = {
        "tests.xml": ["pytest", *tests, "--junitxml"],
        "check.json": ["torchdiffeq_symplectic", "check", "--json"],
    }
    failed = []
    for name, command in commands.items():
        unfinished = folder / f"unfinished-{name}"  # pytest writes what it has when it is interrupted, too
        try:
            session.run("python", "-m", *command, str(unfinished))
        except CommandFailed:
            failed.append(command[0])
        if unfinished.exists():
            unfinished.rename(folder / name)
    return failed


@nox.session
def clients(session: nox.Session) -> None:
    """Packages that call the hosts, all of them installed, with the newest versions of everything."""
    report = _results(session) / "clients.xml"
    session.chdir(ROOT)
    session.install("--upgrade", "torch", "torchdiffeq", "torchdyn", "torchtyping", "--editable", ".[test,clients]")
    session.install("--upgrade", "--no-deps", "stribor")  # which pins an old torchdiffeq
    arguments = session.posargs or ["-n", "auto"]
    session.run("python", "-m", "pytest", "compat/test_downstream.py", *arguments, "--junitxml", str(report))
    counts = results.tests(report)
    if counts is None or any(count["skipped"] for count in counts.values()):
        session.error("a package is not there, so its tests were skipped")


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """All results as CSV and in compat/README.md; fails if one is missing or is a failure."""
    rows = results.collect(_results(session), results.planned(PROJECT))
    results.write(rows, ROOT / "compat" / "matrix.csv", ROOT / "compat" / "README.md")
    bad = dict.fromkeys(row.versions.folder for row in rows if not row.good)
    if bad:
        session.error(f"failed or not run: {', '.join(bad)}")


def _results(session: nox.Session) -> Path:
    """Where results are kept from session to session."""
    return session.cache_dir.resolve() / "matrix"


def _requirement(torch: str) -> str:
    return "torch" if torch == results.NEWEST else f"torch=={torch}"
