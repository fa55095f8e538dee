"""The flags of both training programs, in groups, and the default of every setting.

Example:
    vars(build_parser("GE").parse_args(["--lr", "0.2"]))   # {"lr": 0.2}: what was typed, and nothing else

``SETTINGS`` says what each flag means to the commands after a training. ``presets`` overrides its defaults,
``settings.conflicts`` refuses flags that do not go together, and ``settings.command_line`` makes the settings
of a run.
Published flag spellings stay; the names behind them are snake_case. docs/extending.md says how to add one.
"""

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_inference.confidence import MEASURES
from image_data.defaults import IMAGE_SIZES, MAX_DEFAULT_WORKERS, SMALL_IMAGE_SIZE
from models.options import CHOICES, MSDNetOptions, current_value
from parsing import (
    CommandLineParser,
    above,
    at_least,
    float_list,
    in_half_open_range,
    in_range,
    int_list,
    share_or_count,
    user_path,
)
from presets import PRESETS

MAX_WORKERS, MAX_EPOCHS = 1024, 10**6
ADAMW_LR = 1e-3


class OwnNetwork(NamedTuple):
    """A kind of network of this project, by a value of --arch.

    Attributes:
        kind: Name of its class in ``models.ExitNetwork.kinds``, which files use too. The constructor takes
            ``num_classes`` and the options as keyword arguments, and ``config`` holds them by the same names.
        options: Dataclass of its options and their defaults.
    """

    kind: str
    options: type


# All other values of --arch are names of torchvision and timm.
# Kinds share option names; the same name needs the same default.
OWN_NETWORKS = {"msdnet": OwnNetwork("MSDNet", MSDNetOptions)}
LIBRARY_OPTIONS = ("exits", "gradient_equilibrium", "boosted_exits")


class MayChange(IntEnum):
    """When a setting may get another value than it has in a run's recipe (``settings.command_line``).

    NEVER: It describes the training.
    EVALUATION: When the network is evaluated.
    RESUMING: Also when the run is resumed: it changes only where and how the run is computed, or how it is
        evaluated.
    LAUNCH: At every launch, which has its own value and takes none from a recipe.
    """

    NEVER = 0
    EVALUATION = 1
    RESUMING = 2
    LAUNCH = 3


NEVER, EVALUATION, RESUMING, LAUNCH = MayChange


class Setting(NamedTuple):
    """What a flag stands for.

    Attributes:
        default: Its value where neither a flag nor a preset sets it.
        may_change: When it may change after the training began. Where it may not, a flag with another value
            than the recipe's is refused.
        inherited: Whether a run takes it from the recipe of the network that it starts from, as it always
            does with --arch and the network's options. Others come from flags, preset and defaults.
        default_from: Its value where it is None, from the other settings, of which only those before it in
            ``SETTINGS`` have their own ``default_from`` applied.
    """

    default: Any
    may_change: MayChange = NEVER
    inherited: bool = False
    default_from: Callable[[dict[str, Any]], Any] | None = None


def _image_size(values: dict[str, Any]) -> int | None:
    """Return the size of the data set's images; None leaves that of large ones to a library's weights."""
    size = IMAGE_SIZES[values["data"]]
    return size if values["arch"] in OWN_NETWORKS or size <= SMALL_IMAGE_SIZE else None


def _is_small(values: dict[str, Any]) -> bool | None:
    return None if values["image_size"] is None else values["image_size"] <= SMALL_IMAGE_SIZE


def _milestones(values: dict[str, Any]) -> tuple[float, ...]:
    return values["epochs"] * 0.5, values["epochs"] * 0.75


