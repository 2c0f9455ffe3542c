"""The command ``resnet``: its manners, what it takes, and that its report is that of the network it was asked about."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchdiffeq_symplectic.__main__ import main
from torchdiffeq_symplectic.resnet import equivalence_report

EXTRA = ["matplotlib", "rich", "sklearn"]
SMALL = ["--arch", "resnet18", "--stage", "layer1", "--size", "16", "--batch", "2", "--device", "cpu"]

needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in [*EXTRA, "torchvision"]),
    reason='needs torchvision and the extra "resnet"',
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of --out is below the working directory."""
    monkeypatch.chdir(tmp_path)


def status(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as exit_:
        main(["resnet", *arguments])
    return exit_.value.code


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of an error of usage."""
    assert status(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@dataclass
class Run:
    """What a run left behind."""

    out: Path
    terminal: str
    progress: str
    content: dict[str, Any]


def run(arguments: list[str], out: Path) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as terminal, contextlib.redirect_stderr(io.StringIO()) as progress:
        assert main(["resnet", *arguments, "--out", str(out)]) == 0
    content = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return Run(out, " ".join(terminal.getvalue().split()), progress.getvalue(), content)


def network(**keywords: Any) -> nn.Module:
    """A resnet18 of weights that no seed of the command gives."""
    from torchvision.models import resnet18

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123_456)
        model: nn.Module = resnet18(**keywords)
        return model


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def distance_of(model: Any, batch: torch.Tensor) -> list[float]:
    """Of layer1, on what the layers before it make of ``batch``, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(batch))))
    return equivalence_report(model.layer1, x).distance


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on random weights for all tests; the global state must be as it was before."""
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    made = run(["--arch", "resnet34", "--stage", "layer2", *SMALL[4:]], tmp_path_factory.mktemp("resnet") / "made")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    return made


@needs_extra
def test_it_writes_a_picture_and_the_dictionary(fresh: Run) -> None:
    assert (fresh.out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert fresh.content["blocks"] == 3
    assert len(fresh.content["distance"]) == 4
    assert fresh.content["settings"]["arch"] == "resnet34"


@needs_extra
def test_it_prints_the_report(fresh: Run) -> None:
    assert f"Verdict: {fresh.content['verdict']}" in fresh.terminal
    assert f"{fresh.content['distance'][-1]:.3g}" in fresh.terminal
    assert f"{fresh.out / 'report.json'}" in fresh.terminal.replace("- ", "-")
    assert fresh.progress.count("100%") == 3


@needs_extra
def test_it_says_which_block_is_left_out_and_why(fresh: Run) -> None:
    assert "4 blocks; block 0 turns (64, 4, 4) into (128, 2, 2), so it is left out" in fresh.terminal


@needs_extra
def test_random_weights_are_in_training_mode(fresh: Run) -> None:
    assert "random weights of seed 0, in training mode" in fresh.terminal


@needs_extra
def test_a_stage_that_keeps_its_shape_is_whole(tmp_path: Path) -> None:
    found = run([*SMALL, "--interpolate", "weights", "--mode", "eval"], tmp_path)
    assert found.content["blocks"] == 2
    assert "left out" not in found.terminal
    assert found.content["interpolate"] == "weights"
    assert "in evaluation mode" in found.terminal


CHECKPOINTS: dict[str, Callable[[nn.Module], object]] = {
    "state": lambda model: model.state_dict(),
    "data parallel": lambda model: {f"module.{name}": value for name, value in model.state_dict().items()},
    "compiled": lambda model: {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
    "training script's": lambda model: {"epoch": 3, "state_dict": model.state_dict(), "best": 0.5},
    "Lightning's": lambda model: {"state_dict": {f"net.{name}": value for name, value in model.state_dict().items()}},
    "whole network": lambda model: model,
    "whole network, parallel": lambda model: nn.DataParallel(model),
    "network in a dictionary": lambda model: {"model": model},
}


@needs_extra
@pytest.mark.parametrize("form", CHECKPOINTS)
def test_weights_are_taken_from_a_checkpoint(form: str, tmp_path: Path) -> None:
    from torchdiffeq_symplectic.resnet.architectures import build, load_weights

    saved, loaded = network(num_classes=7), build("resnet18", seed=0)
    torch.save(CHECKPOINTS[form](saved), tmp_path / "checkpoint.pt")
    allowed = set(torch.serialization.get_safe_globals())
    load_weights(loaded, tmp_path / "checkpoint.pt", "layer1")
    assert set(torch.serialization.get_safe_globals()) == allowed
    expected = saved.state_dict()
    for name, value in loaded.state_dict().items():
        if name.startswith(("conv1.", "bn1.", "layer1.")):
            assert torch.equal(value, expected[name])


@needs_extra
def test_weights_of_another_network_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torchvision.models import resnet50

    torch.save(resnet50().state_dict(), tmp_path / "checkpoint.pt")
    message = refusal([*SMALL, "--weights", str(tmp_path / "checkpoint.pt")], capsys)
    assert "argument --weights" in message
    assert "layer1.0.conv1.weight: (64, 64, 3, 3) in the network, (64, 64, 1, 1) in the file" in message


class Malicious:
    """Loading it unsafely would call ``print``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@needs_extra
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "no checkpoint that can be loaded safely"),
        (b"weights", "no checkpoint that can be loaded safely"),
        (Malicious(), "no checkpoint that can be loaded safely"),
        ([1, 2], "holds neither a network nor its state"),
        ({"epoch": 3}, "holds neither a network nor its state"),
        ({"other": torch.ones(2)}, "does not fit the network up to layer1"),
    ],
    ids=["missing", "empty", "text", "malicious", "list", "dictionary", "names"],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    content: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert status([*SMALL, "--weights", str(path)]) == 2
    out, err = capsys.readouterr()
    assert f"argument --weights: {path}" in err
    assert words in err
    assert out == ""


