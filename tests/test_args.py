"""Command lines: help, published presets, defaults, and mistakes in one line and with status 2."""

from pathlib import Path

import pytest

from args import (
    DEFAULTS,
    RELEASED_CHOICES,
    all_option_names,
    build_parser,
    flag_of,
    from_record,
    option_names,
    parse,
)
from engine.record import to_plain_types
from models.options import MSDNetOptions, block_depths
from utils import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("stage", ["GE", "IMTA"])
def test_help_explains_every_flag_with_its_default(capsys, stage):
    with pytest.raises(SystemExit) as stop:
        parse(stage, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default:") == len(DEFAULTS.keys() & build_parser(stage).flags().keys())
    assert "peak learning rate (default: 0.1, or by preset)" in text
    assert "seed of initialisation, order and augmentation (default: 1)" in text


def test_every_setting_is_a_flag_of_one_stage_or_both():
    assert build_parser("GE").flags().keys() | build_parser("IMTA").flags().keys() == {*DEFAULTS, "help"}


def test_former_values_stand_for_those_of_today():
    assert parse("GE", ["--ge-scales", "Trunk"]).typed == {"gradient_equilibrium_scales": "all"}
    assert from_record({"gradient_equilibrium_scales": "trunk"}) == {"gradient_equilibrium_scales": "all"}
    assert MSDNetOptions(gradient_equilibrium_scales="trunk") == MSDNetOptions()


@pytest.mark.parametrize("arch", ["msdnet", "resnet18"])
def test_settings_hold_the_options_of_their_network_alone(arch):
    settings = vars(parse("GE", ["--arch", arch]).settings())
    assert settings.keys() & all_option_names() == {*option_names(arch)}
    assert settings.keys() | all_option_names() == DEFAULTS.keys()


def test_published_presets():
    cifar100 = parse("GE", ["--preset", "cifar100"]).settings()
    assert (cifar100.epochs, cifar100.batch_size, cifar100.lr, cifar100.lr_type) == (300, 512, 0.8, "cosine")
    depths = block_depths(cifar100.num_blocks, cifar100.base, cifar100.step, cifar100.step_mode)
    assert depths == [1, 2, 3, 4, 5]
    assert (cifar100.num_channels, cifar100.growth_rate) == (16, 6)
    assert (cifar100.growth_factors, cifar100.val_size) == ((1, 2, 4), 5000)
    stage_2 = parse("IMTA", ["--preset", "cifar100"]).settings()
    assert (stage_2.epochs, stage_2.batch_size, stage_2.temperature, stage_2.gamma) == (180, 512, 1.0, 0.1)
    imagenet = parse("GE", ["--preset", "imagenet"]).settings()
    assert (imagenet.epochs, imagenet.batch_size, imagenet.lr) == (90, 256, 0.1)
    assert (imagenet.lr_milestones, imagenet.val_size) == ((30.0, 60.0), 50000)
    assert imagenet.growth_factors == imagenet.bottleneck_factors == (1, 2, 4, 4)
    anytime = parse("GE", ["--preset", "cifar100-anytime"]).settings()
    depths = block_depths(anytime.num_blocks, anytime.base, anytime.step, anytime.step_mode)
    assert depths == [4, 2, 2, 2, 2, 2, 2]
    assert (anytime.epochs, anytime.batch_size, anytime.lr, anytime.lr_type) == (300, 64, 0.1, "multistep")


def test_the_papers_choices_are_the_defaults():
    settings = parse("IMTA", []).settings()
    assert (settings.kl_reduction, settings.backbone_bn, settings.isc_gradient) == ("sum", "frozen", "cut")
    assert settings.gradient_equilibrium_scales == "all"


def test_released_sets_every_choice_and_explicit_flags_win():
    settings = parse("IMTA", ["--released"]).settings()
    assert {name: getattr(settings, name) for name in RELEASED_CHOICES} == RELEASED_CHOICES
    assert parse("IMTA", ["--released", "--kl", "sum"]).settings().kl_reduction == "sum"


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--grFactor", "1-2-4-4"], "growth_factors", (1, 2, 4, 4)),
        (["--lr-type", "multistep", "--lr-milestones", "30,60"], "lr_milestones", (30.0, 60.0)),
        (["--gpu", "0,2"], "gpu", (0, 2)),
        (["--no-bottleneck"], "bottleneck", False),
        ([], "evalmode", None),
        (["--evalmode"], "evalmode", "dynamic"),
        (["--eval", "anytime"], "evalmode", "anytime"),
        (["--data", "ImageNet"], "data", "imagenet"),
        (["--data", "folder"], "preset", "folder"),
        (["--data", "cifar100"], "num_blocks", 5),  # a data set has its own preset
        (["--data", "cifar100", "--preset", "demo"], "preset", "demo"),
    ],
)
def test_typed_values(flags, name, value):
    assert getattr(parse("GE", flags).settings(), name) == value


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nBlocks", "0"], "at least 1"),
        (["--grFactor", "1,2"], "1-2"),
        (["--lr", "nan"], "finite"),
        (["--lr", "-1"], "more than 0"),
        (["--preset", "mnist"], "demo"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--reduction", "2"], "at most 1"),
        (["--resume", "--overwrite"], "do not go together"),
        (["--compile", "default", "--checkpoint-activations"], "do not go together"),
        (["--single-stage", "--pretrained", "x"], "do not go together"),
        (["--evaluate-from", "x.pt"], "needs --evalmode"),
        (["--nesterov", "--momentum", "0"], "above 0"),
        (["--seed", "4294967296"], "at most"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        parse("IMTA", flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words in message


@pytest.mark.parametrize("flags", [["--kl", "sum"], ["--kl=sum"], ["-T", "2"], ["--no-isc"]])
def test_a_flag_of_stage_2_alone_is_named_as_such(capsys, flags):
    with pytest.raises(SystemExit):
        parse("GE", flags)
    flag = flags[0].split("=")[0]
    assert (
        f"unrecognized arguments: {' '.join(flags)}; {flag} is a flag of train_IMTA.py"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("flag", ["--freeze", "--pretrained-lr-factor"])
def test_a_flag_of_stage_1_alone_is_named_as_such(capsys, flag):
    with pytest.raises(SystemExit):
        parse("IMTA", [flag, "backbone"])
    assert f"{flag} is a flag of train_GE.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("GE", ["--arch", "resnet18", "--no-bottleneck"], "--bottleneck is for --arch msdnet, not for"),
        ("GE", ["--exits", "3"], "--exits is for networks of torchvision and timm"),
        ("GE", ["--lr-milestones", "1,2"], "--lr-milestones belongs to --lr-type multistep"),  # demo: cosine
        ("GE", ["--optimizer", "adamw", "--momentum", "0.5"], "--momentum belongs to --optimizer sgd"),
        ("GE", ["--no-GE", "--ge-scales", "all"], "--ge-scales belongs to --gradient-equilibrium"),
        ("GE", ["--arch", "resnet18", "--pretrained-lr-factor", "0"], "needs --pretrained"),
        ("IMTA", ["--no-ofa", "-T", "2"], "--temperature belongs to --ofa"),
        ("IMTA", ["--no-isc", "--isc-gradient", "flow"], "--isc-gradient belongs to --isc"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(stage, flags, words):
    with pytest.raises(UserError, match=words):
        parse(stage, flags).settings()


@pytest.mark.parametrize("flags", [["--lr", "0.5"], ["--no-isc"], ["--pretrained", "x"]])
def test_an_evaluation_refuses_flags_of_another_training(flags):
    stored = from_record(to_plain_types(parse("IMTA", ["--lr", "0.3"]).settings()))
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
        ("IMTA", ["--pretrained", "model.safetensors"], "save/demo/IMTA"),
        ("GE", ["--data-root", "photos"], "save/folder/GE"),
        ("GE", ["--data-root", "photos", "--resume"], "save/folder/GE"),
        ("GE", ["--data-root", "photos", "--evalmode"], "save/folder/GE"),
        ("GE", ["--pretrained", "imta_cifar100", "--data-root", "photos"], "save/finetune/GE"),
        ("GE", ["--pretrained", "imta_cifar100"], "save/imta_cifar100/GE"),
        ("GE", ["--pretrained", "runs/GE/best.safetensors"], "runs/GE_2"),
    ],
)
def test_save_directory(stage, flags, directory):
    assert parse(stage, flags).save_directory == Path(directory)


def test_stage_2_inherits_data_network_and_preset(tmp_path):
    stage_1 = to_plain_types(
        parse(
            "GE", ["--preset", "cifar100", "--data-root", str(tmp_path), "--val-size", "7", "--nBlocks", "4"]
        ).settings()
    )
    settings = parse("IMTA", ["--epochs", "3"]).settings(inherited=stage_1)
    assert (settings.data, settings.data_root, settings.val_size, settings.num_blocks) == (
        "cifar100",
        tmp_path,
        7,
        4,
    )
    assert (settings.batch_size, settings.epochs) == (512, 3)
    assert (
        parse("IMTA", ["--data", "cifar100", "--save", "x"]).settings(inherited={"preset": "demo"}).preset
        == "demo"
    )


def test_images_that_have_gone_are_not_downloaded_elsewhere(tmp_path):
    stage_1 = to_plain_types(
        parse("GE", ["--preset", "cifar100", "--data-root", str(tmp_path / "gone")]).settings()
    )
    with pytest.raises(UserError, match="pass --data-root DIR"):
        parse("IMTA", []).settings(inherited=stage_1)
    assert parse("GE", ["--evalmode", "--data-root", "new"]).settings(stored=stage_1).data_root == Path("new")


@pytest.mark.parametrize("flags", [["--val-size", "8"], ["--split-seed", "1"]])
def test_held_out_images_stay_those_of_stage_1(flags):
    stage_1 = to_plain_types(parse("GE", ["--val-size", "7"]).settings())
    with pytest.raises(UserError, match="the checkpoint's images were held out with"):
        parse("IMTA", flags).settings(inherited=stage_1)
    with pytest.raises(UserError, match="the split cannot change"):
        parse("GE", ["--evalmode", *flags]).settings(stored=stage_1)
    assert parse("IMTA", ["--val-size", "7"]).settings(inherited=stage_1).val_size == 7


def test_a_resumed_run_keeps_its_settings():
    stored = from_record(to_plain_types(parse("GE", ["--lr", "0.3"]).settings()))
    assert parse("GE", ["--resume"]).settings(stored).lr == 0.3
    elsewhere = parse("GE", ["--resume", "--workers", "9", "--lr", "0.3", "--gpu", "1"])
    elsewhere.refuse_changes(stored)
    assert elsewhere.settings(stored).gpu == (1,)
    assert parse("GE", ["--resume"]).settings({**stored, "gpu": (0, 1)}).gpu is None
    with pytest.raises(UserError, match=r"--lr 0\.3, the command line says 0\.5"):
        parse("GE", ["--resume", "--lr", "0.5"]).refuse_changes(stored)


def test_auto_stays_what_it_was_in_a_resumed_run():
    stored = from_record(to_plain_types(parse("GE", []).settings())) | {"amp": "bf16", "compile": "default"}
    command = parse("GE", ["--resume", "--amp", "auto", "--compile", "auto"])
    command.refuse_changes(stored)
    assert (command.settings(stored).amp, command.settings(stored).compile) == ("bf16", "default")


def test_a_flag_newer_than_the_record_is_compared_with_its_default():
    stored = from_record(to_plain_types(parse("GE", []).settings()))
    del stored["clip_grad"]
    with pytest.raises(UserError, match="has --clip-grad None, the command line says 1"):
        parse("GE", ["--resume", "--clip-grad", "1"]).refuse_changes(stored)


def test_a_training_command_with_evalmode_evaluates_a_network_without_record():
    """The published way to evaluate a released network."""
    flags = ["--epochs", "300", "--batch-size", "64", "--lr-type", "multistep", "--weight-decay", "1e-4"]
    parse("GE", ["--preset", "cifar100", *flags, "--evalmode", "dynamic"]).refuse_changes(
        {"data": "cifar100"}
    )


def test_a_run_never_continues_one_of_other_data():
    demo = from_record(to_plain_types(parse("GE", []).settings()))
    for flags in (
        ["--resume", "--data-root", "photos"],
        ["--save", "x", "--resume", "--data-root", "photos"],
    ):
        with pytest.raises(UserError, match="demo"):
            parse("GE", flags).refuse_changes(demo)
    # Where nothing is to be resumed, the photographs are trained on.
    command = parse("GE", ["--save", "x", "--resume", "--data-root", "photos"])
    assert (command.settings().data, command.settings().preset) == ("folder", "folder")


def test_the_command_that_resumes():
    command = parse("GE", ["--data-root", "my photos", "--overwrite", "--lr", "0.2"])
    assert command.to_resume() == "python train_GE.py --data-root 'my photos' --lr 0.2 --resume"


@pytest.mark.parametrize("stage", ["GE", "IMTA"])
def test_every_flag_that_takes_a_path_expands_the_home(monkeypatch, tmp_path, stage):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("data_root", "save", "pretrained", "evaluate_from")
    command = parse(stage, ["--evalmode", *(f"{flag_of(name)}=~/x" for name in names)])
    assert [command.typed[name] for name in names] == [tmp_path / "x"] * 4


def test_a_home_that_does_not_exist_stays_a_name():
    assert parse("GE", ["--save", "~nobody-of-this-name/run"]).save_directory == Path(
        "~nobody-of-this-name/run"
    )
    assert parse("GE", ["--save", "~/run"]).save_directory == Path.home() / "run"
