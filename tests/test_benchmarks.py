"""The benchmarks run and print what their readers look for. No figure is checked, as machines differ."""

import sys

import pytest

from benchmarks import other_library, reading_speed, start_up, time_to_exit, training_speed

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
    assert reading_speed.main(["--images", "64", "--rounds", "1", "--workers", "2"]) == 0
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