@needs_extra
@pytest.mark.parametrize("ending", [".pt", ".npy"])
def test_weights_and_arrays_are_used_as_they_are(ending: str, tmp_path: Path) -> None:
    import numpy

    model, path = network(), tmp_path / f"images{ending}"
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    if ending == ".npy":
        numpy.save(path, images(3).numpy())
    else:
        torch.save(images(3), path)
    found = run([*SMALL, "--weights", str(tmp_path / "checkpoint.pt"), "--data", str(path)], tmp_path)
    assert "in evaluation mode" in found.terminal
    assert found.content["distance"] == pytest.approx(distance_of(model, images(3)[:2]), rel=1e-6)


def write_picture(path: Path, width: int, height: int) -> torch.Tensor:
    from PIL import Image

    pixels = torch.arange(width * height * 3).remainder(251).to(torch.uint8).reshape(height, width, 3)
    Image.fromarray(pixels.numpy()).save(path)
    return pixels.permute(2, 0, 1)


@needs_extra
def test_pictures_are_cut_and_normalised_as_imagenets_are(tmp_path: Path) -> None:
    from torchdiffeq_symplectic.resnet.images import read_images

    (tmp_path / "below").mkdir()
    pixels = write_picture(tmp_path / "below" / "b.png", 40, 32)
    write_picture(tmp_path / "a.png", 32, 50)
    (tmp_path / "notes.txt").write_text("no picture")
    batch = read_images(tmp_path, 5, 32)
    assert batch.shape == (2, 3, 32, 32)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels[:, :, 4:36] / 255 - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(batch[1], expected)
    torch.testing.assert_close(read_images(tmp_path / "below" / "b.png", 1, 32)[0], expected)
    torch.save(pixels[None], tmp_path / "whole.pt")
    torch.testing.assert_close(read_images(tmp_path / "whole.pt", 1, 32)[0][:, :, 4:36], expected)


@needs_extra
def test_photographs_depend_on_the_seed_and_on_nothing_else() -> None:
    from torchdiffeq_symplectic.resnet.images import photographs

    first = photographs(3, 24, seed=0)
    assert first.shape == (3, 3, 24, 24)
    assert torch.equal(first, photographs(3, 24, seed=0))
    assert not torch.equal(first, photographs(3, 24, seed=1))
    assert 0.3 < float(first.std()) < 2


