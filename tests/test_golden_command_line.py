"""Golden checkpoints of the released code, as files, through the command line."""

import pytest
import torch

import train_GE
import train_IMTA
from adaptive_inference import read_policy
from dataloader import load_data
from engine import convert
from engine.report import read_csv
from models import load_released
from settings.command_line import parse
from tests.conftest import make_images
from tests.golden import STAGE_1, STAGE_2, golden_case


@pytest.fixture(scope="module")
def data_flags(tmp_path_factory):
    """Flags of 100 classes with an image each."""
    folder = make_images(
        tmp_path_factory.mktemp("images"), [f"{label:02d}" for label in range(100)], train=1, test=1
    )
    return ["--data", "cifar100", "--data-root", str(folder), "--val-size", "20", "--batch-size", "16"]


@pytest.fixture
def converted(data_flags, tmp_path, monkeypatch):
    """Convert a golden checkpoint, smaller than the published ones, to network.safetensors here."""
    monkeypatch.chdir(tmp_path)

    def convert_golden(name):
        case = golden_case(name)
        torch.save(case["checkpoint"], "released.pth.tar")
        names = ("nBlocks", "base", "step", "stepmode", "nChannels", "growthRate")
        flags = [word for name in names for word in (f"--{name}", str(case["config"][name]))]
        folder = data_flags[data_flags.index("--data-root") + 1]
        assert (
            convert.main(["released.pth.tar", "network.safetensors", "--classes", f"{folder}/test", *flags])
            == 0
        )

    return convert_golden


@pytest.mark.parametrize(
    ("name", "program"), [(STAGE_1[0], train_GE), (STAGE_1[1], train_GE), (STAGE_2, train_IMTA)]
)
def test_evaluated_as_it_is(data_flags, converted, tmp_path, name, program):
    converted(name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "reference.safetensors").write_bytes(b"of an earlier evaluation")
    for mode in ("anytime", "dynamic"):
        flags = ["--evaluate-from", "network.safetensors", "--evalmode", mode, *data_flags, "--save", "out"]
        assert program.main(flags) == 0
    data = load_data(parse("GE", data_flags).settings(), torch.device("cpu"))
    network = load_released(golden_case(name)["checkpoint"], **golden_case(name)["config"])
    with torch.no_grad():
        correct = sum(
            torch.stack(network(images)).argmax(2).eq(targets).sum(1) for images, targets in data.test
        )
    assert [
        row["acc1"] for row in read_csv(tmp_path / "out" / "anytime.csv")
    ] == correct.tolist()  # of 100 images, so in percent
    assert len(read_csv(tmp_path / "out" / "budgeted.csv")) == 40
    curve = read_policy(tmp_path / "out" / "policy.json")
    # A released file remembers no held-out images: nothing but the full network can be promised.
    assert [point.policy.runs_everything for point in curve.points if point.rule == "certified"] == [True]
    assert not (tmp_path / "out" / "reference.safetensors").exists()


def test_starts_stage_2(data_flags, converted, tmp_path):
    converted(STAGE_1[1])
    flags = ["--pretrained", "network.safetensors", "--save", "IMTA", "--epochs", "1", *data_flags]
    assert train_IMTA.main(flags) == 0
    assert len(read_csv(tmp_path / "IMTA" / "anytime.csv")) == 3
    # The images may have trained the released network.
    assert not (tmp_path / "IMTA" / "reference.safetensors").exists()


def test_a_released_checkpoint_names_the_command(data_flags, tmp_path, capsys):
    torch.save(golden_case(STAGE_1[1])["checkpoint"], tmp_path / "released.pth.tar")
    path = str(tmp_path / "released.pth.tar")
    assert train_IMTA.main(["--pretrained", path, "--save", str(tmp_path / "IMTA"), *data_flags]) == 2
    assert f"python -m engine.convert {path}" in capsys.readouterr().err
