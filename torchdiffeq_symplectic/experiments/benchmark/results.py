"""What has been measured, kept in a file so that a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from torchdiffeq_symplectic.experiments.benchmark.compare import COLUMNS
from torchdiffeq_symplectic.experiments.environment import versions

__all__ = ["OtherRunError", "Results", "Settings"]

KEYS = ["problem", "case", "value", "panel"]


class OtherRunError(ValueError):
    """A file holds what was measured in another way."""


@dataclass(frozen=True)
class Settings:
    """What figures must share to stand side by side; the processor is a CPU's architecture, or a GPU's name."""

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
        found = versions("torch_symplectic_adjoint", "zuko", "TorchDiffEqPack")
        return cls(str(device), repeats, seed, torch.get_num_threads(), processor, found)


class Results:
    """Cases that have been measured under the same ``settings``: in ``frame`` a row for each contender in each case."""

    def __init__(self, settings: Settings, frame: pd.DataFrame | None = None) -> None:
        self.settings = settings
        self.frame = pd.DataFrame(columns=[*KEYS, *COLUMNS]) if frame is None else frame

    @classmethod
    def load(cls, path: Path) -> Results:
        """Those that :meth:`save` wrote; OtherRunError if the file is none of this version's."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            frame = pd.DataFrame(content["rows"])[[*KEYS, *COLUMNS]]
            return cls(Settings(**content["settings"]), frame)
        except (ValueError, KeyError, TypeError) as error:
            raise OtherRunError(f"{path} does not hold results of this version ({error})") from error

    @classmethod
    def resume(cls, path: Path, settings: Settings) -> Results:
        """Those in ``path``, if it exists; OtherRunError if they were measured under other settings."""
        if not path.exists():
            return cls(settings)
        found = cls.load(path)
        before, now = (dataclasses.asdict(one) for one in (found.settings, settings))
        differences = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
        if differences:
            raise OtherRunError(f"{path} holds figures of another run: {'; '.join(differences)}")
        return found

    def save(self, path: Path) -> None:
        """Write all to ``path``; whoever reads it meanwhile finds the old file or the new one, whole."""
        rows = self.frame.astype(object).where(self.frame.notna(), None)  # JSON has no NaN
        content = {"settings": dataclasses.asdict(self.settings), "rows": rows.to_dict(orient="records")}
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)

    def add(self, problem: str, case: str, value: float | None, panel: str, rows: pd.DataFrame) -> None:
        """Take a case in; one of the same name is replaced."""
        others = self.frame[(self.frame["problem"] != problem) | (self.frame["case"] != case)]
        keys = pd.DataFrame({"problem": problem, "case": case, "value": value, "panel": panel}, index=rows.index)
        new = pd.concat([keys, rows], axis=1)
        self.frame = pd.concat([others, new], ignore_index=True) if len(others) else new

    def has(self, problem: str, case: str, contenders: Iterable[str]) -> bool:
        """Whether a case has been measured with all of ``contenders``."""
        return set(contenders) <= set(self.of(problem, case)["contender"])

    def of(self, problem: str, case: str | None = None) -> pd.DataFrame:
        """The rows of a series, or of one of its cases."""
        found = self.frame[self.frame["problem"] == problem]
        return found if case is None else found[found["case"] == case]

    @property
    def problems(self) -> list[str]:
        """Names of the series of which cases have been measured."""
        return list(self.frame["problem"].unique())
