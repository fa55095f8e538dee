"""The programs that measure: they run, and print what their readers look for. No figure is checked, machines differ."""

from benchmarks import training_speed

TINY = ["--images", "48", "--batch-size", "8", "--steps", "1", "--rounds", "1"]


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
