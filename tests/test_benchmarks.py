"""The benchmarks run and print what their readers look for. No figure is checked, as machines differ."""

import functools
import sys

import pytest

from benchmarks import early_exit, other_library, reading_speed, start_up, time_to_exit, training_speed
from benchmarks.timing import median_seconds
from engine.checkpoint import save_network
from models import MSDNet
from models.description import Split
from tests.conftest import TINY_NETWORK, describe

TINY = ["--images", "48", "--batch-size", "8", "--steps", "1", "--rounds", "1"]


@pytest.mark.slow
def test_training_speed(capsys):
    """Both sides of both stages, each in processes of its own."""
    assert training_speed.main([*TINY, "--what", "speed", "busy", "memory"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "stage 1, images/s: plain loop",
        "stage 2, images/s: plain loop",
        "ours / plain loop",
        "  ours: beside a busy core / quiet",
        "  ours: peak memory of all processes",
    ):
        assert line in printed


def test_reading_speed(capsys):
    assert reading_speed.main(["--images", "96", "--rounds", "1", "--workers", "2"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "1 thread",
        "2 threads",
        "2 processes",
    ]


@pytest.mark.slow
def test_start_up(capsys):
    assert start_up.main(["--files", "100", "--rounds", "1", "--image-size", "72"]) == 0
    assert "100 files: first step after" in capsys.readouterr().out


@pytest.mark.slow
def test_time_to_exit(capsys):
    tiny = ["--archs", "mobilenet_v3_small", "--image-size", "32", "--batch-sizes", "2", "--rounds", "1"]
    assert time_to_exit.main(tiny) == 0
    assert "  to exit 4: " in capsys.readouterr().out


def test_other_library_is_optional(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "earlyon", None)
    assert other_library.main(["--images", "4", "--image-size", "32", "--rounds", "1"]) == 2
    assert "pip install earlyon==0.3.0" in capsys.readouterr().err


@pytest.mark.parametrize("with_onnx", [False, True])
def test_early_exit(tmp_path, capsys, monkeypatch, with_onnx):
    network = MSDNet(**{**TINY_NETWORK, "num_blocks": 2}).eval()
    save_network(tmp_path / "tiny.safetensors", network, describe(network), Split.unknown())
    monkeypatch.setattr(early_exit, "median_seconds", functools.partial(median_seconds, least=0.001))
    monkeypatch.setattr(early_exit, "fastest_dtype", lambda *_, **__: None)
    if with_onnx:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    else:
        monkeypatch.setitem(sys.modules, "onnx_predictor", None)
    flags = ["--checkpoint", str(tmp_path / "tiny.safetensors"), "--repeats", "1", "--threads", "1"]
    assert early_exit.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("MSDNet, 2 exits, 32 pixels, on 1 CPU threads\n")
    for line in (
        "folded, float32: time of budgeted prediction",
        "  batch 1: every exit ",
        " % of the operations: ",
        "folded, channels-last, float32 / plain, batch 64",
        "ONNX Runtime, " if with_onnx else "ONNX Runtime: not measured",
    ):
        assert line in printed


@pytest.mark.parametrize(
    ("benchmark", "flags", "words"),
    [
        (early_exit, ["--threads", "0"], "0 is not allowed; at least 1"),
        (early_exit, ["--repeats", "0"], "0 is not allowed; at least 1"),
        (early_exit, ["--device", "cuda", "--threads", "1"], "PyTorch finds no GPU here"),
        (time_to_exit, ["--archs", "resnet81", "--threads", "1"], "did you mean resnet18"),
        (time_to_exit, ["--batch-sizes", "0"], "0 is not allowed; at least 1"),
        (other_library, ["--images", "0"], "0 is not allowed; at least 1"),
        (other_library, ["--image-size", "1", "--threads", "1"], "images of 1 pixels are too small"),
        (reading_speed, ["--images", "64", "--workers", "2"], "2 workers need more than 64"),
        (training_speed, ["--rounds", "0"], "0 is not allowed; at least 1"),
    ],
)
def test_a_mistake_is_one_line(capsys, benchmark, flags, words):
    try:
        status = benchmark.main(flags)
    except SystemExit as ended:
        status = ended.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert words in line
