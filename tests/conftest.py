"""Small networks, small data, and a way to run the scripts inside the test process."""

import os

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "PROCESSES": "1",
}  # before PyTorch looks for GPUs; processes have tests of their own

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adaptive_inference.policies import Point, Policy
from image_data import synthetic
from models import Description, ExitNetwork, count_operations
from models.description import DataInfo
from models.network import to_config
from settings.command_line import parse

# What a scheduler, torchrun or the user's shell may have set.
INHERITED = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("DATA_ROOT", "GPUS", "SAVE"),
}
for variable in list(os.environ):
    if variable in INHERITED or variable.startswith("TORCHELASTIC_"):
        del os.environ[variable]

# Networks this small are slower on several threads, much slower beside another busy process.
torch.set_num_threads(1)

TINY_NETWORK = {"num_blocks": 3, "base": 1, "step": 1, "num_channels": 4, "growth_rate": 4, "num_classes": 10}
TINY_DEMO = {"train": 192, "test": 96}
TINY_MSDNET_FLAGS = ["--nBlocks", "3", "--nChannels", "4", "--growthRate", "4"]
TINY_TRAINING = [
    *("--batch-size", "32", "--val-size", "64", "--epochs", "1", "--lr", "0.05", "--amp", "off"),
]
TINY_FLAGS = [*TINY_MSDNET_FLAGS, *TINY_TRAINING]
TINY_STAGE_2 = ["--epochs", "1", "--batch-size", "32", "--amp", "off"]


def describe(network: ExitNetwork, image_size: int = 32) -> Description:
    """A description of a small network."""
    return Description(
        to_config(network),
        data=DataInfo(
            name="demo",
            class_names=[f"class {i}" for i in range(network.num_classes)],
            image_size=image_size,
            crop_share=1.0,
            interpolation="bilinear",
            mean=[0.5] * 3,
            std=[0.25] * 3,
            num_training_images=100,
            fingerprint="0" * 16,
        ),
        operations=count_operations(network, image_size),
        stage="IMTA",
        title="test",
        recipe={"data": "demo", "epochs": 1, "growth_factors": [1, 2, 4]},
        seed=1,
        commit=None,
        epoch=3,
        accuracy={"val_acc1": [50.0]},
    )


def policy_point(
    p: int, thresholds: list[float], accuracy: float, operations: float, shares: list[float], **policy: Any
) -> Point:
    """A point of the geometric rule; ``policy`` are further arguments of its policy."""
    return Point(Policy(tuple(thresholds), **policy), accuracy, operations, tuple(shares), number=p)


@pytest.fixture(autouse=True)
def _own_seed_and_settings(monkeypatch):
    # What --amp auto chooses depends on the processor, and 16 bits round by the size of a batch.
    monkeypatch.setattr("engine.auto.fastest_dtype", lambda *_: None)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_demo(monkeypatch):
    """The demo data set with few images."""
    monkeypatch.setattr(synthetic, "DEMO_IMAGES", TINY_DEMO)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Finished runs of both stages in the folders GE and IMTA, to look at and to copy."""
    import train_GE
    import train_IMTA

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "DEMO_IMAGES", TINY_DEMO)
        assert train_GE.main(["--save", str(folder / "GE"), *TINY_FLAGS]) == 0
        assert (
            train_IMTA.main(
                ["--pretrained", str(folder / "GE"), "--save", str(folder / "IMTA"), *TINY_STAGE_2]
            )
            == 0
        )
    return folder


def make_images(folder: Path, names: list[str], **counts: int) -> Path:
    """32x32 images in ``folder``: PART/NAME/*.png, so many of each name in each part."""
    generator = torch.Generator().manual_seed(0)
    for part, count in counts.items():
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Images of three classes: train/CLASS/*.png and test/CLASS/*.png."""
    return make_images(tmp_path / "images", ["ant", "bee", "cat"], train=20, test=5)


CPU = torch.device("cpu")
FOLDER = [
    *("--data", "folder", "--image-size", "32", "--val-size", "12"),
    *("--batch-size", "8", "--augment", "standard"),
]


def folder_settings(root: Path, *flags: str) -> Namespace:
    """Return settings for the images of ``image_folder``."""
    return parse("GE", [*FOLDER, "--data-root", str(root), *flags]).settings()
