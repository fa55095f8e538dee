"""Networks of torchvision and timm: their names, weights, preprocessing and files."""

import re
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision
from torchvision.models import WeightsEnum

from adaptive_inference.fingerprint import network_fingerprint
from engine.checkpoint import report_damage, save_network
from models import build_backbone, load
from models.description import Split
from models.network import CannotBuildError
from models.third_party import construct, image_spec_of_weights, options_of_weights, split_name
from tests.backbones import Chain
from tests.conftest import describe
from utils import UserError


def test_names():
    with pytest.raises(
        ValueError, match="torchvision has no classification network 'resnet19'; did you mean resnet1"
    ):
        build_backbone("resnet19")
    with pytest.raises(ValueError, match="no classification network 'maskrcnn_resnet50_fpn'"):
        build_backbone("maskrcnn_resnet50_fpn")
    with pytest.raises(ValueError, match="cannot build resnet18 with the options"):
        build_backbone("resnet18", options={"depth": 3})
    with pytest.raises(
        FileNotFoundError, match="no file NONE, and resnet18 has no weights of that name: IMAGENET1K_V1"
    ):
        build_backbone("resnet18", pretrained="NONE")
    with pytest.raises(FileNotFoundError, match=r"no file ~no-such-user/w\.pth, and resnet18 has no"):
        build_backbone("resnet18", pretrained="~no-such-user/w.pth")


def test_timm_networks():
    pytest.importorskip("timm")
    network = build_backbone("timm/test_resnet", exits=["layer1", "layer2"], num_classes=5).eval()
    assert network.config["library"] == "timm"
    assert network(torch.randn(2, 3, 64, 64))[-1].shape == (2, 5)
    # It ends in a linear layer of timm's own.
    assert build_backbone("timm/mobilenetv3_small_050", exits=2, num_classes=5).num_classes == 5
    with pytest.raises(ValueError, match="did you mean timm/"):
        build_backbone("timm/tf_efficientnet_lite9")
    found = image_spec_of_weights("timm/tf_efficientnet_lite0")
    assert found.mean == [0.5, 0.5, 0.5]
    assert found.interpolation == "bicubic"


def test_preprocessing_comes_with_the_weights():
    found = image_spec_of_weights("mobilenet_v3_small", "DEFAULT")
    assert (found.image_size, found.crop_share, found.interpolation) == (224, 0.875, "bilinear")
    assert found.mean == [0.485, 0.456, 0.406]
    assert found.std == [0.229, 0.224, 0.225]


def test_weights_from_files(tmp_path):
    weights = torchvision.models.mobilenet_v3_small(num_classes=4).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": x for k, x in weights.items()}}, tmp_path / "a.pth")
    torch.save({f"_orig_mod.module.{k}": x for k, x in weights.items()}, tmp_path / "c.pth")
    torch.save({"model": {"state_dict": weights}, "epoch": 3}, tmp_path / "d.pth")
    torch.save({"state_dict": {"net": weights}}, tmp_path / "e.pth")
    for file in ("a.safetensors", "a.pth", "c.pth", "d.pth", "e.pth"):
        network = build_backbone("mobilenet_v3_small", 3, 4, pretrained=tmp_path / file, image_size=64)
        assert all(torch.equal(x, weights[k]) for k, x in network.network.state_dict().items())
    for file, reason in (("b.pth", "not a PyTorch checkpoint"), ("b.safetensors", "is damaged")):
        (tmp_path / file).write_bytes(b"nothing")
        with pytest.raises(ValueError, match=f"{file}.* {reason}"):
            build_backbone("mobilenet_v3_small", pretrained=tmp_path / file)
    with pytest.raises(ValueError, match=r"a.pth: these weights are not those of resnet18"):
        build_backbone("resnet18", pretrained=tmp_path / "a.pth")