@needs_extra
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.png", None, "cannot be read"),
        ("missing.npy", None, "cannot be read"),
        ("picture.png", b"text", "is no image"),
        ("array.pt", b"text", "holds no array of numbers"),
        ("array.npy", b"text", "holds no array of numbers"),
        ("directory", None, "has no images"),
        ("flat.pt", torch.ones(2, 3), "must hold an array of shape (images, channels, height, width), but has (2, 3)"),
        ("states.pt", {"a": torch.ones(2)}, "but has dict"),
        ("grey.pt", torch.ones(1, 1, 8, 8, dtype=torch.uint8), "must have 3 channels"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_data_that_is_none_is_refused(
    name: str, content: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "directory":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    message = refusal([*SMALL, "--data", str(path)], capsys)
    assert message.startswith(f"argument --data: {path}")
    assert words in message


@needs_extra
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--arch", "resnet1O1"],
            "argument --arch: torchvision has no network 'resnet1O1' for images; it has resnet101",
        ),
        (["--arch", "fasterrcnn_resnet50_fpn"], "argument --arch: torchvision has no network"),
        (["--arch", "resnet18", "--stage", "layer9"], "there are layer1, layer2, layer3, layer4"),
        (["--arch", "resnet18", "--stage", "conv1"], "argument --stage: 'conv1' is no sequence of blocks"),
        (["--arch", "resnet18", "--stage", ""], "argument --stage: '' is no sequence of blocks"),
        (["--arch", "resnet18", "--stage", "layer2", "--size", "32"], "at least 2 blocks that keep the shape"),
        (["--arch", "vit_b_32", "--stage", "encoder.layers", "--size", "32"], "argument --size: the network refuses"),
    ],
)
def test_a_network_or_stage_that_is_not_there(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(["--device", "cpu", *arguments], capsys)


@needs_extra
def test_dropout_in_training_mode_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "mobilenet_v3_small", "--stage", "classifier", "--size", "32", "--device", "cpu"]
    message = refusal(arguments, capsys)
    assert "argument --stage" in message


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--batch", "0"), ("--size", "-3"), ("--seed", "x"), ("--device", "abacus"), ("--mode", "test")],
)
def test_a_bad_value_names_its_argument(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal([argument, value], capsys)
    assert f"argument {argument}" in message
    assert value in message


@pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")
def test_missing_torchvision_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install torchvision" in refusal(["--out", str(tmp_path)], capsys)


@needs_extra
def test_missing_photographs_are_the_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["resnet", *SMALL, "--out", str(tmp_path)]) == 1
    assert 'pip install "torchdiffeq-symplectic[resnet]"' in capsys.readouterr().err


@pytest.mark.parametrize("module", ["rich", pytest.param("matplotlib", marks=pytest.mark.slow)])
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_a_missing_extra_is_named(module: str, tmp_path: Path) -> None:
    code = (
        f"import sys\nsys.modules[{module!r}] = None\n"
        f"from torchdiffeq_symplectic.__main__ import main\nsys.exit(main(['resnet', '--out', {str(tmp_path)!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert 'pip install "torchdiffeq-symplectic[resnet]"' in result.stderr
    assert module in result.stderr


def test_help_tells_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "--arch",
        "--stage",
        "--weights",
        "--data",
        "--batch",
        "--size",
        "--mode",
        "--seed",
        "--device",
        "--out",
    ):
        assert word in text


@needs_extra
@pytest.mark.slow
def test_a_fresh_resnet101_is_no_ode(tmp_path: Path) -> None:
    found = run(["--device", "cpu"], tmp_path)
    assert found.content["blocks"] == 22
    assert found.content["verdict"] == "not an ODE"
    assert found.content["gradient_error"] < 1e-12
    assert all(error["cosine"] < 0.5 for error in found.content["memory_free_error"].values())
