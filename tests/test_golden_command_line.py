"""Golden checkpoints of the released programs, as files, through the command line."""

from pathlib import Path

import pytest
import torch
from fixtures.make_fixtures import restore
from PIL import Image

import train_GE
import train_IMTA
from args import parse
from dataloader import load_data
from engine.report import read_csv
from models import load_released

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def hundred_classes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for label in range(100):
            folder = tmp_path / "images" / part / f"{label:02d}"
            folder.mkdir(parents=True)
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "0.png")
    return tmp_path / "images"


def network_flags(case):
    """Flags of the network of a golden case, which is smaller than the published ones."""
    names = ("nBlocks", "base", "step", "stepmode", "nChannels", "growthRate")
    return [word for name in names for word in (f"--{name}", str(case["config"][name]))]


@pytest.mark.parametrize(
    ("name", "program"),
    [("msdnet_cifar100_lin_grow", train_GE), ("msdnet_ge_cifar100_even", train_GE), ("imta_cifar100_even", train_IMTA)],
)
def test_evaluated_as_it_is(hundred_classes, tmp_path, name, program):
    case = restore(FIXTURES / f"{name}.pt")
    file = tmp_path / "released.pth.tar"
    torch.save(case["checkpoint"], file)
    data_flags = ["--data", "cifar100", "--data-root", str(hundred_classes), "--val-size", "20", "--batch-size", "16"]
    for mode in ("anytime", "dynamic"):
        assert (
            program.main(
                ["--evaluate-from", str(file), "--evalmode", mode, *data_flags, *network_flags(case), "--save", str(tmp_path / "out")]
            )
            == 0
        )
    data = load_data(parse("GE", data_flags).settings(), torch.device("cpu"))
    network = load_released(case["checkpoint"], **case["config"])
    with torch.no_grad():
        correct = sum(torch.stack(network(images)).argmax(2).eq(targets).sum(1) for images, targets in data.test)
    assert [row["acc1"] for row in read_csv(tmp_path / "out" / "anytime.csv")] == correct.tolist()  # of 100 images, so in percent
    assert len(read_csv(tmp_path / "out" / "budgeted.csv")) == 40


def test_starts_stage_2(hundred_classes, tmp_path):
    file = tmp_path / "msdnet_ge.pth.tar"
    case = restore(FIXTURES / "msdnet_ge_cifar100_even.pt")
    torch.save(case["checkpoint"], file)
    flags = ["--data", "cifar100", "--data-root", str(hundred_classes), "--val-size", "20", "--batch-size", "16", "--epochs", "1"]
    assert train_IMTA.main(["--pretrained", str(file), "--save", str(tmp_path / "IMTA"), *flags, *network_flags(case)]) == 0
    assert len(read_csv(tmp_path / "IMTA" / "anytime.csv")) == 3


def test_a_contradicting_flag_is_named(hundred_classes, tmp_path, capsys):
    file = tmp_path / "msdnet.pth.tar"
    torch.save(restore(FIXTURES / "msdnet_cifar100_lin_grow.pt")["checkpoint"], file)
    assert train_GE.main(["--evaluate-from", str(file), "--evalmode", "--nBlocks", "7", "--save", str(tmp_path / "out")]) == 2
    assert "the file has 4 exits, --nBlocks says 7" in capsys.readouterr().err
