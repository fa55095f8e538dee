"""Networks of a library through the programs: trained, resumed, taken to stage 2, fine-tuned, refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

import predict
import train_GE
import train_IMTA
from engine.checkpoint import load_checkpoint
from experiments import backbones, small_data
from models import IMTA, load
from settings.command_line import parse
from tests.conftest import make_images
from utils import UserError

ARCH = ["--arch", "mobilenet_v3_small", "--exits", "3", "--image-size", "32", "--data", "folder"]
SHORT = ["--val-size", "12", "--batch-size", "8", "--epochs", "2", "--amp", "off", "--lr", "0.02"]


@pytest.fixture
def train(image_folder, tmp_path):
    def run(name, *flags, arch=ARCH):
        save = ["--save", str(tmp_path / name / "GE"), "--data-root", str(image_folder)]
        return train_GE.main([*save, *arch, *SHORT, *flags])

    return run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run of stage 1, with the images of the fixture ``image_folder``."""
    folder = tmp_path_factory.mktemp("finished")
    images = make_images(folder / "images", ["ant", "bee", "cat"], train=20, test=5)
    save = ["--save", str(folder / "GE"), "--data-root", str(images)]
    assert train_GE.main([*save, *ARCH, *SHORT, "--epochs", "1"]) == 0
    return folder / "GE"


def test_taken_to_stage_2_and_used(finished_run, image_folder, tmp_path, capsys):
    stage_2 = [
        *("--pretrained", str(finished_run), "--save", str(tmp_path / "run" / "IMTA"), "--epochs", "1"),
        *("--batch-size", "8", "--amp", "off"),
    ]
    assert train_IMTA.main(stage_2) == 0
    network = load(tmp_path / "run" / "IMTA")
    assert isinstance(network, IMTA)
    assert network.backbone.config["name"] == "mobilenet_v3_small"
    data = network.description.data
    assert (data.image_size, data.mean) == (32, [0.485, 0.456, 0.406])
    photo = next((image_folder / "test" / "ant").glob("*.png"))
    capsys.readouterr()
    assert predict.main([str(photo), "--model", str(tmp_path / "run" / "IMTA")]) == 0
    assert str(photo) in capsys.readouterr().out


@pytest.mark.parametrize(("program", "flags"), [(train_GE, []), (train_IMTA, ["--single-stage"])])
def test_a_new_network_takes_images_as_its_library_does(image_folder, tmp_path, monkeypatch, program, flags):
    """Small images of a folder, which an MSDNet normalises by their own mean."""
    prepared = []

    def stop(trainer, checkpoint=None):
        prepared.append(trainer.data.info)
        raise UserError("stopped before the training")

    monkeypatch.setattr("engine.run.train", stop)
    save = ["--save", str(tmp_path / "run"), "--data-root", str(image_folder)]
    assert program.main([*save, *ARCH, *SHORT, *flags]) == 2
    assert (prepared[0].image_size, prepared[0].mean) == (32, [0.485, 0.456, 0.406])


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_dropout_masks(train, tmp_path, monkeypatch):
    """mobilenet_v3_small drops a fifth of the features of its last exit."""
    steps = []
    real = train_GE.Stage1Objective.forward

    def stopping(self, images, targets):
        steps.append(len(steps))
        if len(steps) == 9:
            raise KeyboardInterrupt
        return real(self, images, targets)

    assert train("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_GE.Stage1Objective, "forward", stopping)
        with pytest.raises(KeyboardInterrupt):
            train("stopped", "--save-every-steps", "1")
    assert train("stopped", "--save-every-steps", "1", "--resume") == 0
    whole, resumed = (load_checkpoint(tmp_path / name / "GE" / "last.pt") for name in ("whole", "stopped"))
    for name, x in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], x), name


