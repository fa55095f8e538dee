"""The command line of both training programs: flags in groups, and their defaults.

Example:
    command = parse("GE", ["--preset", "cifar100", "--lr", "0.2"])
    command.typed                # {"preset": "cifar100", "lr": 0.2}
    settings = command.settings()  # every setting of the run: as typed, else of the preset, else the default

*Settings* are what a run uses, an ``argparse.Namespace`` that nothing changes afterwards. A *record* holds
the settings of a run in the file of its network (``Description.recipe``; ``run.json`` repeats it for people):
a run is resumed from it (``stored``), or starts from it (``inherited``). Published flag spellings stay; the
names behind them are snake_case. ``argparse.SUPPRESS`` leaves out of the namespace what was not typed.

To add an option, add its default to ``DEFAULTS`` and its flag to a group below: ``_add_stage_1`` or
``_add_stage_2`` if one stage alone has it. Name it in ``INHERITED`` if stage 2 takes it from stage 1's
record, in ``RESUMABLE`` if a resumed run may change it, in ``EVALUABLE`` if an evaluation may, and in
``_REQUIRED`` or ``_MUTUALLY_EXCLUSIVE`` if it needs another flag or excludes one. An option of an MSDNet is a
line of ``models.options.MSDNetOptions`` and a flag: default and inheritance follow.
"""

import argparse
import shlex
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from adaptive_inference.confidence import MEASURES
from image_data.defaults import IMAGE_SIZES, SMALL_IMAGE_SIZE
from models.options import CHOICES, MSDNetOptions, current_value
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


class OwnNetwork(NamedTuple):
    """A kind of network of this project, by a value of --arch.

    Attributes:
        kind: Name of its class in ``models.ExitNetwork.kinds``. The constructor takes ``num_classes`` and the
            options as keyword arguments, and ``config`` holds them by the same names.
        options: Dataclass of its options and their defaults.
    """

    kind: str
    options: type


# All other values of --arch are names of torchvision and timm.
# Kinds share option names; the same name needs the same default.
OWN_NETWORKS = {"msdnet": OwnNetwork("MSDNet", MSDNetOptions)}

# General defaults; presets override them.
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
    **{name: value for own in OWN_NETWORKS.values() for name, value in asdict(own.options()).items()},
    "small_inputs": None,  # by the image size
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

LIBRARY_OPTIONS = ("exits", "gradient_equilibrium", "boosted_exits")
ADAMW_LR = 1e-3
# Stage 2 takes these from stage 1's record, with --arch and its options, unless they are typed.
INHERITED = (
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
# An evaluation follows these; the split is checked on its own. All others describe the training.
EVALUABLE = {
    *RESUMABLE,
    *("preset", "data", "image_size", "val_size", "test_size", "split_seed", "batch_size"),
    *("seed", "deterministic", "amp", "tf32", "channels_last"),
}

RELEASED_CHOICES = {
    "gradient_equilibrium_scales": "coarsest",
    # Also the default; it is here so that --released stays what it is if the default changes.
    "initialization": "pytorch",
    "kl_reduction": "mean",
    "backbone_bn": "moving",
    "isc_gradient": "flow",
}

_PURPOSE = {
    "GE": "Stage 1: train an MSDNet, or the network of --arch, by default with Gradient Equilibrium.",
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
    ("single_stage", "backbone_bn"),
    ("evalmode", "resume"),
    ("evalmode", "overwrite"),
)
# Flags that count only beside this value of another setting.
_REQUIRED: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("momentum", "nesterov"), ("optimizer", "sgd")),
    **dict.fromkeys(("lr_milestones", "decay_rate"), ("lr_type", "multistep")),
    **dict.fromkeys(("temperature", "gamma", "kl_reduction"), ("ofa", True)),
    "isc_gradient": ("isc", True),
    "gradient_equilibrium_scales": ("gradient_equilibrium", True),
}


