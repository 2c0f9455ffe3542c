"""The examples run as users run them, with small numbers: the loss does not depend on the mode, the memory does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent / "examples"
SMALL = {
    "latent_ode.py": ["--steps", "2"],
    "ffjord.py": ["--steps", "2"],
    "lightning_classifier.py": ["--steps", "2"],
    "long_pde.py": ["--solver-steps", "300", "--steps", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_an_example_saves_memory_at_the_same_loss(name: str) -> None:
    for module in ("sklearn", *(("torchdyn", "pytorch_lightning") if "lightning" in name else ())):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name), *SMALL[name]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (loss, memory), (loss_off, memory_off) = (
        tuple(map(float, found)) for found in re.findall(r"loss ([\d.]+), ([\d.]+) MiB", done.stdout)
    )
    assert loss == pytest.approx(loss_off, abs=2e-4)
    assert memory < memory_off / 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_in_the_list(path: Path) -> None:
    assert len(path.read_text(encoding="utf8").splitlines()) <= 80
    assert path.name in SMALL
