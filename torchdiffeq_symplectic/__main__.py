"""The command line: ``torchdiffeq-symplectic``, or ``python -m torchdiffeq_symplectic``."""

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Each command imports what it needs when it runs, so that help comes at once and needs no extra.

DISTRIBUTION = "torchdiffeq-symplectic"
EXTRAS = {"demo": {"matplotlib", "rich", "sklearn"}}  # extra of the distribution -> modules that it brings
LARGEST_SEED = 2**32 - 1  # scikit-learn's


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (default: the process's arguments) gives and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
    except ModuleNotFoundError as error:
        extra = _extra_of(error)
        if extra is None:
            raise
        print(f'error: {error.name} is missing; pip install "{DISTRIBUTION}[{extra}]"', file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=DISTRIBUTION,
        description="Exact gradients of torchdiffeq's solves in little memory.",
    )
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="train a flow on a real table, then compare the ways to its gradient",
        description="Train a continuous normalizing flow on scikit-learn's breast-cancer table by the symplectic "
        "adjoint, then compare error, memory and time of the ways to its gradient. Takes about a minute on two CPU "
        "cores; writes demo.png and demo.csv.",
    )
    parser.add_argument("--device", type=_device, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of split, parameters, batches and noise (default: %(default)s)"
    )
    parser.add_argument("--steps", type=_steps, default=800, help="of the optimiser (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("torchdiffeq-symplectic-demo"),
        help="directory for the files, made if need be (default: %(default)s)",
    )
    parser.set_defaults(command=_demo, parser=parser)


def _demo(arguments: argparse.Namespace) -> int:
    import torch

    from torchdiffeq_symplectic import demo

    _make_directory(arguments)
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    demo.run(device, arguments.seed, arguments.steps, arguments.out)
    return 0


def _make_directory(arguments: argparse.Namespace) -> None:
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        arguments.parser.error(
            f"argument --out: {arguments.out} is no directory and cannot be made one ({error.strerror})"
        )


def _device(text: str) -> "torch.device":
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a known device; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _steps(text: str) -> int:
    return _whole_number(text, 1, None)


def _seed(text: str) -> int:
    return _whole_number(text, 0, LARGEST_SEED)


def _whole_number(text: str, least: int, most: int | None) -> int:
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
    return number


def _version() -> str:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _extra_of(error: ModuleNotFoundError) -> str | None:
    """The extra whose module is missing, None if it is no extra's."""
    module = (error.name or "").partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


if __name__ == "__main__":
    sys.exit(main())
