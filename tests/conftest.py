"""Small networks, small data, and a way to run the scripts inside the test process."""

import os

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PROCESSES": "1"}  # before PyTorch looks for GPUs; processes have tests of their own

import pytest
import torch

import datasets

# Networks this small are slower on several threads, much slower beside another busy process.
torch.set_num_threads(1)

TINY_NETWORK = {"num_blocks": 3, "base": 1, "step": 1, "num_channels": 4, "growth_rate": 4, "num_classes": 10}
TINY_DEMO = {"train": 192, "test": 96}
TINY_FLAGS = [
    *("--nBlocks", "3", "--nChannels", "4", "--growthRate", "4"),
    *("--batch-size", "32", "--val-size", "64", "--epochs", "1", "--lr", "0.05", "--amp", "off"),
]


@pytest.fixture(autouse=True)
def _own_seed_and_settings(monkeypatch):
    # What --amp auto chooses depends on the processor, and 16 bits round by the size of a batch.
    monkeypatch.setattr("engine.stage.half_precision", lambda device: None)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_demo(monkeypatch):
    """The demo data set with few images."""
    monkeypatch.setattr(datasets, "DEMO_IMAGES", TINY_DEMO)


@pytest.fixture
def image_folder(tmp_path):
    """32x32 images of three classes: train/CLASS/*.png and test/CLASS/*.png."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 5)):
        for name in ("ant", "bee", "cat"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return tmp_path / "images"