@pytest.mark.slow
def test_pretrained_weights_learn_slower(train, tmp_path):
    weights = torchvision.models.mobilenet_v3_small(num_classes=7).state_dict()
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(weights, file)
    assert train("run", "--pretrained", str(file), "--pretrained-lr-factor", "0", "--weight-decay", "0") == 0
    network = load(tmp_path / "run" / "GE").network
    learned = {name for name, p in network.named_parameters() if not torch.equal(p, weights[name])}
    assert learned == {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.slow
def test_exits_alone(train, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), weights)
    frozen = ["--pretrained", str(weights), "--freeze", "backbone"]
    assert train("run", *frozen, "--optimizer", "adamw", "--lr", "0.001") == 0
    network = load(tmp_path / "run" / "GE")
    assert network.config["frozen"]
    run_json = json.loads((tmp_path / "run" / "GE" / "run.json").read_text())
    assert run_json["settings"]["optimizer"] == "adamw"


@pytest.mark.slow
def test_fine_tuned_on_the_same_classes(train, finished_run, tmp_path):
    run = str(finished_run)
    assert (
        train("other", "--pretrained", run, "--lr", "1e-9", "--epochs", "1", arch=["--data", "folder"]) == 0
    )
    before, after = load(run), load(tmp_path / "other" / "GE")
    assert before.config["has_new_classifier"]
    assert after.config == {**before.config, "has_new_classifier": False}
    name = "network.features.0.0.weight"
    torch.testing.assert_close(after.get_parameter(name), before.get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        (train_IMTA, ["--arch", "resnet18"], "has --arch mobilenet_v3_small, the command line says resnet18"),
        (train_IMTA, ["--exits", "4"], "has --exits ['features"),
        (train_IMTA, ["--nBlocks", "3"], "has no --nBlocks: it is Backbone"),
        (train_GE, ["--nBlocks", "3"], "has no --nBlocks: it is Backbone"),
        (train_GE, ["--exits", "features.3"], "has --exits ['features"),
        (train_GE, ["--boosted-exits"], "has --boosted-exits False, the command line says True"),
    ],
)
def test_flags_that_another_network_cannot_follow(finished_run, tmp_path, capsys, program, flags, message):
    words = ["--pretrained", str(finished_run), "--save", str(tmp_path / "new"), "--exits", "3", *flags]
    assert program.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--exits", "4"], ["--arch", "msdnet"], ["--freeze", "backbone"]])
def test_an_evaluation_refuses_flags_of_another_network(finished_run, capsys, flags):
    assert train_GE.main(["--evalmode", "anytime", "--save", str(finished_run), *flags]) == 2
    assert f"has {flags[0]} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "resnet19"], "torchvision has no classification network 'resnet19'; did you mean"),
        (["--arch", "resnet18", "--nBlocks", "3"], "--nBlocks is for --arch msdnet, not for --arch resnet18"),
        (["--exits", "3"], "--exits is for networks of torchvision and timm"),
        (["--freeze", "backbone"], "networks of torchvision and timm"),
        (
            ["--arch", "resnet18", "--optimizer", "adamw", "--nesterov"],
            "--nesterov belongs to --optimizer sgd",
        ),
        (["--arch", "resnet18", "--pretrained", "nothing"], "there is no file nothing"),
        (["--arch", "resnet18", "--exits", "layer9"], "no module 'layer9' in ResNet; exits can be at: layer"),
        (["--arch", "vit_b_16"], "takes images of 224 pixels only, not of 32"),
    ],
)
def test_mistakes(train, capsys, flags, message):
    try:
        status = train("run", *flags, arch=["--data", "folder", "--image-size", "32"])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arm", backbones.ARMS)
def test_arms_of_the_experiment_are_command_lines(arm):
    program, *flags = backbones.command(arm, 1, Path("data"), Path("weights.safetensors"), Path("work"))
    command = parse("GE" if program == "train_GE.py" else "IMTA", flags)
    assert command.typed["lr"] == 0.05


def test_the_small_data_experiment_links_other_images_for_each_seed(tmp_path):
    for part, count in (("train", 70), ("test", 3)):
        for name in small_data.CLASSES:
            folder = tmp_path / "source" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:02d}.png").touch()
    found = []
    for seed in (1, 2):
        images = small_data.link_images(tmp_path / "source", tmp_path / str(seed), seed)
        assert len(list(images.glob("test/*/*.png"))) == 3 * 4
        found.append({path.relative_to(images) for path in images.glob("train/*/*.png")})
    assert len(found[0]) == len(found[1]) == 4 * small_data.TRAINING_IMAGES
    assert not found[0] & found[1]
