"""The command line of both stages: the only place that sees strings.

``parse("GE", argv)`` gives a ``CommandLine``; its ``settings()`` are what was typed, over what a checkpoint stored, over a preset, over the
defaults below. Published flag spellings stay; everything behind them is typed and named in snake_case.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from adaptive_inference.policies import MEASURES
from utils import CommandLineParser, UserError

DEFAULTS = {
    "preset": "demo",
    "save": None,
    "resume": False,
    "overwrite": False,
    "evalmode": None,
    "evaluate_from": None,
    "confidence": "softmax",
    "pretrained": None,
    "seed": 1,
    "deterministic": False,
    "gpu": None,
    "print_freq": 100,
    "save_every_steps": None,
    "save_every_minutes": None,
    "data_root": Path("data"),
    "image_size": None,
    "val_size": None,
    "split_seed": 0,
    "limit_train": None,
    "limit_test": None,
    "workers": None,
    "skip_unreadable": False,
    "augment": "standard",
    "num_blocks": 5,
    "base": 1,
    "step": 1,
    "step_mode": "even",
    "num_channels": 16,
    "growth_rate": 6,
    "growth_factors": (1, 2, 4),
    "bottleneck_factors": (1, 2, 4),
    "bottleneck": True,
    "prune": "max",
    "reduction": 0.5,
    "small_inputs": None,
    "gradient_equilibrium": True,
    "gradient_equilibrium_scales": "trunk",
    "initialization": "pytorch",
    "temperature": 1.0,
    "gamma": 0.1,
    "isc": True,
    "ofa": True,
    "isc_gradient": "cut",
    "kl_reduction": "sum",
    "backbone_bn": "frozen",
    "single_stage": False,
    "released": False,
    "epochs": 300,
    "batch_size": 64,
    "lr": 0.1,
    "lr_type": "multistep",
    "lr_milestones": None,
    "decay_rate": 0.1,
    "warmup_epochs": 0.0,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "label_smoothing": 0.0,
    "clip_grad": None,
    "accumulate": 1,
    "amp": "auto",
    "tf32": True,
    "channels_last": None,
    "fused_optimizer": True,
    "compile": "off",
    "checkpoint_activations": False,
    "sync_bn": False,
}

MOST_WORKERS, MOST_EPOCHS = 1024, 10**6

_CIFAR_5_EXITS = {"num_blocks": 5, "step_mode": "lin_grow", "step": 1, "base": 1, "num_channels": 16, "growth_rate": 6}
_CIFAR_7_EXITS = {"num_blocks": 7, "step_mode": "even", "step": 2, "base": 4, "num_channels": 16, "growth_rate": 6}
_BATCH_512_COSINE = {"batch_size": 512, "lr": 0.8, "lr_type": "cosine"}
_BATCH_64_MULTISTEP = {"batch_size": 64, "lr": 0.1, "lr_type": "multistep"}

# Published settings (shared by both stages, then those of each). Sources: kalviny/MSDNet-PyTorch for CIFAR-10 and the 7-exit network,
# yifanpu001/IMTA for CIFAR-100 with 5 exits and for every CIFAR stage 2, kalviny/IMTA for ImageNet.
PRESETS = {
    "demo": {
        "both": {
            "data": "demo",
            "val_size": 1000,
            "augment": "none",
            "num_blocks": 4,
            "step_mode": "lin_grow",
            "num_channels": 4,
            "growth_rate": 4,
            "batch_size": 32,
            "lr_type": "cosine",
            "channels_last": False,  # slower for so few channels
            "fused_optimizer": False,  # rounds otherwise; the demo's margins were measured without
        },
        "GE": {"epochs": 5, "lr": 0.1, "warmup_epochs": 0.5},
        "IMTA": {"epochs": 3, "lr": 0.02},
    },
    "cifar10": {
        "both": {"data": "cifar10", "val_size": 5000, **_CIFAR_5_EXITS},
        "GE": {"epochs": 300, **_BATCH_64_MULTISTEP},
        "IMTA": {"epochs": 180, **_BATCH_512_COSINE},
    },
    "cifar100": {
        "both": {"data": "cifar100", "val_size": 5000, **_CIFAR_5_EXITS},
        "GE": {"epochs": 300, **_BATCH_512_COSINE},
        "IMTA": {"epochs": 180, **_BATCH_512_COSINE},
    },
    "cifar100-anytime": {
        "both": {"data": "cifar100", "val_size": 5000, **_CIFAR_7_EXITS},
        "GE": {"epochs": 300, **_BATCH_64_MULTISTEP},
        "IMTA": {"epochs": 180, **_BATCH_512_COSINE},
    },
    "imagenet": {
        "both": {
            "data": "imagenet",
            "val_size": 50000,
            "num_blocks": 5,
            "step_mode": "even",
            "step": 4,
            "base": 4,
            "num_channels": 32,
            "growth_rate": 16,
            "growth_factors": (1, 2, 4, 4),
            "bottleneck_factors": (1, 2, 4, 4),
            "epochs": 90,
            "batch_size": 256,
            "lr": 0.1,
            "lr_milestones": (30.0, 60.0),
        },
        "GE": {},
        "IMTA": {},
    },
}

# What a resumed run may change: where and how it runs, never what it computes.
RUNTIME_OPTIONS = {
    *(
        "save",
        "resume",
        "overwrite",
        "evalmode",
        "evaluate_from",
        "confidence",
        "gpu",
        "print_freq",
        "save_every_steps",
        "save_every_minutes",
    ),
    *("data_root", "workers", "limit_test", "skip_unreadable"),
}

# What stage 2 takes over from stage 1 unless told otherwise.
INHERITED_OPTIONS = (
    *("data", "data_root", "image_size", "val_size", "split_seed", "limit_train", "limit_test", "augment", "workers", "skip_unreadable"),
    *("num_blocks", "base", "step", "step_mode", "num_channels", "growth_rate", "growth_factors", "bottleneck_factors", "bottleneck"),
    *("prune", "reduction", "small_inputs", "gradient_equilibrium", "gradient_equilibrium_scales", "initialization"),
)

# The flag of every option, for messages.
FLAGS = {
    **{name: "--" + name.replace("_", "-") for name in ["data", *DEFAULTS]},
    "num_blocks": "--nBlocks",
    "step_mode": "--stepmode",
    "num_channels": "--nChannels",
    "growth_rate": "--growthRate",
    "growth_factors": "--grFactor",
    "bottleneck_factors": "--bnFactor",
    "gradient_equilibrium_scales": "--ge-scales",
    "initialization": "--init",
    "kl_reduction": "--kl",
}

# --released: the released program's side of the decision table, but for its bugs.
RELEASED_CHOICES = {
    "gradient_equilibrium_scales": "coarsest",
    "initialization": "pytorch",
    "kl_reduction": "mean",
    "backbone_bn": "moving",
    "isc_gradient": "flow",
}


class CommandLine:
    """A parsed command line: what was typed (``explicit``), and the settings that follow from it."""

    def __init__(self, stage: str, explicit: dict, argv: list[str]):
        self.stage, self.explicit, self.argv = stage, explicit, argv

    def __str__(self) -> str:
        return shlex.join(["python", f"train_{self.stage}.py", *self.argv])

    def settings(self, stored: dict | None = None, inherited: dict | None = None) -> argparse.Namespace:
        """The settings of a run.

        Args:
            stored: those of a checkpoint to go on from or to evaluate; they take the place of the preset.
            inherited: those of the stage-1 run; its preset, data and network options hold here too.

        Raises:
            UserError: a preset that is not stage 1's, another held-out split than the checkpoint's, or images that have gone.
        """
        known = stored or inherited or {}
        if known.get("data", "demo") != "demo" and "data_root" not in self.explicit and not Path(known.get("data_root", "")).is_dir():
            raise UserError(f"the images of this checkpoint were in {known['data_root']}; say with --data-root where they are")
        for name in ("val_size", "split_seed"):
            before = known.get(name)
            if name in known and self.explicit.get(name, before) != before:
                given = f"without {FLAGS[name]}" if before is None else f"with {FLAGS[name]} {before}"
                raise UserError(f"the checkpoint's images were held out {given}, not with {self.explicit[name]}; they stay so")
        if stored is not None:
            base = {**DEFAULTS, **stored}
        else:
            inherited = inherited or {}
            trained_with = inherited.get("preset")
            if trained_with and self.explicit.get("preset", trained_with) != trained_with:
                raise UserError(f"stage 1 was trained with --preset {trained_with}, the command line says {self.explicit['preset']}")
            base = self._from_preset(inherited.get("preset", DEFAULTS["preset"]))
            base |= {name: inherited[name] for name in INHERITED_OPTIONS if name in inherited}
        return argparse.Namespace(**{**base, "data_root": Path(base["data_root"]), **self.explicit})

    def refuse_changes(self, stored: dict) -> None:
        """A resumed run must go on as it began.

        Raises:
            UserError: names the first flag that asks for something else.
        """
        for name, value in self.explicit.items():
            before = stored.get(name)
            if name == "pretrained":  # stored as the file that was found
                value, before = value.resolve(), value.resolve() if str(before).startswith(str(value.resolve())) else before
            if name not in RUNTIME_OPTIONS and name in stored and before != value:
                raise UserError(f"the run to resume has {FLAGS[name]} {before}, the command line says {value}; use a new --save for that")

    @property
    def save_directory(self) -> Path:
        """--save; else a neighbour of the --pretrained run; else save/<preset>/<stage>."""
        if "save" in self.explicit:
            return self.explicit["save"]
        origin = self.explicit.get("pretrained")
        if "preset" not in self.explicit and origin is not None:
            if origin.is_dir():
                return origin.parent / self.stage
            if origin.name in ("best.pt", "last.pt"):
                return origin.parent.parent / self.stage
        return Path("save") / self.explicit.get("preset", DEFAULTS["preset"]) / self.stage

    def _from_preset(self, preset: str) -> dict:
        chosen = PRESETS[self.explicit.get("preset", preset)]
        released = RELEASED_CHOICES if self.explicit.get("released") else {}
        share = {"val_size": None} if self.explicit.get("data") == "folder" else {}  # a preset knows nothing of its number of images
        return {**DEFAULTS, "preset": preset, **chosen["both"], **chosen[self.stage], **released, **share}


def parse(stage: str, argv: list[str] | None = None) -> CommandLine:
    """Parse the command line of ``stage`` ("GE" or "IMTA"); ``argv`` None reads ``sys.argv``.

    Raises:
        SystemExit: with status 2 and one line, for a flag or value that is not allowed; with status 0 after --help.
    """
    parser = build_parser(stage)
    explicit = vars(parser.parse_args(argv))
    if explicit.get("nesterov") and explicit.get("momentum") == 0:
        parser.error("--nesterov needs a --momentum above 0")
    for first, second in (("resume", "overwrite"), ("single_stage", "pretrained"), ("evalmode", "resume"), ("evalmode", "overwrite")):
        if first in explicit and second in explicit:
            parser.error(f"--{first.replace('_', '-')} and --{second.replace('_', '-')} do not go together")
    if "evaluate_from" in explicit and "evalmode" not in explicit:
        parser.error("--evaluate-from needs --evalmode (anytime, dynamic or runtime)")
    has_origin = stage == "IMTA" and "single_stage" not in explicit and bool({"pretrained", "save"} & explicit.keys())
    if "preset" not in explicit and explicit.get("data") in PRESETS and not has_origin:
        explicit["preset"] = explicit["data"]  # not the demo's small network
    return CommandLine(stage, explicit, sys.argv[1:] if argv is None else argv)


def build_parser(stage: str) -> argparse.ArgumentParser:
    """The parser of ``stage`` ("GE" or "IMTA"); it leaves out what was not typed."""
    purpose = {
        "GE": "Stage 1: train an MSDNet, by default with Gradient Equilibrium.",
        "IMTA": "Stage 2: train new classifiers with ISC and One-for-all distillation on a stage-1 network.",
    }[stage]
    parser = CommandLineParser(
        prog=f"train_{stage}.py",
        description=purpose + " Without flags: the embedded demo. Defaults shown are those of --preset demo.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    demo = {**DEFAULTS, **PRESETS["demo"]["both"], **PRESETS["demo"][stage]}

    def adder(title: str) -> Callable:
        group = parser.add_argument_group(title)

        def add(*flags: str, help: str, shown: str | None = None, **options) -> None:
            name = options.get("dest") or flags[0].lstrip("-").replace("-", "_")
            default = shown if shown is not None else _shown(demo[name])
            group.add_argument(*flags, help=f"{help} (default: {default})".replace("%", "%%"), **options)

        return add

    on_off = {"action": argparse.BooleanOptionalAction}
    switch = {"action": "store_true"}

    add = adder("run")
    add(
        "--preset",
        choices=list(PRESETS),
        shown="that of --data, else demo",
        help="settings that all other flags change: the demo, or published ones",
    )
    add("--save", type=Path, metavar="DIR", shown=f"save/PRESET/{stage}", help="directory of this run: checkpoints, log, tables, curves")
    add("--resume", **switch, help="go on from DIR's last checkpoint, with the settings stored there; start where none is")
    add("--overwrite", **switch, help="start anew in a directory that holds a run")
    add(
        "--evalmode",
        "--eval",
        nargs="?",
        const="dynamic",
        choices=["anytime", "dynamic", "runtime"],
        shown="train, then anytime and dynamic",
        help="evaluate only: every exit on its own (anytime), budgeted batch prediction (dynamic, also when no mode is given), "
        "or measured time of the policies that dynamic wrote (runtime)",
    )
    add("--evaluate-from", type=Path, metavar="FILE", shown="DIR/best.pt", help="checkpoint to evaluate, ours or a released one")
    add(
        "--confidence",
        choices=list(MEASURES),
        help="what decides whether an image leaves: largest softmax probability (the paper), entropy, margin of the two largest, or how "
        "many exits in a row agree (patience)",
    )
    if stage == "IMTA":
        add(
            "--pretrained",
            type=Path,
            metavar="PATH",
            shown="the directory GE beside DIR",
            help="stage-1 checkpoint (ours or a released one), or directory of a stage-1 run",
        )
    add("--seed", type=_at_least(0, 2**32 - 2), metavar="N", help="seed of initialisation, order and augmentation")
    add("--deterministic", **switch, help="only operations that repeat bit for bit on the same machine")
    add("--gpu", type=_int_list(","), metavar="IDS", shown="the first GPU, or the CPU", help="GPU or GPUs of this process, such as 0,1,2,3")
    add("--print-freq", "-p", type=_at_least(1), metavar="N", help="steps between two lines of the log")
    add("--save-every-steps", type=_at_least(1), metavar="N", shown="at the end of an epoch", help="also save a checkpoint every N steps")
    add("--save-every-minutes", type=_above(0), metavar="M", shown="at the end of an epoch", help="also save a checkpoint every M minutes")

    add = adder("data")
    data_sets = ["demo", "cifar10", "cifar100", "imagenet", "folder"]
    add("--data", type=str.lower, choices=data_sets, help="data set; folder: any images in train/CLASS/")
    add("--data-root", type=_folder, metavar="DIR", help="folder with train/ and test/ or val/, or torchvision's CIFAR archive")
    add("--image-size", type=_at_least(1), metavar="PIXELS", shown="32, ImageNet and folders 224", help="height and width of images")
    held_out = "training images held out to choose the best epoch and the thresholds"
    add("--val-size", type=_at_least(0), metavar="N", shown="1000, CIFAR 5000, ImageNet 50000, folders 10 %", help=held_out)
    add("--split-seed", type=_at_least(0, 2**32 - 2), metavar="N", help="seed of the choice of held-out images")
    add("--limit-train", type=_at_least(1), metavar="N", shown="all", help="train on N images only, chosen by --split-seed")
    add("--limit-test", type=_at_least(1), metavar="N", shown="all", help="test on N images only, chosen by --split-seed")
    workers = {"type": _at_least(0, MOST_WORKERS), "metavar": "N", "shown": "one a core, at most 4"}
    add("--workers", "-j", **workers, help="processes that decode large images")
    add("--skip-unreadable", **switch, help="read every image once at the start, and go on without those that cannot be read")
    add(
        "--augment",
        choices=["standard", "trivial", "randaugment", "none"],
        help="standard: padded random crop (small images) or random resized crop, and flip; trivial, randaugment: TrivialAugment or "
        "RandAugment after that, image by image: on a GPU that is slow for small images",
    )

    add = adder("network")
    add("--nBlocks", dest="num_blocks", type=_at_least(1), metavar="K", help="blocks, and so exits")
    add("--base", type=_at_least(1), metavar="N", help="layers of the first block")
    add("--step", type=_at_least(1), metavar="N", help="layers of every further block (even), or their growth (lin_grow)")
    add("--stepmode", dest="step_mode", choices=["even", "lin_grow"], help="block i >= 1 has STEP layers, or STEP * i + 1")
    add("--nChannels", dest="num_channels", type=_at_least(1), metavar="N", help="channels of the first layer at the finest scale")
    add("--growthRate", dest="growth_rate", type=_at_least(1), metavar="N", help="new channels of a layer at the finest scale")
    add("--grFactor", dest="growth_factors", type=_int_list("-"), metavar="1-2-4", help="channel multiple of every scale, finest first")
    add("--bnFactor", dest="bottleneck_factors", type=_int_list("-"), metavar="1-2-4", help="bottleneck multiple of every scale")
    add("--bottleneck", **on_off, help="1x1 convolutions before the 3x3 ones")
    add("--prune", choices=["max", "min"], help="drop fine scales evenly over the depth (max) or in the last layers (min)")
    add("--reduction", type=_in_range(0, 1), metavar="R", help="share of channels a transition keeps; 0: no transitions")
    add("--small-inputs", **on_off, shown="up to 64 pixels", help="stem and exits of the CIFAR networks, not of the ImageNet ones")
    add("--gradient-equilibrium", "--GE", **on_off, help="rescale gradients at the exits; off: plain MSDNet")
    add(
        "--ge-scales",
        dest="gradient_equilibrium_scales",
        choices=["trunk", "coarsest"],
        help="scales whose gradients are rescaled: all (paper), or only the exit's (released code)",
    )
    add("--init", dest="initialization", choices=["pytorch", "he"], help="PyTorch's default initialisation, or He-normal (Lua program)")

    if stage == "IMTA":
        add = adder("collaboration and distillation")
        add("--temperature", "-T", type=_above(0), metavar="T", help="temperature of the distillation")
        add("--gamma", type=_in_range(0, 1), metavar="G", help="weight of the distillation against the labels")
        add("--isc", **on_off, help="Inline Subnetwork Collaboration: exits read the logits of the exit before them")
        add("--ofa", **on_off, help="One-for-all distillation: exits learn from the last exit of stage 1")
        add("--isc-gradient", choices=["cut", "flow"], help="gradient from an exit into the one before: cut (paper), flow (released code)")
        add("--kl", dest="kl_reduction", choices=["sum", "mean"], help="over classes: sum (paper), mean (released code, 1/C of the weight)")
        add("--backbone-bn", choices=["frozen", "moving"], help="BatchNorm of the frozen network: frozen (paper), moving (released code)")
        add("--single-stage", **switch, help="train network and classifiers at once from scratch (GE + ISC + OFA)")
    choices = [FLAGS[name] for name in RELEASED_CHOICES if stage == "IMTA" or name in INHERITED_OPTIONS]
    add("--released", **switch, help=f"{', '.join(choices)} as in the released program; such a flag beside it still counts")

    add = adder("optimisation")
    add("--epochs", type=_at_least(1, MOST_EPOCHS), metavar="N", help="passes over the training images")
    add("--batch-size", "-b", type=_at_least(1), metavar="N", help="images a step, over all processes and GPUs")
    add("--lr", "--learning-rate", type=_above(0), metavar="LR", help="peak learning rate")
    add("--lr-type", choices=["multistep", "cosine"], help="schedule after the warm-up")
    add("--lr-milestones", type=_float_list, metavar="E,E", shown="at 50 % and 75 %", help="epochs at which multistep decays")
    add("--decay-rate", type=_above(0), metavar="R", help="factor of every multistep decay")
    add("--warmup-epochs", type=_in_range(0, None), metavar="E", help="epochs of linear warm-up")
    add("--momentum", type=_in_range(0, 1), metavar="M", help="momentum of SGD")
    add("--nesterov", **on_off, help="Nesterov momentum")
    add("--weight-decay", "--wd", type=_in_range(0, None), metavar="W", help="weight decay")
    add("--label-smoothing", type=_in_range(0, 1), metavar="S", help="label smoothing of the cross-entropies")
    add("--clip-grad", type=_above(0), metavar="NORM", shown="no clipping", help="clip the gradient's norm")
    add("--accumulate", type=_at_least(1), metavar="N", help="work a step's images off in N parts, for less memory; the batch size stays")

    add = adder("speed and memory")
    add(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        help="mixed precision; auto: on GPUs bf16, or fp16 where that is not supported; off on CPUs",
    )
    add("--tf32", **on_off, help="TensorFloat-32 in float32 convolutions and matrix products on GPUs that have it")
    add(
        "--channels-last",
        **on_off,
        shown="on, but off where a network is trained on several CPU threads, and for the demo",
        help="memory layout NHWC",
    )
    add("--fused-optimizer", **on_off, help="update all weights in one kernel; not with --amp fp16")
    add(
        "--compile",
        choices=["off", "default", "reduce-overhead", "max-autotune"],
        help="torch.compile of the training step; reduce-overhead: with CUDA graphs. The first step takes minutes",
    )
    add("--checkpoint-activations", **on_off, help="compute what is inside blocks again in the backward pass: less memory, more time")
    add(
        "--sync-bn",
        **on_off,
        help="batch normalisation over all processes of torchrun together; GPUs wait for each other, and the program for them, at every "
        "layer",
    )
    return parser


def _shown(value) -> str:
    if value is True or value is False:
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(value)


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is in the home of a user who is not known here") from None


def _number(text: str, kind: type):
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _at_least(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = _number(text, int)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not allowed; at least {low}" + (f", at most {high}" if value > high else ""))
        return value

    return convert


def _above(low: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = _number(text, float)
        if value <= low:
            raise argparse.ArgumentTypeError(f"{value} is not allowed; more than {low}")
        return value

    return convert


def _in_range(low: float, high: float | None) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = _number(text, float)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{value} is not allowed; from {low}" + (f" to {high}" if high is not None else ""))
        return value

    return convert


def _int_list(separator: str) -> Callable[[str], tuple[int, ...]]:
    def convert(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(separator))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0{separator}1{separator}2") from None
        if min(values) < 0:
            raise argparse.ArgumentTypeError(f"{text!r} has a negative number")
        return values

    return convert


def _float_list(text: str) -> tuple[float, ...]:
    return tuple(_number(part, float) for part in text.split(","))