class CommandLine:
    """A parsed command line.

    The methods name values of settings by where they come from:

    ============= ============================================================================
    ``typed``     the flags that were typed
    ``implied``   what follows from them where there is no record
    ``given``     ``typed`` over ``implied``; beside a record ``typed`` alone, without "auto"
    ``stored``    record of the run to resume or of the network to evaluate
    ``inherited`` record of the network to start from
    ``base``      ``stored``; for a new run its preset, under what ``inherited`` passes on
    ============= ============================================================================

    A run uses ``given`` over ``base`` over ``DEFAULTS``.

    Attributes:
        stage: ``GE`` or ``IMTA``.
        typed: Values of the flags that were typed.
        implied: The data set of --data-root and the preset of a data set, where they follow from what was
            typed. The record of a run or of stage 1 takes their place.
        argv: The words of the command line.
    """

    def __init__(self, stage: str, typed: dict[str, Any], argv: list[str]):
        self.stage, self.typed, self.argv = stage, typed, argv
        self.implied = _implied(typed)

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
            stored: Record of the run to resume or of the network to evaluate; it takes the place of the
                preset.
            inherited: Record of the network to start from; its preset, data and network options hold here
                too. Where stage 1 takes other data, only the network's options and the image size do.

        Raises:
            UserError: A flag that the network or the other settings have no use for, a preset that is not
                stage 1's, a held-out split that is not the record's, or images that are gone.
        """
        has_record = stored is not None or (inherited is not None and self.stage == "IMTA")
        given = self._beside_record() if has_record else {**self.implied, **self.typed}
        if inherited and self.stage == "GE" and ("preset" in given or "data" in given):
            kept = ("arch", *option_names(_arch(inherited)), "image_size")
            inherited = {name: inherited[name] for name in kept if name in inherited}
        record = stored or inherited or {}
        self._check_images_are_there(record)
        self._check_split(record)
        if stored is not None:
            base = {name: value for name, value in stored.items() if name not in LAUNCH_ONLY}
        else:
            base = self._base_settings(given, inherited or {})
        values = DEFAULTS | {name: value for name, value in base.items() if name in DEFAULTS} | given
        if problem := _unused_flag(self.typed, values):
            raise UserError(problem)
        return Namespace(**_complete(values))

    def refuse_changes(self, stored: dict[str, Any]) -> None:
        """Check that nothing was typed that the run to resume, or the network to evaluate, cannot follow.

        Args:
            stored: Record of the run or network.

        Raises:
            UserError: The first flag that asks for something else.
        """
        self.refuse_other_data(stored)
        if conflict := _arch_conflict(self.typed, _arch(stored)):
            raise UserError(conflict)
        if "evalmode" in self.typed:  # the network's file says more of its options than the record
            may_differ = {*EVALUABLE, *all_option_names()}
            what, way = "network to evaluate", "--evalmode trains nothing"
        else:
            may_differ, what, way = RESUMABLE, "run to resume", "use a new --save"
            if self.stage == "GE":
                way = f"--pretrained {self.save_directory} with a new --save starts from its weights"
        for name, value in self._beside_record().items():
            # A released network has no record. Its training command, with --evalmode added, evaluates it.
            is_unknown = "evalmode" in self.typed and name not in stored
            if name in may_differ or is_unknown:
                continue
            before = stored.get(name, DEFAULTS[name])  # older records lack newer settings
            if before != value and not (name == "pretrained" and _is_same_origin(before, value)):
                raise UserError(
                    f"the {what} has {flag_of(name)} {before}, the command line says {value}; {way}"
                )

    def _beside_record(self) -> dict[str, Any]:
        """Return what was typed but "auto", which beside a record stands for what the record says."""
        return {name: value for name, value in self.typed.items() if value != "auto"}

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
        is_own = self.stage == "IMTA" or _arch(self.typed) in OWN_NETWORKS
        return self.typed.get("pretrained") if is_own else None

    @property
    def save_directory(self) -> Path:
        """Directory of the run.

        ====================================== =================================================
        typed                                  directory
        ====================================== =================================================
        ``--save DIR``                         DIR
        a preset, or no ``--pretrained``       save/PRESET/STAGE
        weights of a library                   save/ARCH/STAGE
        ``--pretrained`` run, stage 1          RUN_2
        ``--pretrained`` run, stage 2          IMTA beside the run
        ``--pretrained`` file or name, stage 1 save/NAME/GE
        ``--pretrained`` file or name, stage 2 save/demo/IMTA
        ====================================== =================================================

        The preset of a data set counts as typed, but for stage 2 on a network that --pretrained names.
        """
        pretrained = self.typed.get("pretrained")
        if "save" in self.typed:
            return self.typed["save"]
        implied = {} if self.stage == "IMTA" and pretrained is not None else self.implied
        preset = self.typed.get("preset", implied.get("preset"))
        if preset is not None or pretrained is None:
            return Path("save") / (preset or DEFAULTS["preset"]) / self.stage
        if self.pretrained_run is None:
            return Path("save") / _arch(self.typed).split("/")[-1] / self.stage
        if pretrained.is_dir() or pretrained.name in ("best.safetensors", "last.pt"):
            run = pretrained if pretrained.is_dir() else pretrained.parent
            return run.with_name(f"{run.name}_2" if self.stage == "GE" else self.stage)
        name = DEFAULTS["preset"] if self.stage == "IMTA" else pretrained.name.split(".")[0]
        return Path("save") / name / self.stage

    def _check_images_are_there(self, record: dict[str, Any]) -> None:
        if record.get("data", "demo") == "demo" or "data_root" in self.typed:
            return
        root = record.get("data_root")
        if root is None or not is_folder(root):
            were = f"are those of {record['data']}" if root is None else f"were in {root}"
            raise UserError(f"the images of this checkpoint {were}; pass --data-root DIR")

    def _check_split(self, record: dict[str, Any]) -> None:
        for name in ("val_size", "test_size", "split_seed"):
            before = record.get(name)
            if name in record and self.typed.get(name, before) != before:
                given = f"without {flag_of(name)}" if before is None else f"with {flag_of(name)} {before}"
                raise UserError(
                    f"the checkpoint's images were held out {given}, "
                    f"not with {self.typed[name]}; the split cannot change"
                )

    def _base_settings(self, given: dict[str, Any], inherited: dict[str, Any]) -> dict[str, Any]:
        """Return the settings below the flags of a new run: those of the preset, and of stage 1's record."""
        trained_with = inherited.get("preset")
        preset = given.get("preset", trained_with or DEFAULTS["preset"])
        if trained_with not in (None, preset):
            raise UserError(
                f"stage 1 was trained with --preset {trained_with}, the command line says {preset}"
            )
        values = {"preset": preset, **PRESETS[preset]["both"], **PRESETS[preset][self.stage]}
        if given.get("released"):
            values |= RELEASED_CHOICES
        if given.get("optimizer") == "adamw":
            values["lr"] = ADAMW_LR
        if given.get("data") == "folder":  # a preset does not know its number of images
            values["val_size"] = None
        names = ("arch", *option_names(_arch(inherited)), *INHERITED)
        return values | {name: inherited[name] for name in names if name in inherited}


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
    return CommandLine(stage, typed, sys.argv[1:] if argv is None else argv)


