"""What has been measured, kept in a file so that a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchdiffeq_symplectic.benchmark import peers
from torchdiffeq_symplectic.benchmark.compare import Row
from torchdiffeq_symplectic.verify.hosts import versions

__all__ = ["Measured", "OtherRunError", "Results", "Settings"]


class OtherRunError(ValueError):
    """A file holds what was measured in another way."""


@dataclass(frozen=True)
class Settings:
    """What figures must share to stand side by side.

    Attributes:
        device: as PyTorch names it.
        repeats: rounds of timing.
        seed: of parameters and data.
        threads: of the CPU's operators.
        processor: a CPU's architecture, or a GPU's name.
        versions: of what was measured.
    """

    device: str
    repeats: int
    seed: int
    threads: int
    processor: str
    versions: dict[str, str]

    @classmethod
    def here(cls, device: torch.device, repeats: int, seed: int) -> Settings:
        """Those of this process."""
        cuda = device.type == "cuda"
        processor = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU"
        return cls(str(device), repeats, seed, torch.get_num_threads(), processor, {**versions(), **peers.versions()})


@dataclass(frozen=True)
class Measured:
    """The rows of one case; the other attributes are those of :class:`Case` and the name of its series."""

    problem: str
    case: str
    value: float | None
    panel: str
    rows: tuple[Row, ...]

    def of(self, contender: str) -> Row | None:
        """The row of a contender that has figures, else None."""
        return next((row for row in self.rows if row.contender == contender and not row.note), None)


class Results:
    """Cases that have been measured under the same settings.

    Args:
        settings: what they share.
        cases: in the order in which they were measured.
    """

    def __init__(self, settings: Settings, cases: Iterable[Measured] = ()) -> None:
        self.settings = settings
        self._cases = {(case.problem, case.case): case for case in cases}

    @classmethod
    def load(cls, path: Path) -> Results:
        """Those that :meth:`save` wrote.

        Raises:
            OtherRunError: if the file is none of this version's.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cases = [
                Measured(**{**case, "rows": tuple(Row(**row) for row in case["rows"])}) for case in content["cases"]
            ]
            return cls(Settings(**content["settings"]), cases)
        except (ValueError, KeyError, TypeError) as error:
            raise OtherRunError(f"{path} does not hold results of this version ({error})") from error

    @classmethod
    def resume(cls, path: Path, settings: Settings) -> Results:
        """Those in ``path``, none if it does not exist.

        Raises:
            OtherRunError: if they were measured under other settings.
        """
        if not path.exists():
            return cls(settings)
        found = cls.load(path)
        differences = [
            f"{field.name} was {before}, is {now}"
            for field in dataclasses.fields(Settings)
            if (before := getattr(found.settings, field.name)) != (now := getattr(settings, field.name))
        ]
        if differences:
            raise OtherRunError(f"{path} holds figures of another run: {'; '.join(differences)}")
        return found

    def save(self, path: Path) -> None:
        """Write all to ``path``; whoever reads it meanwhile finds the old file or the new one, whole."""
        content: dict[str, Any] = {
            "settings": dataclasses.asdict(self.settings),
            "cases": [dataclasses.asdict(case) for case in self._cases.values()],
        }
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)

    def add(self, measured: Measured) -> None:
        """Take a case in; one of the same name is replaced."""
        self._cases[measured.problem, measured.case] = measured

    def drop(self, problem: str) -> None:
        """Forget the cases of a series."""
        self._cases = {key: case for key, case in self._cases.items() if case.problem != problem}

    def has(self, problem: str, case: str, contenders: Iterable[str]) -> bool:
        """Whether a case has been measured with all of ``contenders``."""
        found = self.get(problem, case)
        return found is not None and set(contenders) <= {row.contender for row in found.rows}

    def get(self, problem: str, case: str) -> Measured | None:
        """A case by its series and its label, None if it has not been measured."""
        return self._cases.get((problem, case))

    def of(self, problem: str) -> list[Measured]:
        """The cases of a series that have been measured."""
        return [case for case in self._cases.values() if case.problem == problem]

    @property
    def problems(self) -> list[str]:
        """Names of the series of which cases have been measured."""
        return list(dict.fromkeys(case.problem for case in self._cases.values()))
