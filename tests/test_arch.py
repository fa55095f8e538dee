"""The command line on networks of torchvision: both stages, weights from a file, what is refused."""

import pytest
import torch
import torchvision

import train_GE
from models import load
from tests.conftest import make_images

ARCH = ["--arch", "mobilenet_v3_small", "--exits", "3"]
FROZEN = ["--pretrained", "weights.pt", "--freeze", "backbone"]
SMALL = [
    *("--image-size", "72", "--batch-size", "8", "--val-size", "6", "--amp", "off", "--workers", "0"),
    *("--epochs", "1"),
]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The working folder, with photos/ of three classes and weights of a mobilenet_v3_small in weights.pt."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos", ["ant", "bee", "cat"], train=8, test=2)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), "weights.pt")
    return ["--data-root", "photos", *SMALL]


@pytest.mark.slow
def test_a_run_started_again_from_its_weights_and_frozen(photos):
    assert train_GE.main([*photos, *ARCH, *FROZEN, "--save", "run"]) == 0
    assert train_GE.main([*photos, "--pretrained", "run", "--save", "again", "--lr", "1e-12"]) == 0
    first, again = load("run"), load("again")
    # The network's own classifier was replaced, for three classes.
    kept = {
        name.removeprefix("network."): x
        for name, x in first.state_dict().items()
        if name.startswith("network.") and not name.startswith("network.classifier.")
    }
    weights = torch.load("weights.pt", weights_only=True)
    assert len(kept) > 100
    assert all(torch.equal(x, weights[name]) for name, x in kept.items())
    for (name, ours), theirs in zip(again.named_parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arch", "mobilenet_v3_smal"], "mobilenet_v3_small"),
        ([*ARCH, "--nBlocks", "3"], "--nBlocks is for --arch msdnet"),
        (["--exits", "3"], "--exits is for networks of torchvision and timm"),
        (["--freeze", "backbone"], "networks of torchvision and timm"),
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
