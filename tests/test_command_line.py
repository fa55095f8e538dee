"""The settings of a run: from flags, presets and recipes; its directory, and the command that resumes it."""

from pathlib import Path

import pytest

from args import DEFAULTS, all_option_names, option_names
from engine.session import to_plain_types
from models.files import WEIGHTS
from presets import RELEASED_CHOICES
from settings.command_line import parse, settings_from_recipe
from utils import UserError


@pytest.mark.parametrize("arch", ["msdnet", "resnet18"])
def test_settings_hold_the_options_of_their_network_alone(arch):
    settings = vars(parse("GE", ["--arch", arch]).settings())
    assert settings.keys() & all_option_names() == {*option_names(arch)}
    assert settings.keys() | all_option_names() == DEFAULTS.keys()


def test_released_sets_every_choice_and_explicit_flags_win():
    settings = parse("IMTA", ["--released"]).settings()
    assert {name: getattr(settings, name) for name in RELEASED_CHOICES} == RELEASED_CHOICES
    assert parse("IMTA", ["--released", "--kl", "sum"]).settings().kl_reduction == "sum"


@pytest.mark.parametrize("flags", [["--lr", "0.5"], ["--no-isc"], ["--pretrained", "x"]])
def test_an_evaluation_refuses_flags_of_another_training(flags):
    stored = settings_from_recipe(to_plain_types(parse("IMTA", ["--lr", "0.3"]).settings()))
    with pytest.raises(UserError, match=r"the network to evaluate has --.*; --evalmode trains nothing"):
        parse("IMTA", ["--evalmode", *flags]).refuse_changes(stored)
    parse("IMTA", ["--evalmode", "--lr", "0.3", "--batch-size", "7", "--amp", "off"]).refuse_changes(stored)


@pytest.mark.parametrize(
    ("stage", "flags", "directory"),
    [
        ("GE", [], "save/demo/GE"),
        ("GE", ["--data", "cifar100"], "save/cifar100/GE"),
        ("GE", ["--save", "x"], "x"),
        ("IMTA", ["--preset", "cifar10"], "save/cifar10/IMTA"),
        ("IMTA", ["--pretrained", "runs/GE/best.safetensors"], "runs/IMTA"),
        ("IMTA", ["--pretrained", "model.safetensors"], "save/model/IMTA"),
        ("GE", ["--data-root", "photos"], "save/folder/GE"),
        ("GE", ["--data-root", "photos", "--resume"], "save/folder/GE"),
        ("GE", ["--data-root", "photos", "--evalmode"], "save/folder/GE"),
        ("GE", ["--pretrained", "imta_cifar100", "--data-root", "photos"], "save/finetune/GE"),
        (
            "GE",
            ["--data-root", "x", "--arch", "resnet18", "--pretrained", "DEFAULT"],
            "save/finetune/GE",
        ),
        ("GE", ["--pretrained", "imta_cifar100"], "save/imta_cifar100/GE"),
        ("GE", ["--pretrained", "runs/GE/best.safetensors"], "runs/GE_2"),
    ],
)
def test_save_directory(stage, flags, directory):
    assert parse(stage, flags).save_directory == Path(directory)


def test_a_folder_with_the_name_of_a_shipped_network_is_no_run(tmp_path, monkeypatch):
    """Such as of ``export_onnx.py --output imta_cifar100/``."""
    monkeypatch.chdir(tmp_path)
    Path("imta_cifar100").mkdir()
    command = parse("GE", ["--pretrained", "imta_cifar100"])
    assert command.save_directory == Path("save/imta_cifar100/GE")
    Path("imta_cifar100/best.safetensors").touch()
    assert command.save_directory == Path("imta_cifar100_2")


