"""The command line of both training programs: flags in groups, and their defaults.

Example:
    command = parse("GE", ["--preset", "cifar100", "--lr", "0.2"])
    command.typed                # {"preset": "cifar100", "lr": 0.2}
    settings = command.settings()  # every setting of the run: as typed, else of the preset, else the default

The settings are an ``argparse.Namespace`` that nothing changes afterwards. Published flag spellings stay; the
names behind them are snake_case. ``argparse.SUPPRESS`` leaves out of the namespace what was not typed.

To add an option, add its default to ``DEFAULTS`` and its flag to a group below. Name it in ``INHERITED`` if
stage 2 takes it from stage 1's record, and in ``RESUMABLE`` if a resumed run may change it. An option of the
network alone is a line of ``models.options.NetworkOptions`` and a flag: default and inheritance follow.
"""

import argparse
import shlex
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from adaptive_inference.confidence import MEASURES
from image_data.parts import IMAGE_SIZES, SMALL_IMAGE_SIZE
from models.options import CHOICES, NETWORK_FIELDS, NetworkOptions
from presets import PRESETS
from utils import (
    CommandLineParser,
    UserError,
    above,
    at_least,
    available_cores,
    float_list,
    in_range,
    int_list,
    is_folder,
    share_or_count,
    user_path,
)

MAX_WORKERS, MAX_EPOCHS, MAX_DEFAULT_WORKERS = 1024, 10**6, 4

# General defaults; those of a preset take their place.
DEFAULTS: dict[str, Any] = {
    # often used
    "preset": "demo",
    "data": "demo",
    "data_root": Path("data"),
    "save": None,
    "resume": False,
    "overwrite": False,
    "evalmode": None,
    "epochs": 300,
    "batch_size": 64,
    "lr": 0.1,
    # run
    "evaluate_from": None,
    "measure": "softmax",
    "pretrained": None,
    "seed": 1,
    "deterministic": False,
    "gpu": None,
    "print_freq": 100,
    "save_every_steps": None,
    "save_every_minutes": None,
    # data
    "image_size": None,
    "val_size": None,
    "test_size": None,
    "split_seed": 0,
    "workers": min(available_cores(), MAX_DEFAULT_WORKERS),
    "skip_unreadable": False,
    "check_images": False,
    "augment": "standard",
    # network
    "arch": "msdnet",
    "exits": 4,
    **asdict(NetworkOptions()),
    "small_inputs": None,
    # collaboration and distillation
    "temperature": 1.0,
    "gamma": 0.1,
    "isc": True,
    "ofa": True,
    "isc_gradient": "cut",
    "kl_reduction": "sum",
    "backbone_bn": "frozen",
    "single_stage": False,
    "released": False,
    # optimisation
    "optimizer": "sgd",
    "pretrained_lr_factor": 0.1,
    "freeze": "none",
    "lr_type": "multistep",
    "lr_milestones": None,
    "decay_rate": 0.1,
    "warmup_epochs": 0.0,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "label_smoothing": 0.0,
    "ema_decay": None,
    "clip_grad": None,
    "accumulate": 1,
    # speed and memory
    "amp": "auto",
    "tf32": True,
    "channels_last": True,
    "fused_optimizer": True,
    "compile": "auto",
    "checkpoint_activations": False,
    "sync_bn": False,
}
MSDNET_OPTIONS = tuple(NETWORK_FIELDS)
# Values of --arch for networks of this project, with the options of this network alone. All other values are
# names of torchvision and timm.
OWN_NETWORKS = {"msdnet": set(MSDNET_OPTIONS) - {"gradient_equilibrium", "boosted_exits"}}
ADAMW_LR = 1e-3
# Stage 2 takes these from stage 1's record, unless they are typed.
INHERITED = (
    *("arch", "exits", *MSDNET_OPTIONS),
    *("data", "data_root", "image_size", "val_size", "test_size", "split_seed", "workers"),
    *("skip_unreadable", "check_images", "augment"),
)
# Options of a single launch: never taken from a checkpoint's record.
LAUNCH_ONLY = ("resume", "overwrite", "evalmode", "evaluate_from", "gpu")
# A resumed run may change these: where and how it runs, and by which measure it is evaluated.
RESUMABLE = {
    *LAUNCH_ONLY,
    *("data_root", "save", "measure", "print_freq", "save_every_steps", "save_every_minutes"),
    *("workers", "skip_unreadable", "check_images"),
}

