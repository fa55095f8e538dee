"""The stage-2 network: links, what learns, what is frozen."""

import pytest
import torch
from torch import nn

from models import IMTA, Backbone, MSDNet
from models.network import build_network, to_config
from settings.command_line import parse
from tests.conftest import TINY_NETWORK
from train_IMTA import Stage2Objective


@pytest.fixture
def backbone():
    return MSDNet(**TINY_NETWORK)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def test_without_isc_exits_are_independent(backbone, images):
    network = IMTA(backbone, isc=False).eval()
    for k, (z, f) in enumerate(zip(network(images), backbone.features(images), strict=True)):
        torch.testing.assert_close(z, network.classifiers[k](f))


def test_boosted_exits_keep_their_boost(images):
    """Each new classifier adds half of the logits of the previous exit, as the backbone's did."""
    backbone = MSDNet(**TINY_NETWORK, boosted_exits=True)
    kept, dropped = (IMTA(backbone, isc=False, boosted=boosted).eval() for boosted in (None, False))
    dropped.load_state_dict(kept.state_dict())
    own, sums = dropped(images), kept(images)
    torch.testing.assert_close(sums[2], own[2] + 0.5 * own[1] + 0.25 * own[0])
    assert (kept.boosted, kept.config["boosted"]) == (True, True)
    assert (dropped.boosted, dropped.config["boosted"]) == (False, False)
    assert not IMTA(MSDNet(**TINY_NETWORK)).boosted
    assert build_network(to_config(kept)).boosted
    assert not build_network(to_config(dropped)).boosted
    early = {name: value for name, value in to_config(dropped).items() if name != "boosted"}
    assert not build_network(early).boosted  # as in files from before there was a choice


@pytest.mark.parametrize("cut", [True, False])
def test_gradient_through_the_links(backbone, images, cut):
    network = IMTA(backbone, cut_isc_gradient=cut).train()
    network(images)[1].square().sum().backward()
    reached = network.classifiers[0].weight.grad is not None
    assert reached is not cut
    assert network.links[0][0].weight.grad.any()


def test_only_the_new_classifiers_learn(backbone, images):
    network = IMTA(backbone).train()
    sum(z.square().sum() for z in network(images)).backward()
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in network.named_parameters() if not name.startswith("backbone.")}
    assert all(p.grad.any() for name, p in network.named_parameters() if name in learning)
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_batchnorm_of_the_backbone(backbone, images, frozen):
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    network = IMTA(backbone, freeze_batchnorm=frozen).train()
    network(images)
    moved = [name for name, b in backbone.named_buffers() if not torch.equal(b, before[name])]
    assert (moved == []) is frozen


def test_only_batchnorm_of_the_backbone_moves(images):
    """Dropout and the like stay off: the teacher would be noise."""
    cnn = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 10)),
    )
    network = IMTA(Backbone(cnn, exits=2, image_size=32), freeze_batchnorm=False).train()
    (statistics,) = [layer for layer in network.backbone.modules() if isinstance(layer, nn.BatchNorm2d)][:1]
    before = statistics.running_mean.clone()
    first, second = network.features(images), network.features(images)
    for own, again in zip(first, second, strict=True):
        assert torch.equal(own, again)
    assert not torch.equal(statistics.running_mean, before)


def test_new_modules_have_device_and_type_of_the_backbone(backbone, images):
    network = IMTA(backbone.double())
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert network.eval()(images.double())[-1].dtype == torch.float64


@pytest.mark.parametrize("flags", [["--no-ofa"], ["--gamma", "0"]])
def test_without_distillation_there_is_no_teacher(backbone, images, flags, monkeypatch):
    def refuse(*_):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(IMTA, "teacher_logits", refuse)
    targets = torch.arange(len(images))
    losses, _ = Stage2Objective(IMTA(backbone).train(), parse("IMTA", flags).settings())(images, targets)
    assert losses.isfinite().all()
    with pytest.raises(AssertionError, match="the teacher was asked"):
        Stage2Objective(IMTA(backbone).train(), parse("IMTA", []).settings())(images, targets)


def test_single_stage_trains_everything_it_uses_and_teaches_itself(backbone, images):
    network = IMTA(backbone, freeze_backbone=False).train()
    features = network.features(images)
    logits = network.classify(features)
    assert torch.equal(network.teacher_logits(features, logits), logits[-1].detach())
    sum(z.square().sum() for z in logits).backward()
    unreached = {name for name, p in network.named_parameters() if p.requires_grad and p.grad is None}
    assert all(name.startswith("backbone.blocks.2") for name in unreached), (
        "only fine scales after the last exit may stay without"
    )
    assert not any(exit_module.linear.weight.requires_grad for exit_module in backbone.exits)
    assert backbone.stem.scales[0][0].weight.grad.any()