@pytest.mark.parametrize(
    ("stage", "flags", "directory"),
    [
        ("IMTA", ["--pretrained", "."], "runs/IMTA"),
        ("IMTA", ["--pretrained", "best.safetensors"], "runs/IMTA"),
        ("IMTA", ["--pretrained", "inside/.."], "runs/IMTA"),
        ("GE", ["--pretrained", "."], "runs/GE_2"),
        ("GE", ["--save", "."], "runs/GE"),
    ],
)
def test_save_directory_from_inside_a_run(tmp_path, monkeypatch, stage, flags, directory):
    (tmp_path / "runs" / "GE" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "GE")
    assert parse(stage, flags).save_directory == tmp_path / directory


def test_stage_2_inherits_data_network_and_preset(tmp_path):
    stage_1 = to_plain_types(
        parse(
            "GE", ["--preset", "cifar100", "--data-root", str(tmp_path), "--val-size", "7", "--nBlocks", "4"]
        ).settings()
    )
    settings = parse("IMTA", ["--epochs", "3"]).settings(origin_recipe=stage_1)
    assert (settings.data, settings.data_root, settings.val_size, settings.num_blocks) == (
        "cifar100",
        tmp_path,
        7,
        4,
    )
    assert (settings.batch_size, settings.epochs) == (512, 3)
    assert (
        parse("IMTA", ["--data", "cifar100", "--save", "x"]).settings(origin_recipe={"preset": "demo"}).preset
        == "demo"
    )


def test_images_that_have_gone_are_not_downloaded_elsewhere(tmp_path):
    stage_1 = to_plain_types(
        parse("GE", ["--preset", "cifar100", "--data-root", str(tmp_path / "gone")]).settings()
    )
    with pytest.raises(UserError, match="pass --data-root DIR"):
        parse("IMTA", []).settings(origin_recipe=stage_1)
    with pytest.raises(UserError, match="pass --data cifar100 --data-root DIR"):
        parse("GE", ["--pretrained", "x"]).settings(origin_recipe=stage_1)
    assert parse("GE", ["--evalmode", "--data-root", "new"]).settings(recipe=stage_1).data_root == Path("new")


@pytest.mark.parametrize("flags", [["--val-size", "8"], ["--split-seed", "1"]])
def test_held_out_images_stay_those_of_stage_1(flags):
    stage_1 = to_plain_types(parse("GE", ["--val-size", "7"]).settings())
    with pytest.raises(UserError, match="the checkpoint's images were held out with"):
        parse("IMTA", flags).settings(origin_recipe=stage_1)
    with pytest.raises(UserError, match="the split cannot change"):
        parse("GE", ["--evalmode", *flags]).settings(recipe=stage_1)
    assert parse("IMTA", ["--val-size", "7"]).settings(origin_recipe=stage_1).val_size == 7


def test_a_resumed_run_keeps_its_settings():
    stored = settings_from_recipe(to_plain_types(parse("GE", ["--lr", "0.3"]).settings()))
    assert parse("GE", ["--resume"]).settings(stored).lr == 0.3
    elsewhere = parse("GE", ["--resume", "--workers", "9", "--lr", "0.3", "--gpu", "1"])
    elsewhere.refuse_changes(stored)
    assert elsewhere.settings(stored).gpu == (1,)
    assert parse("GE", ["--resume"]).settings({**stored, "gpu": (0, 1)}).gpu is None
    with pytest.raises(UserError, match=r"--lr 0\.3, the command line says 0\.5"):
        parse("GE", ["--resume", "--lr", "0.5"]).refuse_changes(stored)


def test_auto_stays_what_it_was_in_a_resumed_run():
    stored = settings_from_recipe(to_plain_types(parse("GE", []).settings())) | {
        "amp": "bf16",
        "compile": "default",
    }
    command = parse("GE", ["--resume", "--amp", "auto", "--compile", "auto"])
    command.refuse_changes(stored)
    assert (command.settings(stored).amp, command.settings(stored).compile) == ("bf16", "default")


def test_a_flag_newer_than_the_recipe_is_compared_with_its_default():
    stored = settings_from_recipe(to_plain_types(parse("GE", []).settings()))
    del stored["clip_grad"]
    with pytest.raises(UserError, match="has --clip-grad None, the command line says 1"):
        parse("GE", ["--resume", "--clip-grad", "1"]).refuse_changes(stored)