def test_weights_that_cannot_be_downloaded_name_the_other_way(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise URLError("no route to the host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    reason = (
        "the weights DEFAULT of resnet18 cannot be downloaded: no route to the host; --pretrained also takes"
    )
    with pytest.raises(OSError, match=reason):
        build_backbone("resnet18", pretrained="DEFAULT")


def test_a_file_of_a_named_network_needs_no_other(tmp_path):
    network = build_backbone("mobilenet_v3_small", 3, num_classes=5, image_size=32)
    save_network(tmp_path / "named.safetensors", network, describe(network), Split.unknown())
    again, images = load(tmp_path / "named.safetensors"), torch.randn(2, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(again(images), network.eval()(images), strict=True))
    assert network_fingerprint(again) == network_fingerprint(network)
    with pytest.raises(
        ValueError, match=r"named\.safetensors: it is a network of 'torchvision'; load it without"
    ):
        load(tmp_path / "named.safetensors", network=Chain())


def test_tags_of_timm_and_the_image_size_of_weights():
    assert options_of_weights("vit_h_14", "DEFAULT") == {"image_size": 518}
    assert options_of_weights("resnet18", "DEFAULT") == {}
    pytest.importorskip("timm")
    assert split_name("timm/resnet18.a1_in1k") == ("timm", "resnet18.a1_in1k")
    with pytest.raises(ValueError, match="no classification network"):
        split_name("timm/resnet18.a9")


def test_a_classifier_that_timm_draws_is_new(monkeypatch):
    """For another number of classes timm leaves out the classifier of its weights."""
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    own, other = (
        build_backbone("timm/test_resnet", 2, 5, pretrained="DEFAULT", options={"num_classes": number})
        for number in (1000, 5)
    )
    assert own.has_new_classifier
    assert other.has_new_classifier


def test_files_cannot_name_other_files():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="'checkpoint_path' is not an option"):
        construct("timm", "resnet18", {"checkpoint_path": "elsewhere.pth"})


def test_a_missing_library_is_no_damage(tmp_path):
    message = r"last.pt: networks of timm need the package timm$"
    with pytest.raises(UserError, match=message), report_damage(tmp_path / "last.pt"):
        raise CannotBuildError("networks of timm need the package timm")


def test_too_little_memory_is_no_damage(tmp_path):
    """Where it was, ``--overwrite`` would seem the way out."""
    with pytest.raises(torch.OutOfMemoryError), report_damage(tmp_path / "last.pt"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_weights_of_networks_that_look_at_versions(tmp_path):
    network = build_backbone("mnasnet0_5", 2, 10, image_size=64)
    description = describe(network, image_size=64)
    save_network(tmp_path / "network.safetensors", network, description, Split.unknown())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(load(tmp_path / "network.safetensors")(images)[-1], network.eval()(images)[-1])
    again = build_backbone("mnasnet0_5", 2, 10, image_size=64)
    again.load_pretrained(dict(network.network.state_dict()))
    assert torch.equal(again.network.eval()(images), network.network(images))


def test_weights_of_torchvision_are_those_of_the_constructor(monkeypatch, tmp_path):
    """DenseNet's weights have the names of an older version, which torchvision's constructor knows."""
    original = torchvision.models.densenet121().state_dict()
    layer = r"(denselayer\d+\.(?:norm|conv))([12])"
    weights = {name: x for name, x in original.items() if not name.endswith("num_batches_tracked")}
    older = {re.sub(layer, r"\1.\2", name): x for name, x in weights.items()}
    assert older.keys() != weights.keys()
    torch.save(older, tmp_path / "densenet121.pth")
    network = build_backbone("densenet121", 3, 4, pretrained=tmp_path / "densenet121.pth")
    name = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(network.network.get_parameter(name), original[name])
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(older))
    network = build_backbone("densenet121", 3, 4, pretrained="DEFAULT")
    assert torch.equal(network.network.features.conv0.weight, original["features.conv0.weight"])
    wide = torchvision.models.mobilenet_v2().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: wide)
    with pytest.raises(ValueError, match="these weights are not those of mobilenet_v2"):
        build_backbone("mobilenet_v2", 3, pretrained="DEFAULT", options={"width_mult": 0.5})


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_a_normalisation_of_their_own(monkeypatch, tmp_path, name):
    """Their weights were trained behind it, with auxiliary classifiers that no exit replaces."""
    make = getattr(torchvision.models, name)
    published = make(weights=None, init_weights=False, transform_input=True, aux_logits=True)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: dict(published.state_dict()))
    images, without = torch.rand(2, 3, 128, 128), {"aux_logits": False}
    if name == "googlenet":
        without["init_weights"] = False
    network = build_backbone(name, 3, pretrained="DEFAULT", image_size=128, options=without)
    torch.testing.assert_close(network.eval()(images)[-1], published.eval()(images))
