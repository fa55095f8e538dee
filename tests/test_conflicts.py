"""Flags and settings that do not go together."""

import pytest

from settings.command_line import parse, settings_from_recipe
from settings.conflicts import conflict_of_compiling, conflict_on_machine
from utils import UserError


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("GE", ["--arch", "resnet18", "--no-bottleneck"], "--bottleneck is for --arch msdnet, not for"),
        ("GE", ["--exits", "3"], "--exits is for networks of torchvision and timm"),
        ("GE", ["--lr-milestones", "1,2"], "--lr-milestones belongs to --lr-type multistep"),  # demo: cosine
        ("GE", ["--optimizer", "adamw", "--momentum", "0.5"], "--momentum belongs to --optimizer sgd"),
        ("GE", ["--no-GE", "--ge-scales", "all"], "--ge-scales belongs to --gradient-equilibrium"),
        ("GE", ["--arch", "resnet18", "--pretrained-lr-factor", "0"], "needs --pretrained"),
        (
            "GE",
            [
                *("--arch", "resnet18", "--pretrained", "DEFAULT", "--freeze", "backbone"),
                "--pretrained-lr-factor",
                "0.5",
            ],
            "--pretrained-lr-factor has no effect with --freeze backbone",
        ),
        (
            "GE",
            ["--arch", "resnet18", "--released"],
            "--released is for --arch msdnet, not for --arch resnet18",
        ),
        ("GE", ["--preset", "cifar100-boosted", "--momentum", "0"], "--nesterov needs a --momentum above 0"),
        ("GE", ["--warmup-epochs", "5", "--epochs", "5"], "--warmup-epochs 5 must lie below --epochs 5"),
        ("GE", ["--preset", "demo", "--data-root", "photos"], "--data-root is not for the demo"),
        ("GE", ["--preset", "demo", "--test-size", "20%"], "--test-size is not for the demo"),
        (
            "GE",
            ["--data", "cifar10", "--data-root", "missing", "--test-size", "20%"],
            "--test-size is for folders of images: cifar10 comes with test images",
        ),
        ("GE", ["--arch", "resnet18", "--freeze", "backbone"], "--freeze backbone needs --pretrained"),
        ("GE", ["--freeze", "backbone"], "--freeze backbone is for networks of torchvision and timm"),
        ("IMTA", ["--no-ofa", "-T", "2"], "--temperature belongs to --ofa"),
        ("IMTA", ["--gamma", "0", "-T", "2"], "--temperature has no effect with --gamma 0"),
        ("IMTA", ["--gamma", "0", "--kl", "mean"], "--kl has no effect with --gamma 0"),
        (
            "IMTA",
            ["--single-stage", "--released", "--arch", "resnet18"],
            "--released is for --arch msdnet, not for --arch resnet18",
        ),
        ("GE", ["--preset", "demo", "--skip-unreadable"], "--skip-unreadable is not for the demo"),
        ("IMTA", ["--no-isc", "--isc-gradient", "flow"], "--isc-gradient belongs to --isc"),
    ],
)
def test_flags_that_do_not_go_with_other_settings_are_refused(stage, flags, words):
    with pytest.raises(UserError, match=words):
        parse(stage, flags).settings()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--lr-milestones", "5,10", "--epochs", "10"],
            "--lr-milestones 5,10 must lie above 0 and below --epochs 10",
        ),
        (["--lr-milestones=-5,5", "--epochs", "10"], "--lr-milestones -5,5 must lie above 0"),
        (
            ["--epochs", "30"],
            "imagenet decays the learning rate at epochs 30,60, .* pass --lr-milestones too",
        ),
    ],
)
def test_every_milestone_lies_in_the_training(tmp_path, flags, words):
    imagenet = ["--preset", "imagenet", "--data-root", str(tmp_path)]
    with pytest.raises(UserError, match=words):
        parse("GE", [*imagenet, *flags]).settings()
    settings = parse("GE", [*imagenet, "--epochs", "30", "--lr-milestones", "10,20"]).settings()
    assert settings.lr_milestones == (10.0, 20.0)
    assert parse("GE", [*imagenet, "--epochs", "30", "--lr-type", "cosine"]).settings().epochs == 30
    # Runs of earlier versions can be resumed and evaluated.
    stored = settings_from_recipe({**vars(settings), "lr_milestones": [30.0, 60.0]})
    assert parse("GE", ["--resume"]).settings(stored).lr_milestones == (30.0, 60.0)


