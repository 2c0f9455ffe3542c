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
EXTRAS = {  # extra of the distribution -> modules that it brings
    "benchmark": {"matplotlib", "rich", "sklearn"},
    "demo": {"matplotlib", "rich", "sklearn"},
    "resnet": {"matplotlib", "rich", "sklearn"},
}
LARGEST_SEED = 2**32 - 1  # scikit-learn's


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (default: the process's arguments) gives and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
    except ModuleNotFoundError as error:
        extra = arguments.extra
        if (error.name or "").partition(".")[0] not in EXTRAS[extra]:
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
    _add_check(commands)
    _add_benchmark(commands)
    _add_resnet(commands)
    _add_study(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="train a flow on a real table, then compare the ways to its gradient",
        description="Train a continuous normalizing flow on scikit-learn's breast-cancer table by the symplectic "
        "adjoint, then compare error, memory and time of the ways to its gradient. Takes about a minute on two CPU "
        "cores; writes demo.png and demo.csv.",
    )
    parser.add_argument("--steps", type=_steps, default=800, help="of the optimiser (default: %(default)s)")
    _add_common(parser, "demo", "of split, parameters, batches and noise")
    parser.set_defaults(command=_demo, parser=parser, extra="demo")


def _add_check(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from torchdiffeq_symplectic.verify.command import add_arguments

    parser = commands.add_parser(
        "check",
        help="measure whether gradients are exact with the versions that are installed",
        description="Measure every method of every installed host under every gradient mode against backpropagation "
        "through the host's own solve, and print the relative errors found: the largest among the gradients of initial "
        "state, parameters and times. Takes less than a minute. Exit status 1 if one that should be is not exact.",
    )
    add_arguments(parser)
    parser.set_defaults(extra="demo")


def _add_benchmark(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from torchdiffeq_symplectic.benchmark.command import add_arguments

    parser = commands.add_parser(
        "benchmark",
        help="measure the ways to a gradient against each other",
        description="Measure gradient error, peak memory, time and field evaluations of backpropagation, upstream's "
        "adjoints, this package's modes, and torchdyn and other packages where they are installed. Prints a table for "
        "each case and keeps it in benchmark.json at once: after an interruption the same command goes on. Writes a "
        "CSV file and a picture for each problem. All problems take about an hour on one CPU core; set "
        "OMP_NUM_THREADS=1 for times that vary less.",
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=_steps, default=5, help="rounds of timing (default: %(default)s)")
    _add_common(parser, "benchmark", "of parameters and data")
    parser.set_defaults(command=_benchmark, parser=parser, extra="benchmark")


def _benchmark(arguments: argparse.Namespace) -> int:
    from torchdiffeq_symplectic.benchmark import command

    _make_directory(arguments)
    arguments.device = _chosen_device(arguments)
    return command.benchmark(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from torchdiffeq_symplectic import demo

    _make_directory(arguments)
    demo.run(_chosen_device(arguments), arguments.seed, arguments.steps, arguments.out)
    return 0


def _add_resnet(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "resnet",
        help="measure whether a stage of a residual network is a discretised ODE",
        description="Measure whether the blocks of a stage of one of torchvision's residual networks are the Euler "
        "scheme of an ODE, with random weights or those of a file. A first block that changes the shape is left out. "
        "With the defaults it takes about a minute on two CPU cores; writes report.png and report.json.",
    )
    parser.add_argument("--arch", default="resnet101", help="torchvision's name for it (default: %(default)s)")
    parser.add_argument(
        "--stage", default="layer3", help="the module whose children are the blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a checkpoint, loaded with weights_only=True (default: random weights)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="a directory of images, one image, or a .pt or .npy array of shape (images, 3, height, width), used as "
        "it is (default: parts of the photographs that scikit-learn ships)",
    )
    parser.add_argument("--batch", type=_steps, default=4, help="images that are used (default: %(default)s)")
    parser.add_argument(
        "--size", type=_steps, default=64, help="images' height and width in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--mode",
        choices=("train", "eval"),
        help="of batch norm and dropout (default: eval with --weights, else train: with random weights, batch norm has "
        "no statistics but the batch's)",
    )
    parser.add_argument(
        "--interpolate",
        choices=("outputs", "weights", "piecewise"),
        default="outputs",
        help="what lies between two blocks (default: %(default)s)",
    )
    _add_common(parser, "resnet", "of random weights and parts of photographs")
    parser.set_defaults(command=_resnet, parser=parser, extra="resnet")


def _resnet(arguments: argparse.Namespace) -> int:
    from torchdiffeq_symplectic.resnet import command

    _make_directory(arguments)
    settings = command.Settings(
        arch=arguments.arch,
        stage=arguments.stage,
        weights=arguments.weights,
        data=arguments.data,
        batch=arguments.batch,
        size=arguments.size,
        training={None: arguments.weights is None, "train": True, "eval": False}[arguments.mode],
        interpolate=arguments.interpolate,
        device=_chosen_device(arguments),
        seed=arguments.seed,
    )
    try:
        command.run(settings, arguments.out)
    except command.ArgumentError as error:
        arguments.parser.error(str(error))
    return 0


def _add_study(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    group = commands.add_parser(
        "study",
        help="run an experiment on residual networks and ODEs",
        description="Run one of four experiments on residual networks as discretised ODEs. Each takes a minute or less "
        "on two CPU cores, prints a table, and writes a picture and a CSV file named after it.",
    )
    studies = group.add_subparsers(title="studies", metavar="STUDY", required=True)
    depth = _study_parser(studies, "depth", "how far networks are from the ODEs through their blocks, over depth")
    memory_free = _study_parser(studies, "memory-free", "how far the memory-free gradient is from the exact one")
    linear = _study_parser(studies, "linear", "whether gradient descent keeps weights smooth in depth")
    tied = _study_parser(studies, "tied", "train with tied weights, then refine untied and memory-free")
    for parser, default in (
        (depth, "16 32 ... 512"),
        (memory_free, "8 16 ... 256"),
        (linear, "16 32 ... 512"),
        (tied, "4 8 ... 128; of the memory that is counted"),
    ):
        parser.add_argument(
            "--depths", type=_depth, nargs="+", metavar="N", help=f"numbers of blocks (default: {default})"
        )
    linear.add_argument("--steps", type=_steps, help="of gradient descent (default: 60)")
    tied.add_argument("--depth", type=_depth, metavar="N", help="blocks of the network that is trained (default: 12)")
    tied.add_argument("--epochs", type=_steps, help="of each of the two stages (default: 12)")


def _study_parser(
    studies: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    parser = studies.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    _add_common(parser, "study", "of weights, inputs and batches", device="cpu")
    parser.set_defaults(command=_study, parser=parser, extra="resnet", study=name)
    return parser


def _study(arguments: argparse.Namespace) -> int:
    from torchdiffeq_symplectic.resnet.studies import command

    _make_directory(arguments)
    names = ("seed", "device", "depths", "depth", "steps", "epochs")
    command.run(arguments.study, {name: getattr(arguments, name, None) for name in names}, arguments.out)
    return 0


def _add_common(parser: argparse.ArgumentParser, name: str, seed: str, device: str | None = None) -> None:
    """Add ``--device``, ``--seed`` and ``--out`` of the command ``name``; ``seed`` says what is drawn."""
    parser.add_argument(
        "--device",
        type=_device,
        default=device,
        help=f"cpu, cuda, cuda:1, ... (default: {device or 'cuda if there is one'})",
    )
    parser.add_argument("--seed", type=_seed, default=0, help=f"{seed} (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"{DISTRIBUTION}-{name}"),
        help="directory for the files, made if need be (default: %(default)s)",
    )


def _chosen_device(arguments: argparse.Namespace) -> "torch.device":
    """That of ``--device``, else CUDA's if there is one."""
    import torch

    device: torch.device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


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


def _depth(text: str) -> int:
    return _whole_number(text, 2, None)


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


if __name__ == "__main__":
    sys.exit(main())
