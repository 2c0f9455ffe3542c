"""The command ``check``: its arguments, and what it does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from torchdiffeq_symplectic.modes import MODES
from torchdiffeq_symplectic.verify.findings import Findings
from torchdiffeq_symplectic.verify.hosts import HOSTS, Host, versions
from torchdiffeq_symplectic.verify.measure import THRESHOLDS, measure, variants

__all__ = ["add_arguments", "run"]

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in THRESHOLDS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument(
        "--host", choices=list(HOSTS), help="measure the methods of this one only (default: all that are installed)"
    )
    parser.add_argument(
        "--mode", choices=list(MODES), action="append", help="measure this mode only; may be repeated (default: all)"
    )
    parser.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        default="float64",
        help="of states, parameters and times (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to FILE, too")
    parser.set_defaults(command=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and return the exit status: 0 if all is exact that should be, else 1."""
    from rich.console import Console

    from torchdiffeq_symplectic.verify.report import report

    hosts = _hosts(arguments)
    if arguments.json is not None:
        _check_writable(arguments)
    console = Console()
    rows = []
    with _one_thread(), console.status("importing") as status:
        for row in measure(hosts, variants(arguments.mode), _DTYPES[arguments.dtype]):
            status.update(f"{row.host}: {row.method}")
            rows.append(row)
    findings = Findings(versions(), _DTYPES[arguments.dtype], rows)
    report(findings, console)
    if arguments.json is not None:
        text = json.dumps(findings.to_dict(), indent=2, allow_nan=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if findings.exact else 1


def _hosts(arguments: argparse.Namespace) -> list[Host]:
    if arguments.host is None:
        return [host for host in HOSTS.values() if host.installed]
    host = HOSTS[arguments.host]
    if not host.installed:
        arguments.parser.error(f"argument --host: {host.name} is not installed; pip install {host.name}")
    return [host]


def _check_writable(arguments: argparse.Namespace) -> None:
    """Before anything is measured: make the directory of the file if need be, and open it."""
    try:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.open("a", encoding="utf-8").close()
    except OSError as error:
        arguments.parser.error(f"argument --json: {arguments.json} cannot be written ({error.strerror})")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The matrices are tiny: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