SETTINGS: dict[str, Setting] = {
    # often used
    "preset": Setting("demo", EVALUATION, inherited=True),
    "data": Setting("demo", EVALUATION, inherited=True),
    "data_root": Setting(Path("data"), RESUMING, inherited=True),
    "save": Setting(None, RESUMING),
    "resume": Setting(False, LAUNCH),
    "overwrite": Setting(False, LAUNCH),
    "evalmode": Setting(None, LAUNCH),
    "epochs": Setting(300),
    "batch_size": Setting(64, EVALUATION),
    "lr": Setting(0.1),
    # run
    "evaluate_from": Setting(None, LAUNCH),
    "measure": Setting("softmax", RESUMING),
    "pretrained": Setting(None),
    "seed": Setting(1, EVALUATION),
    "deterministic": Setting(False, EVALUATION),
    "gpu": Setting(None, LAUNCH),
    "print_freq": Setting(100, RESUMING),
    "save_every_steps": Setting(None, RESUMING),
    "save_every_minutes": Setting(None, RESUMING),
    # data
    "image_size": Setting(None, EVALUATION, inherited=True, default_from=_image_size),
    "val_size": Setting(None, EVALUATION, inherited=True),
    "test_size": Setting(None, EVALUATION, inherited=True),
    "split_seed": Setting(0, EVALUATION, inherited=True),
    "workers": Setting(None, RESUMING, inherited=True),
    "skip_unreadable": Setting(False, RESUMING, inherited=True),
    "check_images": Setting(False, RESUMING, inherited=True),
    "augment": Setting("standard", inherited=True),
    # network
    "arch": Setting("msdnet"),
    "exits": Setting(4),
    **{
        name: Setting(value) for own in OWN_NETWORKS.values() for name, value in asdict(own.options()).items()
    },
    "small_inputs": Setting(None, default_from=_is_small),  # in place of the network's own default
    # collaboration and distillation
    "temperature": Setting(1.0),
    "gamma": Setting(0.1),
    "isc": Setting(True),
    "ofa": Setting(True),
    "isc_gradient": Setting("cut"),
    "kl_reduction": Setting("sum"),
    "backbone_bn": Setting("frozen"),
    "single_stage": Setting(False),
    "released": Setting(False),
    # optimisation
    "optimizer": Setting("sgd"),
    "pretrained_lr_factor": Setting(0.1),
    "freeze": Setting("none"),
    "lr_type": Setting("multistep"),
    "lr_milestones": Setting(None, default_from=_milestones),
    "decay_rate": Setting(0.1),
    "warmup_epochs": Setting(0.0),
    "momentum": Setting(0.9),
    "nesterov": Setting(False),
    "weight_decay": Setting(1e-4),
    "label_smoothing": Setting(0.0),
    "ema_decay": Setting(None),
    "clip_grad": Setting(None),
    "accumulate": Setting(1),
    # speed and memory
    "amp": Setting("auto", EVALUATION),
    "tf32": Setting(True, EVALUATION),
    "channels_last": Setting(True, EVALUATION),
    "fused_optimizer": Setting(True),
    "compile": Setting("auto", RESUMING),
    "checkpoint_activations": Setting(False),
    "sync_bn": Setting(False),
}

DEFAULTS: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items()}
LAUNCH_ONLY = {name for name, setting in SETTINGS.items() if setting.may_change >= LAUNCH}
MAY_CHANGE_WHEN_RESUMING = {name for name, setting in SETTINGS.items() if setting.may_change >= RESUMING}
MAY_CHANGE_WHEN_EVALUATING = {name for name, setting in SETTINGS.items() if setting.may_change >= EVALUATION}
INHERITED = {name for name, setting in SETTINGS.items() if setting.inherited}

_EXAMPLES = """\
examples:
  python train_{stage}.py                                     the synthetic demo, minutes on a CPU
  python train_{stage}.py --preset cifar100 --data-root data  the published CIFAR-100 settings
  python train_{stage}.py --data-root photos                  your images: photos/{{train,test}}/CLASS/*.jpg

A preset overrides the defaults shown, and flags override the preset.
"""


def option_names(arch: str) -> tuple[str, ...]:
    """Return the settings that are options of the networks of a value of --arch."""
    own = OWN_NETWORKS.get(arch)
    return LIBRARY_OPTIONS if own is None else tuple(field.name for field in fields(own.options))


def all_option_names() -> set[str]:
    """Return the settings that are options of a network, whatever its kind."""
    return {*LIBRARY_OPTIONS}.union(*map(option_names, OWN_NETWORKS))


