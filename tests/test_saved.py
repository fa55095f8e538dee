"""Network files: what comes back, what is refused, and loading with torch and safetensors alone."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from adaptive_inference.fingerprint import network_fingerprint
from engine.checkpoint import save_network
from models import IMTA, MSDNet, load, load_released
from models.description import Split
from models.network import ExitNetwork, build_network, to_config
from models.saved import load_weights, network_from_tensors, read_network, read_safetensors
from tests.conftest import TINY_NETWORK, describe
from utils import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def network():
    return IMTA(MSDNet(**TINY_NETWORK, gradient_equilibrium_scales="coarsest"), cut_isc_gradient=False)


@pytest.fixture
def path(network, tmp_path):
    save_network(
        tmp_path / "best.safetensors",
        network,
        describe(network),
        Split(torch.tensor([3, 5]), torch.empty(0, dtype=torch.int64)),
    )
    return tmp_path / "best.safetensors"


def same_tensors(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_what_was_saved_comes_back(network, path):
    random_state = torch.get_rng_state()
    again, description, split = read_network(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_tensors(again.state_dict(), network.state_dict())
    assert to_config(again) == to_config(network)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in network.parameters()]
    assert description == again.description == describe(network)
    assert split.held_out.tolist() == [3, 5]
    assert not any(module.training for module in again.modules())
    assert network.description is MSDNet.description is None


def test_a_network_that_is_not_needed_is_refused(path):
    with pytest.raises(
        ValueError, match=r"best\.safetensors: it is a whole MSDNet; load it without network=$"
    ):
        load(path, network=torch.nn.Linear(2, 2))


def test_building_a_network_leaves_the_tensors_of_its_file_alone(network, path):
    tensors, _ = read_safetensors(path)
    names = set(tensors)
    network_from_tensors(tensors, describe(network))
    assert set(tensors) == names


def test_early_files_do_not_say_which_kind_a_backbone_is(network, path):
    options = to_config(network)
    early = {name: value for name, value in options["backbone"].items() if name != "type"}
    rewritten(path, description=changed(network, network={**options, "backbone": early}))
    again = load(path)
    assert same_tensors(again.state_dict(), network.state_dict())
    assert network_fingerprint(again) == network_fingerprint(network)


def test_half_precision_on_disk_is_float32_in_memory(network, path):
    size = path.stat().st_size
    save_network(
        path,
        network,
        describe(network),
        Split(torch.tensor([0]), torch.empty(0, dtype=torch.int64)),
        half=True,
    )
    again = load(path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, x in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], x.half().float() if x.dim() > 1 else x)
    assert path.stat().st_size < 0.8 * size


def test_names_are_those_of_the_weights_folder(path, monkeypatch):
    monkeypatch.setattr("models.files.WEIGHTS", path.parent)
    assert load(path.parent).num_exits == 3  # as the directory of a run
    assert load("best").num_exits == 3
    with pytest.raises(FileNotFoundError, match="no network of that name; there are: best"):
        load("resnet")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load("elsewhere/best.safetensors")
    (path.parent / "runs").mkdir()
    (path.parent / "runs" / "GE").symlink_to(path.parent)
    with pytest.raises(FileNotFoundError, match="its folder holds the runs GE"):
        load(path.parent / "runs")


def test_a_folder_does_not_hide_a_shipped_network(path, tmp_path, monkeypatch):
    monkeypatch.setattr("models.files.WEIGHTS", path.parent)
    (tmp_path / "elsewhere" / "best" / "GE").mkdir(
        parents=True
    )  # such as of ``export_onnx.py --output best/``
    (tmp_path / "elsewhere" / "best" / "GE" / "best.safetensors").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("best").num_exits == 3


def rewritten(path, **changes):
    """The same file with other texts in its header, or (``tensors``) other tensors."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = changes.pop("tensors", safetensors.torch.load(content))
    header |= changes
    data = safetensors.torch.save(tensors)
    data = data[8 + int.from_bytes(data[:8], "little") :]
    header["crc32"] = f"{zlib.crc32(data, zlib.crc32(header['description'].encode())):08x}"
    path.write_bytes(safetensors.torch.save(tensors, header))


def changed(network, /, **changes):
    return json.dumps({**dataclasses.asdict(describe(network)), **changes})


@pytest.mark.parametrize(
    "damage",
    ["cut", "header cut", "empty", "bit", "bit of a name", "text", "other safetensors", "pickle", "zip"],
)
def test_damaged_and_foreign_files_are_named_in_one_line(network, path, damage):
    content = path.read_bytes()
    if damage.startswith("bit"):
        place = content.index(b"class 3") + 6 if damage == "bit of a name" else len(content) - 50
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    elif damage == "other safetensors":
        safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    elif damage in ("pickle", "zip"):
        torch.save({"state_dict": network.state_dict()}, path, _use_new_zipfile_serialization=damage == "zip")
    else:
        path.write_bytes(
            {
                "cut": content[:-1000],
                "header cut": content[:100],
                "empty": b"",
                "text": b"not weights at all",
            }[damage]
        )
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        load(path)
    assert "\n" not in str(raised.value)
    assert ("engine.convert" in str(raised.value)) is (damage in ("pickle", "zip"))


