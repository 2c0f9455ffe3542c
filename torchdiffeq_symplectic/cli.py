"""The command line: thin functions over :mod:`torchdiffeq_symplectic.experiments`. Needs the extra ``cli``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from torchdiffeq_symplectic import MODES, __version__

# Each command imports what it needs when it runs, so that help comes at once.

__all__ = ["app"]

app = typer.Typer(
    help="Exact gradients of neural ODEs in little memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study = typer.Typer(
    help="Run an experiment on residual networks and ODEs, in a minute or two on two cores. "
    "It prints a table and writes a picture and a CSV file.",
    no_args_is_help=True,
)
app.add_typer(study, name="study")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchdiffeq-symplectic {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Exact gradients of neural ODEs in little memory."""


def _device(text: str) -> torch.device:
    """The device of that name; "auto" is CUDA's if there is one, else the CPU."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{text!r} is not a known device; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{text!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _writable(path: Path) -> Path:
    """``path``, if it is a directory or can be made one; it is made when there is something to write."""
    nearest = path
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise typer.BadParameter(f"{nearest} is not a directory")
    return path


def _depths(text: str) -> tuple[int, ...]:
    """Numbers of blocks, in their order."""
    try:
        depths = sorted({int(part) for part in text.replace(",", " ").split()})
    except ValueError:
        depths = []
    if not depths or depths[0] < 2:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers of at least 2, such as 16,32,64")
    return tuple(depths)


Device = Annotated[Any, typer.Option(parser=_device, metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")]
Out = Annotated[Path, typer.Option(callback=_writable, help="Directory for the files, made if need be.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything that is drawn.")]
Depths = Annotated[Any, typer.Option(parser=_depths, metavar="N,N,...", help="Numbers of blocks.")]


def _known(name: str, values: Iterable[str], option: str) -> None:
    """Refuse a ``name`` that is none of ``values``, with the ones that are close to it."""
    known = list(values)
    if name not in known:
        close = difflib.get_close_matches(name, known)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known are {', '.join(known)}."
        raise typer.BadParameter(f"{name!r} is unknown. {hint}", param_hint=option)


@app.command()
def check(
    host: Annotated[
        str, typer.Option(help="torchdiffeq or torchdyn only.", show_default="all that are installed")
    ] = "",
    mode: Annotated[list[str] | None, typer.Option(help="This mode only; may be repeated.", show_default="all")] = None,
    dtype: Annotated[Literal["float64", "float32"], typer.Option(help="Of states, parameters and times.")] = "float64",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write a JSON file.")] = None,
) -> None:
    """Measure whether gradients are exact with the installed versions.

    Compares every method of every installed host, under every mode, with backpropagation through the host's own
    solve. Takes less than a minute. Exits with 1 if a gradient that should be exact is not.
    """
    from rich.console import Console

    from torchdiffeq_symplectic.experiments import check
    from torchdiffeq_symplectic.experiments.environment import one_thread, versions

    for name in mode or []:
        _known(name, MODES, "--mode")
    if host:
        _known(host, check.HOSTS, "--host")
        if not check.HOSTS[host].installed:
            raise typer.BadParameter(f"{host} is not installed; pip install {host}", param_hint="--host")
    if json_file is not None:
        _writable(json_file.parent)
        if json_file.is_dir():
            raise typer.BadParameter(f"{json_file} is a directory", param_hint="--json")
    hosts = [one for one in check.HOSTS.values() if one.installed and host in ("", one.name)]
    precision: torch.dtype = getattr(torch, dtype)
    console, rows = Console(), []
    with one_thread(), console.status("importing") as status:
        for row in check.measure(hosts, check.variants(mode or None), precision):
            status.update(f"{row.host}: {row.method}")
            rows.append(row)
    check.report(rows, versions(), precision, console)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(check.to_dict(rows, versions(), precision), indent=2, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")
    raise typer.Exit(0 if check.is_exact(rows) else 1)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 800,
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = Path("torchdiffeq-symplectic-demo"),
) -> None:
    """Train a normalizing flow on a real table, then compare the ways to its gradient.

    Takes about a minute on two CPU cores. Writes demo.png and demo.csv.
    """
    from torchdiffeq_symplectic.experiments import demo

    demo.run(device, seed, steps, out)


@app.command()
def benchmark(
    problems: Annotated[list[str] | None, typer.Argument(metavar="[PROBLEM]...", show_default="all")] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="A contender beside backpropagation, by its name in the table; may be repeated.", show_default="all"
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there already.")] = False,
    readme: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Put the results between its <!-- benchmark --> lines."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 5,
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = Path("torchdiffeq-symplectic-benchmark"),
) -> None:
    """Measure the ways to a gradient against each other.

    Measures gradient error, peak memory, time and field evaluations of backpropagation, upstream's adjoints, this
    package's modes, and torchdyn and other packages where they are installed. Each case is kept at once: after an
    interruption the same command goes on. All problems take about an hour on one CPU core; OMP_NUM_THREADS=1 makes
    times vary less.
    """
    from torchdiffeq_symplectic.experiments.benchmark import peers, publication, run
    from torchdiffeq_symplectic.experiments.benchmark.contenders import BACKPROPAGATION
    from torchdiffeq_symplectic.experiments.benchmark.problems import PROBLEMS
    from torchdiffeq_symplectic.experiments.benchmark.results import OtherRunError, Settings

    for name in problems or []:
        _known(name, PROBLEMS, "PROBLEM")
    installed = {contender.name: contender for contender in peers.installed()}
    for name in mode or []:
        _known(name, installed, "--mode")
    if readme is not None and not publication.has_place(readme):
        raise typer.BadParameter(
            f"{readme} lacks the lines {publication.OPENING} and {publication.CLOSING}", param_hint="--readme"
        )
    chosen = [one for name, one in installed.items() if not mode or name in (BACKPROPAGATION, *mode)]
    series = [one for name, one in PROBLEMS.items() if not problems or name in problems]
    try:
        finished = run.run(series, chosen, Settings.here(device, repeats, seed), out, fresh, readme)
    except OtherRunError as error:
        raise typer.BadParameter(f"{error}; choose another directory or --fresh", param_hint="--out") from error
    raise typer.Exit(0 if finished else 130)  # as shells have it after Ctrl-C


@app.command()
def resnet(
    arch: Annotated[str, typer.Option(help="torchvision's name of the network.")] = "resnet101",
    stage: Annotated[
        str, typer.Option(help="The module whose children are the blocks.", show_default="the longest")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Images that are used.")] = 4,
    size: Annotated[int, typer.Option(min=1, help="Their height and width in pixels.")] = 64,
    interpolate: Annotated[
        Literal["outputs", "weights", "piecewise"], typer.Option(help="What lies between two blocks.")
    ] = "outputs",
    device: Device = "auto",
    seed: Seed = 0,
    out: Out = Path("torchdiffeq-symplectic-resnet"),
) -> None:
    """Measure whether a stage of a residual network is a discretized ODE.

    The network has random weights and is in training mode; the images are parts of scikit-learn's photographs. For
    your own weights and images see the README of torchdiffeq_symplectic.resnet. Writes report.png and report.json.
    """
    from torchdiffeq_symplectic.experiments import resnet

    try:
        resnet.run(arch, stage, batch, size, interpolate, device, seed, out)
    except resnet.UnfitError as error:
        raise typer.BadParameter(str(error), param_hint=error.option) from error


STUDY_OUT = Path("torchdiffeq-symplectic-study")


def _run_study(name: str, out: Path, **settings: Any) -> None:
    from torchdiffeq_symplectic.experiments import studies

    studies.run(name, settings, out)


@study.command("depth")
def study_depth(
    depths: Depths = "16,32,64,128,256,512", device: Device = "cpu", seed: Seed = 0, out: Out = STUDY_OUT
) -> None:
    """How far networks are from the ODEs through their blocks, over depth."""
    _run_study("depth", out, depths=depths, device=device, seed=seed)


@study.command("memory-free")
def study_memory_free(
    depths: Depths = "8,16,32,64,128,256", device: Device = "cpu", seed: Seed = 0, out: Out = STUDY_OUT
) -> None:
    """How far memory-free gradients and states are from the exact ones, over depth."""
    _run_study("memory-free", out, depths=depths, device=device, seed=seed)


@study.command("training")
def study_training(
    depths: Depths = "4,8,16,32",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = STUDY_OUT,
) -> None:
    """Gradient and test error over depth during training, Euler and Heun, backpropagated and memory-free."""
    _run_study("training", out, depths=depths, epochs=epochs, device=device, seed=seed)


@study.command("linear")
def study_linear(
    depths: Depths = "16,32,64,128,256,512",
    steps: Annotated[int, typer.Option(min=1, help="Of gradient descent.")] = 60,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = STUDY_OUT,
) -> None:
    """Whether gradient descent keeps weights smooth in depth."""
    _run_study("linear", out, depths=depths, steps=steps, device=device, seed=seed)


@study.command("tied")
def study_tied(
    depths: Depths = "4,8,16,32,64,128",
    depth: Annotated[int, typer.Option(min=2, help="Blocks of the network that is trained.")] = 12,
    epochs: Annotated[int, typer.Option(min=1, help="Of each of the two stages.")] = 12,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = STUDY_OUT,
) -> None:
    """Train with tied weights, then refine untied and memory-free."""
    _run_study("tied", out, depths=depths, depth=depth, epochs=epochs, device=device, seed=seed)
