"""Released checkpoints: what is recognised, what is refused and in which words, and the way back."""

import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import IMTA, MSDNet, load_released, to_released
from models.released import PUBLISHED_NAMES
from tests.backbones import make_small
from tests.golden import PUBLISHED, STAGE_1, STAGE_2, golden_case


def bare(network: nn.Module) -> dict[str, Tensor]:
    """Released names without ``module.`` before them."""
    return {name.removeprefix("module."): x for name, x in to_released(network).items()}


def small_network(**options) -> MSDNet:
    return MSDNet(
        **{
            "num_classes": 10,
            "num_blocks": 3,
            "base": 2,
            "step": 1,
            "num_channels": 4,
            "growth_rate": 4,
            **options,
        }
    )


SMALL = {"base": 2, "step": 1, "stepmode": "even", "nChannels": 4, "growthRate": 4}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(
        torch.equal(x, theirs[name]) for name, x in a.state_dict().items()
    )


@pytest.mark.parametrize("name", [*STAGE_1, STAGE_2])
def test_a_released_file_with_its_flags(name, tmp_path):
    checkpoint, config = golden_case(name)["checkpoint"], golden_case(name)["config"]
    torch.save(checkpoint, tmp_path / "checkpoint.pth.tar")
    network = load_released(str(tmp_path / "checkpoint.pth.tar"), **config)
    assert isinstance(network, IMTA if name == STAGE_2 else MSDNet)
    assert not any(module.training for module in network.modules())
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    released = to_released(network)
    assert list(released) == list(checkpoint["state_dict"])
    assert all(torch.equal(x, released[name]) for name, x in checkpoint["state_dict"].items())
    with pytest.raises(ValueError, match="none of the published networks, and needs flags"):
        load_released(tmp_path / "checkpoint.pth.tar")


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.module.", "_orig_mod.", "module._orig_mod.", "model."]
)
@pytest.mark.parametrize("stage", [1, 2])
def test_layouts_of_other_programs(prefix, stage, tmp_path):
    network = small_network() if stage == 1 else IMTA(small_network())
    state = {prefix + name: x for name, x in bare(network).items()}
    assert same_weights(load_released(state, **SMALL), network)
    for key in ("state_dict", "model", "net", "model_state_dict"):
        assert same_weights(
            load_released({key: state, "best_acc1": torch.tensor(7.0), "optimizer": {"state": {}}}, **SMALL),
            network,
        )
    torch.save({"model": state}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert same_weights(load_released(tmp_path / "old.pth.tar", **SMALL), network)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_become_float32_and_the_given_ones_stay_the_callers(dtype):
    """Counts of batches may be missing."""
    network = small_network()
    state = {
        name: x.to(dtype)
        for name, x in to_released(network).items()
        if not name.endswith("num_batches_tracked")
    }
    loaded = load_released(state, **SMALL)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.exits[0].linear.weight, network.exits[0].linear.weight.to(dtype).float())
    with torch.no_grad():
        loaded.exits[0].linear.weight.zero_()
    assert network.exits[0].linear.weight.any()


@pytest.mark.parametrize(
    ("file_arch", "options", "expected"),
    [
        ("msdnet", {}, False),
        ("msdnet_ge", {}, True),
        ("resnet", {}, False),
        (None, {}, False),
        ("msdnet", {"gradient_equilibrium": True}, True),
        ("msdnet_ge", {"gradient_equilibrium": False}, False),
    ],
)
def test_gradient_equilibrium(file_arch, options, expected):
    network = load_released(
        {"arch": file_arch, "state_dict": to_released(small_network())}, **SMALL, **options
    )
    assert network.gradient_equilibrium is expected
    assert network.gradient_equilibrium_scales == "coarsest"


def test_stage_2_is_as_released():
    network = load_released(to_released(IMTA(small_network())), **SMALL)
    assert network.config["isc"]
    assert network.config["freeze_backbone"]
    assert not network.cut_isc_gradient
    assert not network.freeze_batchnorm
    assert network.backbone.gradient_equilibrium
    assert not any(p.requires_grad for p in network.backbone.parameters())
    assert all(p.requires_grad for part in (network.classifiers, network.links) for p in part.parameters())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"nBlocks": 5}, "the file has 4 exits, --nBlocks says 5"),
        ({"num_classes": 10}, "the file has 100 classes, --num_classes says 10"),
        ({"data": "ImageNet"}, "the file has small inputs, --data says ImageNet"),
        ({"prune": "most"}, "prune is 'most'; allowed: max, min"),
        ({"epochs": 300}, "--epochs says nothing about a released network; allowed: num_classes, nBlocks"),
        (
            {"grFactor": "1-2-x"},
            "the given checkpoint: --grFactor is '1-2-x'; it takes whole numbers such as 1-2-4",
        ),
        ({"base": "x"}, "it is not the network of the given flags: "),
    ],
)
def test_a_flag_that_cannot_be(flags, words):
    case = golden_case("msdnet_cifar100_lin_grow")
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        load_released(case["checkpoint"], **{**case["config"], **flags})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 4, "base": 1, "step": 2, "step_mode": "lin_grow", "num_classes": 7},
        {"bottleneck": False, "prune": "min"},
        {"growth_factors": (2, 3, 4), "bottleneck_factors": (4, 4, 4), "num_channels": 7, "reduction": 0.73},
        {**PUBLISHED["imagenet_step4"], "num_channels": 4, "growth_rate": 4, "reduction": 0.0},
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_the_way_there_and_back(stage, options):
    network = small_network(**options) if stage == 1 else IMTA(small_network(**options))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    there = to_released(network)
    assert len(there) == len(network.state_dict())
    back = load_released(
        there,
        **{
            flag: network.config.get("backbone", network.config)[name]
            for flag, name in PUBLISHED_NAMES.items()
        },
    )
    assert same_weights(back, network)
    assert list(to_released(back)) == list(there)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "cifar100_min_5"])