RELEASED_CHOICES = {
    "gradient_equilibrium_scales": "coarsest",
    "initialization": "pytorch",
    "kl_reduction": "mean",
    "backbone_bn": "moving",
    "isc_gradient": "flow",
}

_PURPOSE = {
    "GE": "Stage 1: train an MSDNet, by default with Gradient Equilibrium.",
    "IMTA": "Stage 2: train new classifiers with ISC and One-for-all distillation on a stage-1 network.",
}
_EXAMPLES = """\
examples:
  python train_{stage}.py                                     the embedded demo, minutes on a CPU
  python train_{stage}.py --preset cifar100 --data-root data  the published CIFAR-100 settings
  python train_{stage}.py --data-root photos                  your images: photos/{{train,test}}/CLASS/*.jpg

A preset takes the place of the defaults shown, and flags take the place of the preset.
"""
_MUTUALLY_EXCLUSIVE = (
    ("resume", "overwrite"),
    ("single_stage", "pretrained"),
    ("evalmode", "resume"),
    ("evalmode", "overwrite"),
)


class CommandLine:
    """A parsed command line.

    Attributes:
        stage: ``GE`` or ``IMTA``.
        typed: Values of the flags that were typed, and what follows from them alone: the data set of
            ``--data-root``, and the preset of a data set.
        argv: The words of the command line.
    """

    def __init__(self, stage: str, typed: dict[str, Any], argv: list[str]):
        self.stage, self.typed, self.argv = stage, typed, argv

    def __str__(self) -> str:
        return shlex.join(["python", f"train_{self.stage}.py", *self.argv])

    def to_resume(self) -> str:
        """Return the whole command that resumes this run."""
        words = [word for word in self.argv if word not in ("--overwrite", "--resume")]
        return shlex.join(["python", f"train_{self.stage}.py", *words, "--resume"])

    def settings(
        self, stored: dict[str, Any] | None = None, inherited: dict[str, Any] | None = None
    ) -> Namespace:
        """Resolve every setting of a run: what was typed, over a record, over the preset, over the defaults.

        Args:
            stored: Settings in the record of a checkpoint to resume or to evaluate; they take the place of
                the preset.
            inherited: Settings in the record of the network to start from; its preset, data and network
                options hold here too. Where stage 1 takes other data, only the network's options and the
                image size do.

        Raises:
            UserError: The preset is not stage 1's, the held-out split is not the checkpoint's, or the images
                are gone.
        """
        typed = self.typed if stored or inherited else _with_data_and_preset(self.typed)
        takes_other_data = self.stage == "GE" and {"preset", "data"} & self.typed.keys()
        if inherited and takes_other_data:
            kept = (*MSDNET_OPTIONS, "arch", "exits", "image_size")
            inherited = {name: inherited[name] for name in kept if name in inherited}
        known = stored or inherited or {}
        self._check_images_are_there(known)
        self._check_split(known)
        if stored is not None:
            base = {name: value for name, value in stored.items() if name not in LAUNCH_ONLY}
        else:
            base = self._of_preset_and_origin(typed, inherited or {})
        values = DEFAULTS | {name: value for name, value in base.items() if name in DEFAULTS} | typed
        values["data_root"] = Path(values["data_root"])
        # The weights of other networks say which size they expect of images that can have any.
        size = IMAGE_SIZES[values["data"]]
        if values["image_size"] is None and (values["arch"] in OWN_NETWORKS or size <= SMALL_IMAGE_SIZE):
            values["image_size"] = size
        if values["small_inputs"] is None and values["image_size"] is not None:
            values["small_inputs"] = values["image_size"] <= SMALL_IMAGE_SIZE
        if values["lr_milestones"] is None:
            values["lr_milestones"] = (values["epochs"] * 0.5, values["epochs"] * 0.75)
        if values["pretrained"] is None:
            values["pretrained_lr_factor"] = 1.0
        return Namespace(**values)

    def refuse_changes(self, stored: dict[str, Any]) -> None:
        """Check that a resumed run is asked to continue as it began.

        Args:
            stored: Settings in its record.

        Raises:
            UserError: The first flag that asks for something else.
        """
        self.refuse_other_data(stored)
        for name, value in self.typed.items():
            before = stored.get(name)
            if name == "pretrained":  # recorded as the file that was found
                names = (str(before), Path(str(before)).stem)
                is_same = str(value) in names or str(before).startswith(str(value.resolve()))
                before = value if is_same else before
            if name not in RESUMABLE and name in stored and before != value:
                way = "use a new --save"
                if self.stage == "GE":
                    way = f"--pretrained {self.save_directory} with a new --save starts from its weights"
                raise UserError(
                    f"the run to resume has {flag_of(name)} {before}, the command line says {value}; {way}"
                )

    def refuse_other_data(self, stored: dict[str, Any]) -> None:
        """Check that --data-root, if it was typed, can be where the images of a recorded run are.

        Raises:
            UserError: The run was trained on the demo's images, which lie in no folder.
        """
        if stored.get("data") == "demo" and "data_root" in self.typed:
            raise UserError(
                f"the run in {self.save_directory} was trained on the demo's images, "
                f"not on those in --data-root {self.typed['data_root']}; "
                "--save names the run's directory"
            )

    @property
    def pretrained_run(self) -> Path | None:
        """The run or file of this project that --pretrained names; None for weights of a library."""
        is_own = self.typed.get("arch", DEFAULTS["arch"]) in OWN_NETWORKS
        return self.typed.get("pretrained") if is_own else None

    @property
    def save_directory(self) -> Path:
        """Directory of the run.

        It is --save; else save/PRESET/STAGE with --preset, or without --pretrained; else save/ARCH/STAGE for
        weights of a library; else a neighbour of the run that --pretrained names, or save/NAME/STAGE for a
        shipped network.
        """
        pretrained = self.typed.get("pretrained")
        if "save" in self.typed:
            return self.typed["save"]
        if "preset" in self.typed or pretrained is None:
            return Path("save") / self.typed.get("preset", DEFAULTS["preset"]) / self.stage
        if "arch" in self.typed:
            return Path("save") / self.typed["arch"].split("/")[-1] / self.stage
        if pretrained.is_dir() or pretrained.name in ("best.safetensors", "last.pt"):
            run = pretrained if pretrained.is_dir() else pretrained.parent
            return run.with_name(f"{run.name}_2" if self.stage == "GE" else self.stage)
        name = DEFAULTS["preset"] if self.stage == "IMTA" else pretrained.name.split(".")[0]
        return Path("save") / name / self.stage

    def _check_images_are_there(self, known: dict[str, Any]) -> None:
        if known.get("data", "demo") == "demo" or "data_root" in self.typed:
            return
        root = known.get("data_root")
        if root is None or not is_folder(root):
            were = f"are those of {known['data']}" if root is None else f"were in {root}"
            raise UserError(f"the images of this checkpoint {were}; pass --data-root DIR")

    def _check_split(self, known: dict[str, Any]) -> None:
        for name in ("val_size", "test_size", "split_seed"):
            before = known.get(name)
            if name in known and self.typed.get(name, before) != before:
                given = f"without {flag_of(name)}" if before is None else f"with {flag_of(name)} {before}"
                raise UserError(
                    f"the checkpoint's images were held out {given}, "
                    f"not with {self.typed[name]}; the split cannot change"
                )

    def _of_preset_and_origin(self, typed: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
        trained_with = inherited.get("preset")
        preset = typed.get("preset", trained_with or DEFAULTS["preset"])
        if trained_with not in (None, preset):
            raise UserError(
                f"stage 1 was trained with --preset {trained_with}, the command line says {preset}"
            )
        values = {"preset": preset, **PRESETS[preset]["both"], **PRESETS[preset][self.stage]}
        if typed.get("released"):
            values |= RELEASED_CHOICES
        if typed.get("optimizer") == "adamw":
            values["lr"] = ADAMW_LR
        if typed.get("data") == "folder":  # a preset does not know its number of images
            values["val_size"] = None
        return values | {name: inherited[name] for name in INHERITED if name in inherited}


def parse(stage: str, argv: list[str] | None = None) -> CommandLine:
    """Parse the command line of a stage.

    Args:
        stage: ``GE`` or ``IMTA``.
        argv: The words after the program's name; None reads ``sys.argv``.

    Raises:
        SystemExit: With status 2 and one line, for a flag or value that is not allowed; with status 0 after
            --help.
    """
    parser = build_parser(stage)
    typed = vars(parser.parse_args(argv))
    if conflict := _find_conflict(typed):
        parser.error(conflict)
    has_origin = "single_stage" not in typed and "pretrained" in typed
    # Then the record in --save says which data they are, and --data-root only where they lie now: neither
    # the data set nor the preset follows from what was typed.
    resumes_or_evaluates = "save" in typed and {"resume", "evalmode"} & typed.keys()
    inherits = stage == "IMTA" and (has_origin or ("save" in typed and "single_stage" not in typed))
    if not (inherits or resumes_or_evaluates):
        typed = _with_data_and_preset(typed)
    return CommandLine(stage, typed, sys.argv[1:] if argv is None else argv)


def _with_data_and_preset(typed: dict[str, Any]) -> dict[str, Any]:
    """Return what was typed, with the data set and the preset that follow from --data-root and --data."""
    typed = dict(typed)
    if "data_root" in typed and not {"data", "preset"} & typed.keys():
        typed["data"] = "folder"
    if "preset" not in typed and typed.get("data") in PRESETS:
        is_tuned = "pretrained" in typed and typed["data"] == "folder"
        typed["preset"] = "finetune" if is_tuned else typed["data"]
    return typed


def _find_conflict(typed: dict[str, Any]) -> str | None:
    for first, second in _MUTUALLY_EXCLUSIVE:
        if first in typed and second in typed:
            return f"{flag_of(first)} and {flag_of(second)} do not go together"
    if conflict := _optimizer_conflict(typed) or _arch_conflict(typed):
        return conflict
    if typed.get("compile", "auto") not in ("auto", "off") and typed.get("checkpoint_activations"):
        return "--compile and --checkpoint-activations do not go together"
    if "evaluate_from" in typed and "evalmode" not in typed:
        return "--evaluate-from needs --evalmode (anytime, dynamic or runtime)"
    return None


def _optimizer_conflict(typed: dict[str, Any]) -> str | None:
    if typed.get("optimizer") == "adamw" and (wrong := {"momentum", "nesterov"} & typed.keys()):
        return f"{flag_of(min(wrong))} belongs to --optimizer sgd"
    if typed.get("nesterov") and typed.get("momentum") == 0:
        return "--nesterov needs a --momentum above 0"
    return None


def _arch_conflict(typed: dict[str, Any]) -> str | None:
    arch = typed.get("arch", DEFAULTS["arch"])
    if arch in OWN_NETWORKS and "exits" in typed:
        return "--exits is for networks of torchvision and timm (--arch NAME)"
    for owner, options in OWN_NETWORKS.items():
        if owner != arch and (wrong := options & typed.keys()):
            return f"{flag_of(min(wrong))} is for --arch {owner}, not for --arch {arch}"
    return None


def from_record(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a record in the types of flags; a file holds lists for tuples."""
    settings = {name: value for name, value in recipe.items() if name in DEFAULTS}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return _flags()[name]


@cache
def _flags() -> dict[str, str]:
    return build_parser("IMTA").flags()


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
    """Return the parser of ``stage`` ("GE" or "IMTA"); it leaves out what was not typed."""
    parser = CommandLineParser(
        prog=f"train_{stage}.py",
        usage="%(prog)s [flags]",
        description=f"{_PURPOSE[stage]}\n\n{_EXAMPLES.format(stage=stage)}",
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Callable[[Callable], None]] = {
        "often used": _add_common,
        "run": _add_run,
        "data": _add_data,
        "network": _add_network,
        "optimisation": _add_optimisation,
        "speed and memory": _add_speed,
    }
    if stage == "IMTA":
        groups["collaboration and distillation"] = _add_stage_2
    for title, add_flags in groups.items():
        add_flags(parser.add_argument_group(title).add_argument)
    if stage == "GE":
        parser.flags_elsewhere = dict.fromkeys(_stage_2_flags(), "train_IMTA.py")
    return parser


def _stage_2_flags() -> list[str]:
    parser = CommandLineParser(add_help=False)
    _add_stage_2(parser.add_argument)
    return parser.spellings()


def _one_of(values: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of a flag with these values, typed in upper or lower case."""
    return {"choices": list(values), "type": str.lower}


_SEED = at_least(0, 2**32 - 2)


def _add_common(add: Callable) -> None:
    add(
        "--preset",
        **_one_of(PRESETS),
        help="base settings; other flags override them (default: that of --data, else demo)",
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
        "without --data and --preset its folders are the classes",
    )
    add(
        "--save",
        type=user_path,
        metavar="DIR",
        help="directory of this run (default: save/PRESET/GE or save/PRESET/IMTA)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in --save; start where none is",
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
        "with --arch: DEFAULT or another name of the library's weights, "
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
        help="the choices of the released program where it differs from the paper (its bugs left out); "
        "such a flag beside it still counts",
    )


def _add_data(add: Callable) -> None:
    add(
        "--image-size",
        type=at_least(1),
        metavar="PIXELS",
        help="height and width of images (default: 32, ImageNet and folders 224)",
    )
    add(
        "--val-size",
        type=at_least(0),
        metavar="N",
        help="training images held out to choose the best epoch and the thresholds "
        "(default: 1000, CIFAR 5000, ImageNet 50000, folders 10 %%)",
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
        help="threads that decode images of more than 64 pixels; 0: none beside the training "
        f"(default: as many as cores, at most {MAX_DEFAULT_WORKERS})",
    )
    add(
        "--skip-unreadable",
        action="store_true",
        help="continue without images that cannot be read: "
        "in training the next one of the epoch takes the place, in evaluation they are left out",
    )
    add(
        "--check-images",
        action="store_true",
        help="read every image once at the start, rather than meet an unreadable one later",
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
        type=exits,
        metavar="N|PATH,PATH",
        help="with --arch: number of exits, or the modules after which the early ones "
        "are, such as layer1,layer2",
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
        **_one_of(CHOICES["gradient_equilibrium_scales"]),
        help="scales whose gradients are rescaled: all (paper), or the exit's (released code)",
    )
    add(
        "--boosted-exits",
        action=BooleanOptionalAction,
        help="an exit adds its logits to half of those of the exit before (Boosted Dynamic Networks)",
    )
    add(
        "--init",
        dest="initialization",
        **_one_of(CHOICES["initialization"]),
        help="PyTorch's default initialisation, or He-normal by fan-out (the Lua program)",
    )


def add_msdnet_sizes(add: Callable) -> None:
    """Add the flags of an MSDNet's layers and channels, which the released programs have too."""
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
        help="block i >= 1 has STEP layers, or STEP * i + 1",
    )
    add(
        "--nChannels",
        dest="num_channels",
        type=at_least(1),
        metavar="N",
        help="channels of the first layer at the finest scale",
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


def _add_stage_2(add: Callable) -> None:
    add("--temperature", "-T", type=above(0), metavar="T", help="temperature of the distillation")
    add("--gamma", type=in_range(0, 1), metavar="G", help="weight of the distillation against the labels")
    add(
        "--isc",
        action=BooleanOptionalAction,
        help="Inline Subnetwork Collaboration: exits read the logits of the exit before them",
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


def exits(text: str) -> int | tuple[str, ...]:
    """Convert a number of exits, or paths of modules with commas between them."""
    return at_least(2)(text) if text.isdecimal() else tuple(text.split(","))


def _add_optimisation(add: Callable) -> None:
    add(
        "--optimizer",
        **_one_of(["sgd", "adamw"]),
        help=f"adamw begins at --lr {ADAMW_LR} where none is given",
    )
    add(
        "--pretrained-lr-factor",
        type=in_range(0),
        metavar="F",
        help="with --pretrained and --arch: "
        "the learning rate of pretrained parameters is F times that of new ones",
    )
    add("--freeze", **_one_of(["none", "backbone"]), help="backbone: with --arch, train the exits alone")
    add("--lr-type", **_one_of(["multistep", "cosine"]), help="learning rate after the warm-up")
    add(
        "--lr-milestones",
        type=float_list,
        metavar="E,E",
        help="epochs at which multistep decays (default: at 50 %% and 75 %%)",
    )
    add("--decay-rate", type=above(0), metavar="R", help="factor of every multistep decay")
    add("--warmup-epochs", type=in_range(0), metavar="E", help="epochs of linear warm-up")
    add("--momentum", type=in_range(0, 1), metavar="M", help="momentum of SGD")
    add("--nesterov", action=BooleanOptionalAction, help="Nesterov momentum")
    add("--weight-decay", "--wd", type=in_range(0), metavar="W", help="weight decay")
    add("--label-smoothing", type=in_range(0, 1), metavar="S", help="label smoothing of the cross-entropies")
    add(
        "--ema-decay",
        type=in_range(0, 1),
        metavar="D",
        help="evaluate and keep an exponential moving average of the weights, "
        "with this decay per step (default: the weights themselves)",
    )
    add("--clip-grad", type=above(0), metavar="NORM", help="clip the gradient's norm (default: no clipping)")
    add(
        "--accumulate",
        type=at_least(1),
        metavar="N",
        help="run a step's images in N parts, for less memory; the batch size stays",
    )


def _add_speed(add: Callable) -> None:
    add(
        "--amp",
        **_one_of(["auto", "off", "bf16", "fp16"]),
        help="mixed precision; auto: the 16-bit type that the device is faster with, off where none is",
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