def option_names(arch: str) -> tuple[str, ...]:
    """Return the settings that are options of the networks of a value of --arch."""
    own = OWN_NETWORKS.get(arch)
    return LIBRARY_OPTIONS if own is None else tuple(field.name for field in fields(own.options))


def all_option_names() -> set[str]:
    """Return the settings that are options of a network, whatever its kind."""
    return {*LIBRARY_OPTIONS}.union(*map(option_names, OWN_NETWORKS))


def _arch(settings: dict[str, Any]) -> str:
    return settings.get("arch", DEFAULTS["arch"])


def _implied(typed: dict[str, Any]) -> dict[str, Any]:
    """Return the data set and the preset that follow from --data-root and --data."""
    implied = {}
    if "data_root" in typed and not {"data", "preset"} & typed.keys():
        implied["data"] = "folder"
    data = typed.get("data", implied.get("data"))
    if "preset" not in typed and data in PRESETS:
        implied["preset"] = "finetune" if "pretrained" in typed and data == "folder" else data
    return implied


def _is_same_origin(recorded: str | Path | None, typed: Path) -> bool:
    """Return True if --pretrained names the recorded file, its run, or its name in ``weights/``."""
    if recorded is None:
        return False
    path = Path(recorded).resolve()
    return str(typed) == Path(recorded).stem or typed.resolve() in (path, *path.parents)


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those that depend on others, without options of other kinds of networks."""
    values = dict(values)
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
    others = all_option_names() - {*option_names(values["arch"])}
    return {name: value for name, value in values.items() if name not in others}


def _find_conflict(typed: dict[str, Any]) -> str | None:
    for first, second in _MUTUALLY_EXCLUSIVE:
        if first in typed and second in typed:
            return f"{flag_of(first)} and {flag_of(second)} do not go together"
    if typed.get("nesterov") and typed.get("momentum") == 0:
        return "--nesterov needs a --momentum above 0"
    if typed.get("compile", "auto") not in ("auto", "off") and typed.get("checkpoint_activations"):
        return "--compile and --checkpoint-activations do not go together"
    if "evaluate_from" in typed and "evalmode" not in typed:
        return "--evaluate-from needs --evalmode (anytime, dynamic or runtime)"
    return None


def _unused_flag(typed: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Return a line about the first flag that would change nothing, None if there is none."""
    if conflict := _arch_conflict(typed, settings["arch"]):
        return conflict
    for name, (other, value) in _REQUIRED.items():
        if name in typed and settings[other] != value:
            return f"{flag_of(name)} belongs to {flag_of(other)}{'' if value is True else f' {value}'}"
    if "pretrained_lr_factor" in typed and settings["pretrained"] is None:
        return f"{flag_of('pretrained_lr_factor')} needs --pretrained"
    return None