def test_published_networks_are_recognised(name):
    with torch.device("meta"):
        options = {**PUBLISHED[name], "num_classes": 7}
        network = MSDNet(**options, gradient_equilibrium_scales="coarsest", gradient_equilibrium=False)
    state = {name: torch.zeros(x.shape) for name, x in to_released(network).items()}
    assert load_released(state).config == network.config


def test_no_released_form():
    with pytest.raises(ValueError, match="isc=False"):
        to_released(IMTA(small_network(), isc=False))
    with pytest.raises(ValueError, match="boosted exits has no released form"):
        to_released(MSDNet(boosted_exits=True))
    with pytest.raises(ValueError, match="boosted exits has no released form"):
        to_released(IMTA(MSDNet(boosted_exits=True), boosted=False))
    with pytest.raises(ValueError, match="a Backbone has no released form"):
        to_released(IMTA(make_small("resnet")))


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """A released state dict with tensors replaced, added or (None) taken out; ``__`` stands for a point."""
    state = bare(small_network())
    for name, x in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if x is not None:
            state[name] = x
    return state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "it holds no state dict of a network, but nothing"),
        (
            {"state_dict": [1, 2], "epoch": 3},
            "it holds no state dict of a network, but 'state_dict', 'epoch'",
        ),
        (
            {"format": "imta-msdnet run 3", "state_dict": {}},
            "models.load reads the best.safetensors beside it",
        ),
        ({"module.net.weight": torch.ones(2)}, "it has no classifier.*.linear (the exits)"),
        (
            changed(classifier__2__linear__weight=None, classifier__2__linear__bias=None),
            "not the network of the given flags",
        ),
        (
            changed(classifier__1__m__0__net__1__bias=None),
            "classifier.1.m.0.net.1.bias is nothing there, where (128,) belongs",
        ),
        (
            changed(surplus=torch.ones(1), other=torch.ones(1)),
            "surplus is (1,) there, where nothing belongs, and 1 more",
        ),
        (changed(classifier__0__linear__bias=torch.ones(1).expand(10)), "is not a plain tensor"),
        (changed(classifier__0__linear__bias=torch.ones(10).to_sparse()), "is not a plain tensor"),
        (changed(classifier__0__linear__bias=torch.ones(10, device="meta")), "is not a plain tensor"),
        (
            changed(classifier__0__linear__bias=[0.0] * 10),
            "its state dict holds a list named 'classifier.0.linear.bias'",
        ),
        (
            changed(module__classifier__0__linear__bias=torch.ones(10)),
            "classifier.0.linear.bias is there twice",
        ),
    ],
)
def test_tensors_that_do_not_fit(state, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        load_released(state, **SMALL)
    assert str(raised.value).startswith("the given checkpoint: ")
    assert "\n" not in str(raised.value)


def test_damaged_and_foreign_files(tmp_path):
    content = {"arch": "msdnet", "state_dict": to_released(small_network())}
    for name, zipped in (("whole", True), ("old", False)):
        path = tmp_path / name
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert load_released(path, **SMALL).num_exits == 3
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text").write_text("Top-1 73.45\n" * 50)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("readme.txt", "no tensors here")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    for path in list(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=re.escape(path.name)) as raised:
            load_released(path)
        assert "\n" not in str(raised.value), path
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_released(tmp_path / "absent.pth.tar")


def test_a_flipped_bit(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": to_released(small_network())}, path)
    content = path.read_bytes()
    place = len(content) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"checkpoint\.pth\.tar: .*the checksum of .* does not match"):
        load_released(path)


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_does_not_run(zipped, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "checkpoint.pth.tar"
    content = {"state_dict": to_released(small_network()), "optimizer": RunsCode(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth\.tar: besides tensors it holds \w+\.mkdir, which is not loaded"
    ) as raised:
        load_released(path)
    assert "\n" not in str(raised.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # It would have run.
