"""The command line on networks of torchvision: both stages, weights from a file, what is refused."""

from pathlib import Path

import pytest
import torch
import torchvision

import predict
import train_GE
import train_IMTA
from engine.checkpoint import load_saved
from models import load
from tests.compare import differences
from tests.conftest import make_images

ARCH = ["--arch", "mobilenet_v3_small", "--exits", "3"]
SMALL = [
    "--image-size",
    "72",
    "--batch-size",
    "8",
    "--val-size",
    "6",
    "--amp",
    "off",
    "--workers",
    "0",
    "--epochs",
    "1",
]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The working folder, with photos/ of three classes and weights of a mobilenet_v3_small in weights.pt."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos", ["ant", "bee", "cat"], train=8, test=2)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), "weights.pt")
    return ["--data-root", "photos", *SMALL]


def test_fine_tuning_both_stages_and_prediction(photos, capsys):
    assert train_GE.main([*photos, *ARCH, "--pretrained", "weights.pt", "--pretrained-lr-factor", "0"]) == 0
    saved = load_saved("save/finetune/GE", {})
    assert (saved.network.kind, saved.network.num_exits, saved.network.num_classes) == ("Backbone", 3, 3)
    data = saved.description.data
    assert (data.image_size, data.mean, data.std) == (72, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert saved.description.title == "mobilenet_v3_small + GE"
    before = torch.load("weights.pt")
    for name, parameter in saved.network.network.named_parameters():  # learning rate 0
        if not name.startswith("classifier.3"):
            assert torch.equal(parameter, before[name]), name
    assert (
        train_IMTA.main(
            ["--pretrained", "save/finetune/GE", "--epochs", "1", "--batch-size", "8", "--amp", "off"]
        )
        == 0
    )
    capsys.readouterr()
    assert predict.main(["photos/test", "--model", "save/finetune/IMTA"]) == 0
    assert load("save/finetune/IMTA").backbone.num_exits == 3


def test_a_run_started_again_from_its_weights_and_frozen(photos):
    assert train_GE.main([*photos, *ARCH, "--freeze", "backbone", "--save", "run"]) == 0
    assert train_GE.main([*photos, "--pretrained", "run", "--save", "again", "--lr", "1e-12"]) == 0
    first, again = load("run").state_dict(), load("again").state_dict()
    assert first.keys() == again.keys()


def test_dropout_is_a_function_of_the_step(photos, monkeypatch):
    flags = [*photos, *ARCH, "--optimizer", "adamw", "--epochs", "2"]
    assert train_GE.main([*flags, "--save", "whole"]) == 0
    torch.manual_seed(99)
    assert train_GE.main([*flags, "--save", "again"]) == 0
    assert [name for name in differences(Path("again"), Path("whole")) if "best" in name] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arch", "mobilenet_v3_smal"], "mobilenet_v3_small"),
        ([*ARCH, "--nBlocks", "3"], "--nBlocks is for --arch msdnet"),
        (["--exits", "3"], "--exits needs --arch"),
        (["--freeze", "backbone"], "another --arch"),
        ([*ARCH[:2], "--exits", "features.99"], "features.99"),
        ([*ARCH, "--pretrained", "missing.pt"], "missing.pt"),
    ],
)
def test_mistakes_are_one_line(photos, capsys, flags, words):
    try:
        status = train_GE.main([*photos, *flags, "--save", "new"])
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert (status, message.count("\n")) == (2, 1)
    assert words in message
