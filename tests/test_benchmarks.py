"""The programs that measure: they run, and print what their readers look for. No figure is checked, machines differ."""

import pytest

from benchmarks import training_speed

TINY = ["--images", "48", "--batch-size", "8", "--steps", "1", "--rounds", "1", "--workers", "0"]


def test_training_speed(capsys):
    """Both sides of both stages, each in processes of its own."""
    assert training_speed.main([*TINY, "--what", "speed", "busy", "memory"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "stage 1, images/s: plain loop",
        "stage 2, images/s: plain loop",
        "ours / plain loop",
        "ours: beside a busy core / quiet",
        "peak memory of all processes",
    ):
        assert line in printed


def test_training_speed_of_another_network(capsys):
    flags = ["--network", "imagenet", "--stages", "1", "--what", "speed"]
    assert training_speed.main([*TINY, *flags, "--", "--nBlocks", "1", "--growthRate", "4", "--nChannels", "4"]) == 0
    assert "stage 1, images/s: plain loop" in capsys.readouterr().out


def test_training_speed_passes_flags_on(capsys):
    """What follows -- reaches our side, a mistake in it ends as in the training programs."""
    with pytest.raises(SystemExit) as stopped:
        training_speed.main([*TINY, "--what", "speed", "--", "--no-such-flag"])
    assert stopped.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_training_speed_refuses_what_it_cannot_measure(capsys):
    assert training_speed.main(["--images", "8", "--batch-size", "16"]) == 2
    assert "--batch-size 16" in capsys.readouterr().err
