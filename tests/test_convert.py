"""The command that converts files of format 2 and released checkpoints: they then work like today's."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import predict
import train_GE
from adaptive_inference.fingerprint import network_fingerprint
from adaptive_inference.policy_files import read_policy
from engine import convert
from engine.checkpoint import load_checkpoint, load_saved
from models import MSDNet, load, to_released
from models.normalizer import IMAGENET_MEAN
from models.pytorch_files import read_checkpoint
from utils import UserError

FORMAT_2 = Path(__file__).parent / "fixtures" / "format_2"


@pytest.fixture
def run(tmp_path):
    """A small finished run that the code of format 2 wrote, demo data, both stages."""
    shutil.copytree(FORMAT_2, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("stage", ["GE", "IMTA"])
def test_a_run_of_format_2(run, stage, capsys):
    path = run / stage / "best.safetensors"
    with pytest.raises(ValueError, match=re.escape(f"python -m engine.convert {path}")):
        load(path)
    assert convert.main([str(run / stage)]) == 0
    expected = json.loads((run / "expected.json").read_text())[stage]
    network = load(path)
    images = torch.linspace(-2, 2, 2 * 3 * 40 * 40).reshape(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.stack(network(images)), torch.tensor(expected["logits"]), atol=1e-4, rtol=1e-4
        )
    assert network_fingerprint(network) == expected["fingerprint"]
    assert read_policy(run / stage / "policy.json").fingerprint == expected["fingerprint"]
    description = network.description
    assert (description.data.name, description.data.image_size, description.data.crop_share) == (
        "demo",
        40,
        1.0,
    )
    assert description.data.class_names[:2] == ["solid circle", "hollow circle"]
    assert (description.data.num_training_images, len(load_saved(path).split.held_out)) == (13000, 100)
    assert description.stage == stage
    assert convert.main([str(run / stage)]) == 0
    assert "is of today's format already" in capsys.readouterr().out


def test_a_finished_checkpoint_of_format_2_is_resumed(run, tmp_path, capsys):
    path = run / "GE" / "last.pt"
    assert train_GE.main(["--save", str(run / "GE"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert f"python -m engine.convert {run / 'GE'}" in message
    assert "an unfinished training is finished with the code it began with" in message
    assert convert.main([str(run / "GE"), str(tmp_path / "new")]) == 0
    assert load_checkpoint(tmp_path / "new" / "last.pt")["epoch"] == 1
    assert (tmp_path / "new" / "policy.json").exists()
    with pytest.raises(UserError, match="written by an earlier version"):
        load_checkpoint(path)  # a new folder leaves the old one alone


def test_an_unfinished_training_is_finished_with_its_own_code(run, capsys):
    state = dict(read_checkpoint(run / "GE" / "last.pt"))
    torch.save({**state, "epoch": 0, "step": 7}, run / "GE" / "last.pt")
    assert convert.main([str(run / "GE" / "last.pt")]) == 2
    assert "finished with the code it began with" in capsys.readouterr().err
    assert convert.main([str(run / "GE")]) == 0
    assert "left alone" in capsys.readouterr().out
    assert load(run / "GE").num_exits == 2


def test_files_of_today_are_copied_to_an_output(run, tmp_path, capsys):
    assert convert.main([str(run / "GE")]) == 0
    for name in ("best.safetensors", "policy.json", "last.pt"):
        assert convert.main([str(run / "GE" / name), str(tmp_path / "new" / name)]) == 0
        assert (tmp_path / "new" / name).read_bytes() == (run / "GE" / name).read_bytes()
    assert f"{tmp_path / 'new' / 'last.pt'} is a copy" in capsys.readouterr().out
    assert convert.main([str(run / "GE"), str(tmp_path / "a" / "run")]) == 0
    for name in ("best.safetensors", "policy.json", "last.pt", "log.jsonl"):
        assert (tmp_path / "a" / "run" / name).read_bytes() == (run / "GE" / name).read_bytes()


def test_a_folder_without_a_network_of_this_project_is_not_copied(run, tmp_path, capsys):
    save_file({"weight": torch.ones(3)}, run / "GE" / "best.safetensors")
    assert convert.main([str(run / "GE"), str(tmp_path / "new")]) == 2
    assert "not a network of this project" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_damaged_state_of_a_run_is_left_alone(run, tmp_path, capsys):
    (run / "GE" / "last.pt").write_bytes(b"nothing")
    assert convert.main([str(run / "GE"), str(tmp_path / "new")]) == 0
    assert "left alone: " in capsys.readouterr().out
    assert load(tmp_path / "new").num_exits == 2
    assert not (tmp_path / "new" / "last.pt").exists()


def test_released_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = MSDNet(num_classes=10, step_mode="lin_grow").eval()
    torch.save({"state_dict": to_released(network), "arch": "msdnet_ge"}, "model.pth.tar")
    assert convert.main(["model.pth.tar"]) == 2
    assert "give --classes FILE" in capsys.readouterr().err
    names = ["crane", "crane", *"abcdefgh"]
    Path("names.txt").write_text("\ufeff" + "\n".join(names) + "\n", encoding="utf-8")
    assert convert.main(["model.pth.tar", "--classes", "names.txt"]) == 0
    converted = load("model.safetensors")
    capsys.readouterr()
    state = to_released(network)
    torch.save({"state_dict": state, "model_ema": state}, "average.pth")
    assert convert.main(["average.pth", "--classes", "names.txt"]) == 0
    assert "from 'state_dict', not from 'model_ema'" in capsys.readouterr().out
    data = converted.description.data
    assert (data.name, data.class_names, data.image_size) == ("cifar10", names, 32)
    assert not data.knows_training_images
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(converted(images), network(images))
    assert predict.main(["missing.png", "--model", "model.safetensors"]) == 1
    # As many classes as CIFAR-10, but images as large as ImageNet's.
    small = {"num_blocks": 2, "base": 1, "step": 1, "num_channels": 4, "growth_rate": 4}
    network = MSDNet(num_classes=10, small_inputs=False, **small)
    torch.save({"state_dict": to_released(network)}, "large.pth")
    sizes = [
        "--nBlocks",
        "2",
        "--base",
        "1",
        "--step",
        "1",
        "--nChannels",
        "4",
        "--growthRate",
        "4",
        "--grFactor",
        "1-2-4",
        "--bnFactor",
        "1-2-4",
    ]
    assert convert.main(["large.pth", "--classes", "names.txt", *sizes]) == 0
    data = load("large.safetensors").description.data
    assert (data.name, data.image_size, data.mean) == ("folder", 224, list(IMAGENET_MEAN))


def test_names_that_the_output_cannot_show_lose_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert convert.main([str(run / "GE"), str(tmp_path / "出")]) == 0
    assert {"best.safetensors", "policy.json"} <= {path.name for path in (tmp_path / "出").iterdir()}


def test_folders_of_the_system_are_no_classes(tmp_path):
    for name in ("recycled", "cat", "@eaDir", "__MACOSX", ".cache"):
        (tmp_path / name).mkdir()
    assert convert.read_class_names(tmp_path, 2) == ["cat", "recycled"]


def test_mistakes_are_one_line(run, tmp_path, capsys):
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "names").write_text("one\n")
    torch.save({"state_dict": to_released(MSDNet(num_classes=10, step_mode="lin_grow"))}, tmp_path / "a.pth")
    for arguments, words in [
        (["missing.pth"], "there is no checkpoint"),
        (["text"], "not a PyTorch checkpoint"),
        (["empty"], "it is not a run"),
        (["a.pth", "--classes", str(tmp_path / "names")], "holds 1 names, the network knows 10 classes"),
        (["a.pth", "--nBlocks", "7"], "the file has 5 exits, --nBlocks says 7"),
    ]:
        assert convert.main([str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