def test_contents_that_do_not_belong_together(network, path):
    content, tensors = path.read_bytes(), safetensors.torch.load(path.read_bytes())
    options, data = to_config(network), dataclasses.asdict(describe(network).data)
    few_blocks = {**options, "backbone": {**options["backbone"], "num_blocks": 2}}
    absurd = {**options, "backbone": {**options["backbone"], "num_channels": 10**30}}
    for changes, words in [
        ({"format": "imta-msdnet network 4"}, "its format is 'imta-msdnet network 4'"),
        (
            {"description": changed(network, data={**data, "class_names": ["a"]})},
            "has 1 entries, where 10 belong",
        ),
        ({"description": changed(network, data={"name": "demo"})}, "missing"),
        ({"description": changed(network, operations=[1])}, "operations has 1 entries, where 3 belong"),
        ({"description": changed(network, operations=["1", "2", "3"])}, "operations are ['1', '2', '3']"),
        ({"description": changed(network, recipe=[])}, "recipe is no dictionary"),
        ({"description": changed(network, data={**data, "image_size": 32.5})}, "image_size is 32.5"),
        ({"description": changed(network, surplus=1)}, "surplus"),
        ({"description": changed(network, data={**data, "class_names": [1] * 10})}, "not all class names"),
        ({"description": changed(network, data={**data, "crop_share": 0})}, "crop_share is 0"),
        ({"description": changed(network, data={**data, "crop_share": 0.002})}, "crop_share is 0.002"),
        ({"description": changed(network, data={**data, "mean": [0.5, 0.5]})}, "mean is"),
        ({"description": changed(network, data={**data, "std": [0.5, 0.0, 0.5]})}, "std is"),
        ({"description": changed(network, data={**data, "interpolation": "cubic"})}, "interpolation is"),
        ({"description": changed(network, network={**options, "type": "ResNet"})}, "impossible network"),
        ({"description": changed(network, network=absurd)}, "impossible"),
        ({"description": changed(network, network=few_blocks)}, "another network"),
        ({"description": "[" * 10**5}, "damaged"),
        (
            {"tensors": {**tensors, "classifiers.0.bias": torch.zeros(3)}},
            "classifiers.0.bias is [3] there, [10] here",
        ),
        (
            {"tensors": {**tensors, "classifiers.0.bias": torch.full((10,), torch.nan)}},
            "not all weights are finite numbers",
        ),
        ({"tensors": {**tensors, "held_out": torch.tensor([100])}}, "held_out are not numbers of 100"),
    ]:
        path.write_bytes(content)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=re.escape(words)) as raised:
            load(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_tied_weights_stay_tied():
    def tied():
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        layers[1].weight = layers[0].weight
        return layers

    original = tied()
    with torch.device("meta"):
        loaded = tied()
    load_weights(loaded, original.state_dict())
    assert loaded[1].weight is loaded[0].weight
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), original(x))


def test_a_damaged_description_is_not_blamed_on_the_network_that_was_passed(network, path):
    for description in ("{", changed(network, surplus=1)):
        rewritten(path, description=description)
        with pytest.raises(ValueError, match="is damaged, or made by another program"):
            load(path, network=network)


def test_types_in_files_are_classes_that_can_be_saved():
    with pytest.raises(ValueError, match=r"its type is 'FoldedNetwork', not one of .*MSDNet") as raised:
        build_network({"type": "FoldedNetwork"})
    assert str(raised.value).count("FoldedNetwork") == 1
    known = dict(ExitNetwork.kinds)
    with pytest.raises(TypeError, match=r"there is a network Backbone already, in models\.backbone"):

        class Backbone(ExitNetwork):
            pass

    assert ExitNetwork.kinds == known


def test_files_to_convert_name_the_command(network, path):
    command = f"python -m engine.convert {path}"
    rewritten(path, format="imta-msdnet network 2")
    with pytest.raises(ValueError, match=re.escape(command)):
        load(path)
    torch.save({"state_dict": network.state_dict()}, path)
    with pytest.raises(ValueError, match=re.escape(command)):
        load(path)


def test_load_released_says_what_to_call(path):
    with pytest.raises(ValueError, match=r"best\.safetensors: it is a safetensors file; models\.load reads"):
        load_released(path)


def test_a_failed_write_leaves_the_old_file(network, path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="cannot write"):
        save_network(path, network, describe(network), Split.unknown())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_torch_hub_needs_torch_and_safetensors_alone(path, tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "clone" / "models")
    shutil.copyfile(ROOT / "hubconf.py", tmp_path / "clone" / "hubconf.py")
    (tmp_path / "clone" / "weights").mkdir()
    shutil.copyfile(path, tmp_path / "clone" / "weights" / "imta_cifar100.safetensors")
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")  # PyTorch misses NumPy
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {{"matplotlib", "tensorboard", "torchvision", "PIL", "tqdm", "numpy", "args",
        "utils", "engine"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from torch import nn
network = torch.hub.load({str(tmp_path / "clone")!r}, "imta_cifar100", source="local")
with torch.no_grad():
    print(network.description.data.class_names[network(torch.zeros(1, 3, 32, 32))[-1].argmax()])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.stderr == ""
    assert ended.stdout.startswith("class ")


def test_a_cut_file_is_no_pytorch_checkpoint(tmp_path):
    """The first byte of a safetensors file, a length, may be the one that pickled files begin with."""
    path = tmp_path / "cut.safetensors"
    path.write_bytes(bytes([0x80, 1, 0, 0, 0, 0, 0, 0]) + b'{"weight"')
    with pytest.raises(ValueError, match="truncated, damaged or no safetensors file"):
        read_network(path)


def test_an_export_is_told_from_a_damaged_file(tmp_path):
    (tmp_path / "photos.onnx").write_bytes(b"\x08\x08:")
    with pytest.raises(ValueError, match=r"photos\.onnx is an export, which onnx_predictor\.py runs"):
        read_network(tmp_path / "photos.onnx")