def test_a_training_command_with_evalmode_evaluates_a_network_without_recipe():
    """The published way to evaluate a released network."""
    flags = ["--epochs", "300", "--batch-size", "64", "--lr-type", "multistep", "--weight-decay", "1e-4"]
    parse("GE", ["--preset", "cifar100", *flags, "--evalmode", "dynamic"]).refuse_changes(
        {"data": "cifar100"}
    )


def test_a_converted_network_holds_out_as_many_images_as_its_preset(image_folder):
    recipe = {"preset": "imagenet", "data": "imagenet"}
    command = ["--evalmode", "dynamic", "--data-root", str(image_folder)]
    assert parse("GE", command).settings(recipe).val_size == 50000
    assert parse("GE", [*command, "--val-size", "7"]).settings(recipe).val_size == 7
    assert parse("GE", [*command, "--data", "folder"]).settings(recipe).val_size is None
    recipe = {"preset": "folder", "data": "folder"}
    assert parse("GE", command).settings(recipe).val_size is None
    assert parse("GE", [*command, "--preset", "imagenet"]).settings(recipe).val_size == 50000


def test_a_run_never_continues_one_of_other_data():
    demo = settings_from_recipe(to_plain_types(parse("GE", []).settings()))
    for flags in (
        ["--resume", "--data-root", "photos"],
        ["--save", "x", "--resume", "--data-root", "photos"],
    ):
        with pytest.raises(UserError, match="--data-root is not for the demo"):
            parse("GE", flags).settings(demo)
    with pytest.raises(UserError, match="--data-root is not for the demo"):
        parse("IMTA", ["--pretrained", "x", "--data-root", "photos"]).settings(origin_recipe=demo)
    # Where nothing is to be resumed, the photographs are trained on.
    command = parse("GE", ["--save", "x", "--resume", "--data-root", "photos"])
    assert (command.settings().data, command.settings().preset) == ("folder", "folder")


def test_a_resumed_run_may_name_its_origin_by_file_by_run_or_by_name():
    shipped = WEIGHTS / "imta_cifar100.safetensors"
    recorded = {"pretrained": str(shipped)}
    for origin in ("imta_cifar100", shipped):
        parse("GE", ["--resume", "--pretrained", str(origin)]).refuse_changes(recorded)
    run = {"pretrained": "/runs/one/GE/best.safetensors"}
    for origin in ("/runs/one/GE", "/runs/one/GE/best.safetensors"):
        parse("IMTA", ["--resume", "--pretrained", origin]).refuse_changes(run)
    for origin in ("/runs/one", "/", "best", "imta_cifar100"):
        with pytest.raises(UserError, match="--pretrained"):
            parse("IMTA", ["--resume", "--pretrained", origin]).refuse_changes(run)
    # The recipe has what was typed, relative to a folder that may be another today.
    typed = {"pretrained": "one/GE"}
    for origin in ("one/GE", "/runs/one/GE", "/runs/one/GE/best.safetensors"):
        command = parse("IMTA", ["--resume", "--pretrained", origin])
        command.refuse_changes(typed, "/runs/one/GE/best.safetensors")


def test_a_run_takes_no_arch(tmp_path):
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(UserError, match="is a run, which knows its network: leave out --arch"):
        parse("GE", ["--arch", "resnet18", "--pretrained", str(tmp_path)]).settings()


def test_the_command_that_resumes():
    command = parse("GE", ["--data-root", "my photos", "--overwrite", "--lr", "0.2"])
    assert command.to_resume() == "python train_GE.py --data-root 'my photos' --lr 0.2 --resume"


def test_a_home_that_does_not_exist_stays_a_name():
    assert parse("GE", ["--save", "~nobody-of-this-name/run"]).save_directory == Path(
        "~nobody-of-this-name/run"
    )
    assert parse("GE", ["--save", "~/run"]).save_directory == Path.home() / "run"
