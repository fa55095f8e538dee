"""Flags: help, published presets, defaults, and mistakes in one line and with status 2."""

from dataclasses import asdict

import pytest

from args import DEFAULTS, LIBRARY_OPTIONS, OWN_NETWORKS, build_parser, flag_of
from models.options import MSDNetOptions, block_depths
from settings.command_line import parse, settings_from_recipe


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
    assert settings_from_recipe({"gradient_equilibrium_scales": "trunk"}) == {
        "gradient_equilibrium_scales": "all"
    }
    assert MSDNetOptions(gradient_equilibrium_scales="trunk") == MSDNetOptions()


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


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--grFactor", "1-2-4-4"], "growth_factors", (1, 2, 4, 4)),
        (["--lr-type", "multistep", "--lr-milestones", "1,2.5"], "lr_milestones", (1.0, 2.5)),
        (["--gpu", "0,2"], "gpu", (0, 2)),
        (["--no-bottleneck"], "bottleneck", False),
        ([], "evalmode", None),
        (["--evalmode"], "evalmode", "dynamic"),
        (["--eval", "anytime"], "evalmode", "anytime"),
        (["--data", "ImageNet"], "data", "imagenet"),
        (["--data", "folder"], "preset", "folder"),
        (["--data", "cifar100"], "num_blocks", 5),  # a data set has its own preset
        (["--data", "cifar100", "--preset", "demo"], "preset", "demo"),
        (["--optimizer", "adamw"], "lr", 0.001),
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
        (["--epochs", "1" + "0" * 400], "is not allowed"),
        (["--lr", "-1"], "more than 0"),
        (["--preset", "mnist"], "demo"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--reduction", "2"], "at most 1"),
        (["--resume", "--overwrite"], "do not go together"),
        (["--compile", "default", "--checkpoint-activations"], "do not go together"),
        (["--compile", "reduce-overhead", "--accumulate", "2"], "use --compile default"),
        (["--single-stage", "--pretrained", "x"], "do not go together"),
        (["--evaluate-from", "x.pt"], "needs --evalmode"),
        (["--momentum", "1"], "less than 1"),
        (["--ema-decay", "1"], "less than 1"),
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


@pytest.mark.parametrize("stage", ["GE", "IMTA"])
def test_every_flag_that_takes_a_path_expands_the_home(monkeypatch, tmp_path, stage):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("data_root", "save", "pretrained", "evaluate_from")
    command = parse(stage, ["--evalmode", *(f"{flag_of(name)}=~/x" for name in names)])
    assert [command.typed[name] for name in names] == [tmp_path / "x"] * 4


def test_option_names_that_kinds_of_networks_share_have_one_default():
    options = [asdict(own.options()) for own in OWN_NETWORKS.values()]
    for values in options:
        assert all(DEFAULTS[name] == value for name, value in values.items() if name != "small_inputs")
    assert not {*LIBRARY_OPTIONS}.intersection(*options) - {"boosted_exits", "gradient_equilibrium"}