@cache
def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    parsers = [build_parser(stage) for stage in STAGES]
    return next(parser.flags()[name] for parser in parsers if name in parser.flags())


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that ends with the default of each flag, or says that presets set it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest not in DEFAULTS or "(default:" in text:
            return text
        by_preset = ", or by preset" if action.dest in _BY_PRESET else ""
        return f"{text} (default: {_shown(DEFAULTS[action.dest])}{by_preset})"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


_BY_PRESET = {name for preset in PRESETS.values() for part in preset.values() for name in part}


def build_parser(stage: str) -> CommandLineParser:
    """Return the parser of a stage, a key of ``STAGES``; it leaves out what was not typed."""
    own = STAGES[stage]
    parser = CommandLineParser(
        prog=own.program,
        usage="%(prog)s [flags]",
        description=f"{own.purpose}\n\n{_EXAMPLES.format(stage=stage)}",
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    network = "network" if own.is_first else "network (that of stage 1; new with --single-stage)"
    groups: dict[str, Callable[[Callable], None]] = {
        "often used": _add_common,
        "run": _add_run,
        "data": _add_data,
        network: _add_network,
        "optimisation": _add_optimisation,
        "speed and memory": _add_speed,
        own.title: own.add_flags,
    }
    for title, add_flags in groups.items():
        add_flags(parser.add_argument_group(title).add_argument)
    parser.flags_elsewhere = {}
    for other in STAGES.values():
        if other is not own:
            parser.flags_elsewhere |= dict.fromkeys(other.spellings(), other.program)
    return parser


def _one_of(values: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of a flag with these values, typed in upper or lower case."""
    return {"choices": list(values), "type": str.lower}


def _exits(text: str) -> int | tuple[str, ...]:
    """Convert a number of exits, or paths of modules with commas between them."""
    return at_least(2)(text) if text.isdecimal() else tuple(text.split(","))


_SEED = at_least(0, 2**32 - 2)


def _add_common(add: Callable) -> None:
    add(
        "--preset",
        **_one_of(PRESETS),
        help="base settings; other flags override them (default: in stage 2 that of stage 1; else that of "
        "--data; with --data-root alone folder, or finetune with --pretrained; else demo)",
    )
    add(
        "--data",
        **_one_of(IMAGE_SIZES),
        help="data set; folder: images in train/CLASS/ "
        "(default: folder with --data-root, else that of the preset)",
    )
    add(
        "--data-root",
        type=user_path,
        metavar="DIR",
        help="folder with train/ and test/ or val/, or torchvision's CIFAR archive; "
        "alone, it implies --data folder: images in DIR/train/CLASS/",
    )
    add(
        "--save",
        type=user_path,
        metavar="DIR",
        help="directory of this run (default: save/PRESET/GE or save/PRESET/IMTA; with --pretrained RUN "
        "alone RUN_2, or in stage 2 IMTA beside RUN)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in --save; start a new run if there is none",
    )
    add("--overwrite", action="store_true", help="start again in a directory that holds a run")
    add(
        "--evalmode",
        "--eval",
        nargs="?",
        const="dynamic",
        **_one_of(["anytime", "dynamic", "runtime"]),
        help="evaluate only: every exit on its own (anytime), budgeted batch prediction (dynamic, "
        "also when no mode is given), or measured time of the policies that dynamic wrote (runtime) "
        "(default: train, then anytime and dynamic)",
    )
    add("--epochs", type=at_least(1, MAX_EPOCHS), metavar="N", help="passes over the training images")
    add(
        "--batch-size",
        "-b",
        type=at_least(1),
        metavar="N",
        help="images per step, over all processes and GPUs",
    )
    add("--lr", "--learning-rate", type=above(0), metavar="LR", help="peak learning rate")


def _add_run(add: Callable) -> None:
    add(
        "--evaluate-from",
        type=user_path,
        metavar="FILE",
        help="network to evaluate (default: the best epoch in --save)",
    )
    add(
        "--measure",
        **_one_of(MEASURES),
        help="what decides whether an image leaves: largest softmax probability (the paper), "
        "entropy, margin of the two largest, or how many exits in a row agree (patience)",
    )
    add(
        "--pretrained",
        type=user_path,
        metavar="PATH",
        help="stage 1: weights to start from, with their classifiers where the classes are the same; "
        "stage 2: the stage-1 network. Directory of a run, a file, or a name in weights/; "
        "with --arch: DEFAULT or another name of torchvision's weights (timm: DEFAULT), "
        "which are downloaded, or a file of weights (default: none; "
        "stage 2: the directory GE beside --save)",
    )
    add("--seed", type=_SEED, metavar="N", help="seed of initialisation, order and augmentation")
    add(
        "--deterministic",
        action="store_true",
        help="only operations that repeat bit for bit on the same machine",
    )
    add(
        "--gpu",
        type=int_list(","),
        metavar="IDS",
        help="GPU or GPUs of this process, such as 0,1,2,3 (default: the first GPU, or the CPU)",
    )
    add("--print-freq", "-p", type=at_least(1), metavar="N", help="steps between two lines of the log")
    add(
        "--save-every-steps",
        type=at_least(1),
        metavar="N",
        help="also save a checkpoint every N steps (default: at the end of an epoch)",
    )
    add(
        "--save-every-minutes",
        type=above(0),
        metavar="M",
        help="also save a checkpoint every M minutes (default: at the end of an epoch)",
    )
    add(
        "--released",
        action="store_true",
        help="the choices of the released code where it differs from the paper (its bugs left out); "
        "a flag for one of these choices overrides it",
    )


def _add_data(add: Callable) -> None:
    add(
        "--image-size",
        type=at_least(1),
        metavar="PIXELS",
        help="height and width of images (default: that of the pretrained network, else 32; "
        "ImageNet and folders: 224, or that of --arch's weights)",
    )
    add(
        "--val-size",
        type=at_least(0),
        metavar="N",
        help="training images held out to choose the best epoch and the thresholds "
        "(default: demo 1000, CIFAR 5000, ImageNet 50000, folders 10 %%)",
    )
    add(
        "--test-size",
        type=share_or_count,
        metavar="N",
        help="split test images off, for folders without test/ and val/: "
        "a share such as 20%% of every class, or a number (default: those in test/ or val/)",
    )
    add("--split-seed", type=_SEED, metavar="N", help="seed of the choice of held-out and test images")
    add(
        "--workers",
        "-j",
        type=at_least(0, MAX_WORKERS),
        metavar="N",
        help=f"threads that decode images: those of at most {SMALL_IMAGE_SIZE} pixels at the start, larger "
        f"ones during the training; 0: the training thread (default: as many as cores, at most "
        f"{MAX_DEFAULT_WORKERS})",
    )
    add(
        "--skip-unreadable",
        action="store_true",
        help="continue without images that cannot be read: "
        "training uses the next image of the epoch instead, evaluation leaves them out",
    )
    add(
        "--check-images",
        action="store_true",
        help="read every image once at the start, instead of failing on an unreadable one later",
    )
    add(
        "--augment",
        **_one_of(["standard", "trivial", "randaugment", "none"]),
        help="standard: padded random crop (small images) or random resized crop, and flip; trivial, "
        "randaugment: "
        "TrivialAugment or RandAugment after that, image by image: on a GPU that is slow for small images",
    )


def _add_network(add: Callable) -> None:
    add(
        "--arch",
        metavar="NAME",
        help="msdnet, or a network of torchvision (mobilenet_v3_small) or timm (timm/NAME) that gets exits",
    )
    add(
        "--exits",
        type=_exits,
        metavar="N|PATH,PATH",
        help="with --arch: number of exits, or the modules after which the early ones "
        "are placed, such as layer1,layer2",
    )
    add_msdnet_sizes(add)
    add(
        "--small-inputs",
        action=BooleanOptionalAction,
        help="stem and exits of the CIFAR networks, not of the ImageNet ones "
        f"(default: up to {SMALL_IMAGE_SIZE} pixels)",
    )
    add(
        "--gradient-equilibrium",
        "--GE",
        action=BooleanOptionalAction,
        help="rescale gradients at the exits; off: plain MSDNet",
    )
    add(
        "--ge-scales",
        dest="gradient_equilibrium_scales",
        choices=CHOICES["gradient_equilibrium_scales"],
        type=lambda text: current_value("gradient_equilibrium_scales", text.lower()),
        help="scales whose gradients are rescaled: all (paper), or the coarsest, which the exits read "
        "(released code)",
    )
    add(
        "--boosted-exits",
        action=BooleanOptionalAction,
        help="an exit adds its logits to half of the previous exit's (Boosted Dynamic Neural Networks)",
    )
    add(
        "--init",
        dest="initialization",
        **_one_of(CHOICES["initialization"]),
        help="PyTorch's default initialisation, or He-normal by fan-out "
        "(MSDNet's original Torch code, in Lua)",
    )


def add_msdnet_sizes(add: Callable) -> None:
    """Add the flags of an MSDNet's layers and channels, which the released code has too."""
    add("--nBlocks", dest="num_blocks", type=at_least(1), metavar="N", help="blocks, and so exits, K")
    add("--base", type=at_least(1), metavar="N", help="layers of the first block")
    add(
        "--step",
        type=at_least(1),
        metavar="N",
        help="layers of every further block (even), or their growth (lin_grow)",
    )
    add(
        "--stepmode",
        dest="step_mode",
        **_one_of(CHOICES["step_mode"]),
        help="after the first, every block has STEP layers (even), or block i = 1, 2, ... has STEP * i + 1 "
        "(lin_grow)",
    )
    add(
        "--nChannels",
        dest="num_channels",
        type=at_least(1),
        metavar="N",
        help="channels of the stem at the finest scale",
    )
    add(
        "--growthRate",
        dest="growth_rate",
        type=at_least(1),
        metavar="N",
        help="new channels of a layer at the finest scale",
    )
    add(
        "--grFactor",
        dest="growth_factors",
        type=int_list("-"),
        metavar="1-2-4",
        help="channel multiple of every scale, finest first; as many as scales",
    )
    add(
        "--bnFactor",
        dest="bottleneck_factors",
        type=int_list("-"),
        metavar="1-2-4",
        help="at every scale a 1x1 convolution has this many times the new channels",
    )
    add("--bottleneck", action=BooleanOptionalAction, help="1x1 convolutions before the 3x3 ones")
    add(
        "--prune",
        **_one_of(CHOICES["prune"]),
        help="drop fine scales evenly over the depth (max) or in the last layers (min)",
    )
    add(
        "--reduction",
        type=in_range(0, 1),
        metavar="R",
        help="share of channels a transition keeps; 0: no transitions",
    )


def _add_stage_1(add: Callable) -> None:
    add(
        "--pretrained-lr-factor",
        type=in_range(0),
        metavar="F",
        help="with --pretrained and --arch: "
        "the learning rate of pretrained parameters is F times that of new ones",
    )
    add(
        "--freeze",
        **_one_of(["none", "backbone"]),
        help="backbone: with --arch, train the exits alone and freeze the network under them",
    )


def _add_stage_2(add: Callable) -> None:
    add("--temperature", "-T", type=above(0), metavar="T", help="temperature of the distillation")
    add("--gamma", type=in_range(0, 1), metavar="G", help="weight of the distillation against the labels")
    add(
        "--isc",
        action=BooleanOptionalAction,
        help="Inline Subnetwork Collaboration: exits read the logits of the previous exit",
    )
    add(
        "--ofa",
        action=BooleanOptionalAction,
        help="One-for-all distillation: exits learn from the last exit of stage 1",
    )
    add(
        "--isc-gradient",
        **_one_of(["cut", "flow"]),
        help="gradient from an exit into the one before: cut (paper), flow (released code)",
    )
    add(
        "--kl",
        dest="kl_reduction",
        **_one_of(["sum", "mean"]),
        help="over classes: sum (paper), mean (released code, 1/C of the weight)",
    )
    add(
        "--backbone-bn",
        **_one_of(["frozen", "moving"]),
        help="BatchNorm of the frozen network: frozen (paper), moving (released code)",
    )
    add(
        "--single-stage",
        action="store_true",
        help="train network and classifiers at once from scratch (GE + ISC + OFA)",
    )


def _add_optimisation(add: Callable) -> None:
    add(
        "--optimizer",
        **_one_of(["sgd", "adamw"]),
        help=f"with adamw --lr is {ADAMW_LR} where none is given",
    )
    add("--lr-type", **_one_of(["multistep", "cosine"]), help="learning rate after the warm-up")
    add(
        "--lr-milestones",
        type=float_list,
        metavar="E,E",
        help="epochs at which multistep decays (default: at 50 %% and 75 %%; imagenet: 30 and 60)",
    )
    add("--decay-rate", type=above(0), metavar="R", help="factor of every multistep decay")
    add(
        "--warmup-epochs",
        type=in_range(0),
        metavar="E",
        help="epochs of linear warm-up; that of a preset takes at most half of --epochs",
    )
    add("--momentum", type=in_half_open_range(0, 1), metavar="M", help="momentum of SGD")
    add("--nesterov", action=BooleanOptionalAction, help="Nesterov momentum")
    add("--weight-decay", "--wd", type=in_range(0), metavar="W", help="weight decay")
    add("--label-smoothing", type=in_range(0, 1), metavar="S", help="label smoothing of the cross-entropies")
    add(
        "--ema-decay",
        type=in_half_open_range(0, 1),
        metavar="D",
        help="evaluate and keep an exponential moving average of the weights, "
        "with this decay per step (default: the weights themselves)",
    )
    add("--clip-grad", type=above(0), metavar="NORM", help="clip the gradient's norm (default: no clipping)")
    add(
        "--accumulate",
        type=at_least(1),
        metavar="N",
        help="run each batch as N micro-batches, for less memory; the gradient is that of the batch",
    )


def _add_speed(add: Callable) -> None:
    add(
        "--amp",
        **_one_of(["auto", "off", "bf16", "fp16"]),
        help="mixed precision; auto: the 16-bit type that is faster on the device, off if neither is",
    )
    add(
        "--tf32",
        action=BooleanOptionalAction,
        help="TensorFloat-32 in float32 convolutions and matrix products on GPUs that have it",
    )
    add("--channels-last", action=BooleanOptionalAction, help="memory layout NHWC")
    add("--fused-optimizer", action=BooleanOptionalAction, help="update all weights in one kernel")
    add(
        "--compile",
        **_one_of(["auto", "off", "default", "reduce-overhead", "max-autotune"]),
        help="torch.compile of the training step, which takes minutes the first time; "
        "auto: when the training is long enough to pay for it; "
        "reduce-overhead: with CUDA graphs",
    )
    add(
        "--checkpoint-activations",
        action=BooleanOptionalAction,
        help="compute what is inside blocks again in the backward pass: less memory, more time",
    )
    add(
        "--sync-bn",
        action=BooleanOptionalAction,
        help="batch normalisation over all GPUs of torchrun together; "
        "they wait for each other at every layer",
    )


class StageSpec(NamedTuple):
    """What is special to a stage: its name, its own flags, and the stage it starts from.

    Attributes:
        name: ``GE`` or ``IMTA``: the word for the stage in its program, its directories and its files.
        purpose: What the program does.
        title: Title of the group of its own flags.
        add_flags: Adds these.
        previous: Name of the stage whose network --pretrained names. If None, it names weights for a network
            of this stage.
        inherits_data: True: preset and data are always those of the network it starts from. False: only if
            neither was typed.
    """

    name: str
    purpose: str
    title: str
    add_flags: Callable[[Callable], None]
    previous: str | None = None
    inherits_data: bool = False

    @property
    def is_first(self) -> bool:
        """Whether no stage comes before this one."""
        return self.previous is None

    @property
    def program(self) -> str:
        """File of the program."""
        return f"train_{self.name}.py"

    def spellings(self) -> list[str]:
        """Return all spellings of its own flags."""
        parser = CommandLineParser(add_help=False)
        self.add_flags(parser.add_argument)
        return parser.spellings()


STAGES = {
    "GE": StageSpec(
        "GE",
        "Stage 1: train an MSDNet, or the network of --arch, by default with Gradient Equilibrium.",
        "pretrained weights",
        _add_stage_1,
    ),
    "IMTA": StageSpec(
        "IMTA",
        "Stage 2: train new classifiers with ISC and One-for-all distillation on a stage-1 network.",
        "collaboration and distillation",
        _add_stage_2,
        previous="GE",
        inherits_data=True,
    ),
}