def _arch_conflict(typed: dict[str, Any], arch: str) -> str | None:
    """Return a line about the first option of other kinds of networks, None if there is none."""
    wrong = sorted(all_option_names() & typed.keys() - {*option_names(arch)})
    if not wrong:
        return None
    owners = [f"--arch {own}" for own in OWN_NETWORKS if wrong[0] in option_names(own)]
    if wrong[0] in LIBRARY_OPTIONS:
        owners.append("networks of torchvision and timm (--arch NAME)")
    return f"{flag_of(wrong[0])} is for {' and '.join(owners)}, not for --arch {arch}"


def from_record(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a record in types and values of today's flags; files hold lists for tuples."""
    settings = {name: value for name, value in record.items() if name in DEFAULTS}
    return {
        name: tuple(value) if isinstance(value, list) else current_value(name, value)
        for name, value in settings.items()
    }


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return {**build_parser("GE").flags(), **build_parser("IMTA").flags()}[name]


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
    own, elsewhere = _STAGE_FLAGS[stage], _STAGE_FLAGS["IMTA" if stage == "GE" else "GE"]
    groups[own.title] = own.add_flags
    for title, add_flags in groups.items():
        add_flags(parser.add_argument_group(title).add_argument)
    parser.flags_elsewhere = dict.fromkeys(elsewhere.spellings(), elsewhere.program)
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
        help="the choices of the released code where it differs from the paper (its bugs left out); "
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
        type=_exits,
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
        choices=CHOICES["gradient_equilibrium_scales"],
        type=lambda text: current_value("gradient_equilibrium_scales", text.lower()),
        help="scales whose gradients are rescaled: all (paper), or the exit's (released code)",
    )
    add(
        "--boosted-exits",
        action=BooleanOptionalAction,
        help="an exit adds its logits to half of those of the previous exit (Boosted Dynamic Networks)",
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


def _add_stage_1(add: Callable) -> None:
    add(
        "--pretrained-lr-factor",
        type=in_range(0),
        metavar="F",
        help="with --pretrained and --arch: "
        "the learning rate of pretrained parameters is F times that of new ones",
    )
    add("--freeze", **_one_of(["none", "backbone"]), help="backbone: with --arch, train the exits alone")


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
        help=f"adamw begins at --lr {ADAMW_LR} where none is given",
    )
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


class _StageFlags(NamedTuple):
    """Flags that one stage has and the other has not."""

    program: str
    title: str
    add_flags: Callable[[Callable], None]

    def spellings(self) -> list[str]:
        parser = CommandLineParser(add_help=False)
        self.add_flags(parser.add_argument)
        return parser.spellings()


_STAGE_FLAGS = {
    "GE": _StageFlags("train_GE.py", "pretrained weights", _add_stage_1),
    "IMTA": _StageFlags("train_IMTA.py", "collaboration and distillation", _add_stage_2),
}
