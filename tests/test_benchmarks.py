"""The programs that measure: they run, and print what their readers look for. No figure is checked, machines differ."""

import pytest
import torch
from PIL import Image

from benchmarks import image_decoding, training_speed

TINY = ["--threads", "1", "--images", "48", "--batch-size", "8", "--steps", "1", "--rounds", "1", "--workers", "0"]


@pytest.fixture(autouse=True)
def _own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_training_speed(capsys):
    """Both sides of both stages in one process."""
    assert training_speed.main([*TINY, "--what", "stage2", "loading", "scaling", "schedule"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "stage 1: plain loop",
        "stage 2: plain loop",
        "ours / plain loop",
        "stage 2 / stage 1, both ours",
        "stage 2: augmentation and loading / step",
        "slowest / fastest",
        "published schedule at batch 48",
    ):
        assert line in printed


def test_training_speed_memory_and_startup(capsys, monkeypatch):
    """Peak memory, here without processes of their own, and the start of the program itself."""
    monkeypatch.setattr(training_speed, "_in_new_process", lambda function, *arguments: function(*arguments))
    assert training_speed.main([*TINY, "--what", "stage1", "memory", "startup"]) == 0
    printed = capsys.readouterr().out
    assert "  stage 1, ours: " in printed
    assert "start-up to the first step, 48 images, in seconds" in printed


def test_training_speed_passes_flags_on(capsys):
    """What follows -- reaches our side, a mistake in it ends as in the training programs."""
    with pytest.raises(SystemExit) as stopped:
        training_speed.main([*TINY, "--what", "stage1", "--", "--no-such-flag"])
    assert stopped.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_training_speed_refuses_what_it_cannot_measure(capsys):
    assert training_speed.main(["--images", "8", "--batch-size", "16"]) == 2
    assert "--batch-size 16" in capsys.readouterr().err


def test_image_decoding(tmp_path, capsys):
    """Made-up photographs, then a folder's own; a way that a library is missing for is left out."""
    assert image_decoding.main(["--size", "300", "250", "--limit", "2", "--repeat", "1"]) == 0
    Image.new("RGB", (240, 600)).save(tmp_path / "long.JPEG")
    Image.new("L", (500, 480)).save(tmp_path / "grey.jpg")
    assert image_decoding.main(["--images", str(tmp_path), "--repeat", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 JPEGs of " in printed
    assert printed.count("PIL, transforms v1 to normalised floats (plain)") == 2
    assert printed.count("ours: PIL reduced to the crop, PyTorch resizes its bytes") == 2


def test_image_decoding_names_an_empty_folder(tmp_path, capsys):
    assert image_decoding.main(["--images", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