@pytest.mark.parametrize("data", ["demo", "cifar10"])
def test_older_runs_have_a_test_size_that_changed_nothing(data, tmp_path):
    place = [] if data == "demo" else ["--data-root", str(tmp_path)]
    settings = parse("GE", ["--data", data, *place]).settings()
    stored = settings_from_recipe({**vars(settings), "test_size": 0.2, "data_root": str(tmp_path)})
    command = parse("GE", ["--data", data, *place, "--test-size", "20%", "--resume"])
    command.refuse_changes(stored)
    assert command.settings(stored).test_size == 0.2
    for stage in ("GE", "IMTA"):
        assert parse(stage, ["--pretrained", "run"]).settings(origin_recipe=stored).data == data


def test_the_test_size_of_cifar_as_folders(tmp_path):
    (tmp_path / "train").mkdir()
    flags = ["--data", "cifar10", "--data-root", str(tmp_path), "--test-size", "20%"]
    assert parse("GE", flags).settings().test_size is not None


@pytest.mark.parametrize(("preset", "epochs", "warmup_epochs"), [("folder", 1, 0.5), ("folder", 60, 2.0)])
def test_the_warm_up_of_a_preset_leaves_half_of_a_short_training(preset, epochs, warmup_epochs):
    settings = parse("GE", ["--preset", preset, "--epochs", str(epochs)]).settings()
    assert settings.warmup_epochs == warmup_epochs


@pytest.mark.parametrize(
    ("flags", "gpus", "message"),
    [
        (["--compile", "default"], 2, "--compile needs one process per GPU"),
        (["--sync-bn"], 2, "--sync-bn needs one process per GPU"),
        (["--compile", "default", "--accumulate", "5"], 0, "does not divide 12 images"),
        (["--accumulate", "13"], 0, "only 12 images"),
        (["--accumulate", "12"], 0, "at least 2 images"),
        (["--batch-size", "13"], 4, "at least 2 images"),  # 4, 4, 4 and 1
        (["--accumulate", "4"], 2, "at least 2 images"),
    ],
)
def test_what_the_processes_of_a_run_cannot_do_is_refused(flags, gpus, message):
    settings = parse("GE", ["--batch-size", "12", "--compile", "off", *flags]).settings()
    assert message in conflict_on_machine(settings, world_size=1, num_gpus=gpus, has_batch_norm_1d=True)


def test_networks_without_batch_norm_of_features_take_single_images():
    settings = parse("GE", ["--batch-size", "12", "--compile", "off", "--accumulate", "12"]).settings()
    assert conflict_on_machine(settings, world_size=1, num_gpus=0, has_batch_norm_1d=False) is None


def test_synchronised_batch_norm_needs_gpus():
    settings = parse("GE", ["--sync-bn", "--compile", "off"]).settings()
    assert "needs GPUs" in conflict_on_machine(settings, world_size=2, num_gpus=0, has_batch_norm_1d=False)
    assert conflict_on_machine(settings, world_size=2, num_gpus=1, has_batch_norm_1d=False) is None


def test_activations_are_recomputed_only_where_a_network_trains(capsys):
    parse("GE", ["--checkpoint-activations"])
    parse("IMTA", ["--checkpoint-activations", "--single-stage"])
    with pytest.raises(SystemExit):
        parse("IMTA", ["--checkpoint-activations"])
    assert "--checkpoint-activations needs --single-stage" in capsys.readouterr().err


def test_compiling_without_conflict():
    assert conflict_of_compiling("default", False, accumulate=4, num_gpus=1, images_per_process=12) is None
    assert conflict_of_compiling("off", True, accumulate=5, num_gpus=4, images_per_process=12) is None
