"""Every option of a run, typed: its default, its flag and the rules of its flag; and the presets.

Options of the network are those of ``models.options``. This module imports nothing heavy.
"""

from dataclasses import Field, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from adaptive_inference.measures import MEASURES
from models.options import NETWORK_FIELDS, NetworkOptions, option
from utils import above, at_least, available_cores, float_list, folder, in_range, int_list, share_or_count

MAX_WORKERS, MAX_EPOCHS = 1024, 10**6
MAX_DEFAULT_WORKERS = 4


_SEED = at_least(0, 2**32 - 2)
# A resumed run may change these: where and how it runs, and by which measure it is evaluated.
_free = partial(option, resumable=True)
# Stage 2 takes these over from stage 1 unless told otherwise, as it does with every option of the network.
_data = partial(option, group="data", inherited=True)
_stage_2 = partial(option, group="collaboration and distillation", stage="IMTA")
_optimisation = partial(option, group="optimisation")
_speed = partial(option, group="speed and memory")
COMMON = "often used"


@dataclass(frozen=True)
class Settings(NetworkOptions):
    """Everything a run was told. Metadata of a field: ``flag``, ``aliases``, ``help``, ``group`` in the help text, ``kind`` (converts the
    text) or ``choices``, ``shown`` (instead of the default), ``stage`` (of one stage alone), ``resumable``, ``inherited``."""

    preset: str = option(
        "demo",
        "--preset",
        "settings that all other flags change: the demo, or published ones",
        group=COMMON,
        shown="that of --data, else demo",
    )
    data: str = option(
        "demo",
        "--data",
        "data set; folder: any images in train/CLASS/",
        group=COMMON,
        inherited=True,
        choices=("demo", "cifar10", "cifar100", "imagenet", "folder"),
    )
    data_root: Path = option(
        Path("data"),
        "--data-root",
        "folder with train/ and test/ or val/, or torchvision's CIFAR archive; without --data and --preset its folders are the classes",
        group=COMMON,
        inherited=True,
        resumable=True,
        kind=folder,
        metavar="DIR",
    )
    save: Path | None = _free(
        None,
        "--save",
        "directory of this run",
        group=COMMON,
        kind=folder,
        metavar="DIR",
        shown="save/PRESET/GE or save/PRESET/IMTA",
    )
    resume: bool = _free(
        False,
        "--resume",
        "go on from the last checkpoint in --save, with its settings; start where none is",
        group=COMMON,
        switch=True,
    )
    overwrite: bool = _free(
        False, "--overwrite", "start anew in a directory that holds a run", group=COMMON, switch=True
    )
    evalmode: str | None = _free(
        None,
        "--evalmode",
        "evaluate only: every exit on its own (anytime), budgeted batch prediction (dynamic, also when no mode is given), or measured time "
        "of the policies that dynamic wrote (runtime)",
        group=COMMON,
        aliases=("--eval",),
        choices=("anytime", "dynamic", "runtime"),
        shown="train, then anytime and dynamic",
        nargs="?",
        const="dynamic",
    )
    epochs: int = option(
        300, "--epochs", "passes over the training images", group=COMMON, kind=at_least(1, MAX_EPOCHS)
    )
    batch_size: int = option(
        64, "--batch-size", "images a step, over all processes and GPUs", group=COMMON, aliases=("-b",)
    )
    lr: float = option(
        0.1,
        "--lr",
        "peak learning rate",
        group=COMMON,
        aliases=("--learning-rate",),
        kind=above(0),
        metavar="LR",
    )

    evaluate_from: Path | None = _free(
        None,
        "--evaluate-from",
        "checkpoint to evaluate, ours or a released one",
        kind=folder,
        metavar="FILE",
        shown="the best epoch in --save",
    )
    measure: str = _free(
        "softmax",
        "--measure",
        "what decides whether an image leaves: largest softmax probability (the paper), entropy, margin of the two largest, or how many "
        "exits in a row agree (patience)",
        choices=MEASURES,
    )
    pretrained: Path | None = option(
        None,
        "--pretrained",
        "stage 1: weights to start from, with their classifiers where the classes are the same; stage 2: the stage-1 network. Directory of "
        "a run, a file (ours or a released one), or a name in weights/",
        kind=folder,
        metavar="PATH",
        shown="none; stage 2: the directory GE beside --save",
    )
    seed: int = option(1, "--seed", "seed of initialisation, order and augmentation", kind=_SEED)
    deterministic: bool = option(
        False, "--deterministic", "only operations that repeat bit for bit on the same machine", switch=True
    )
    gpu: tuple[int, ...] | None = _free(
        None,
        "--gpu",
        "GPU or GPUs of this process, such as 0,1,2,3",
        kind=int_list(","),
        metavar="IDS",
        shown="the first GPU, or the CPU",
    )
    print_freq: int = _free(100, "--print-freq", "steps between two lines of the log", aliases=("-p",))
    save_every_steps: int | None = _free(
        None,
        "--save-every-steps",
        "also save a checkpoint every N steps",
        kind=at_least(1),
        shown="at the end of an epoch",
    )
    save_every_minutes: float | None = _free(
        None,
        "--save-every-minutes",
        "also save a checkpoint every M minutes",
        kind=above(0),
        metavar="M",
        shown="at the end of an epoch",
    )

    image_size: int | None = _data(
        None,
        "--image-size",
        "height and width of images",
        kind=at_least(1),
        metavar="PIXELS",
        shown="32, ImageNet and folders 224",
    )
    val_size: int | None = _data(
        None,
        "--val-size",
        "training images held out to choose the best epoch and the thresholds",
        kind=at_least(0),
        shown="1000, CIFAR 5000, ImageNet 50000, folders 10 %",
    )
    test_size: float | None = _data(
        None,
        "--test-size",
        "split test images off, for folders without test/ and val/: a share such as 20% of every class, or a number",
        kind=share_or_count,
        metavar="N",
        shown="those in test/ or val/",
    )
    split_seed: int = _data(0, "--split-seed", "seed of the choice of held-out and test images", kind=_SEED)
    workers: int = _data(
        min(available_cores(), MAX_DEFAULT_WORKERS),
        "--workers",
        "threads that decode images of more than 64 pixels; 0: none beside the training",
        aliases=("-j",),
        kind=at_least(0, MAX_WORKERS),
        shown=f"as many as cores, at most {MAX_DEFAULT_WORKERS}",
        resumable=True,
    )
    skip_unreadable: bool = _data(
        False,
        "--skip-unreadable",
        "go on without images that cannot be read: in training the next one of the epoch takes the place, in evaluation they are left out",
        switch=True,
        resumable=True,
    )
    check_images: bool = _data(
        False,
        "--check-images",
        "read every image once at the start, rather than meet an unreadable one later",
        switch=True,
        resumable=True,
    )
    augment: str = _data(
        "standard",
        "--augment",
        "standard: padded random crop (small images) or random resized crop, and flip; trivial, randaugment: TrivialAugment or RandAugment "
        "after that, image by image: on a GPU that is slow for small images",
        choices=("standard", "trivial", "randaugment", "none"),
    )

    small_inputs: bool | None = option(
        None, "--small-inputs", NETWORK_FIELDS["small_inputs"].metadata["help"], shown="up to 64 pixels"
    )

    temperature: float = _stage_2(
        1.0, "--temperature", "temperature of the distillation", aliases=("-T",), kind=above(0), metavar="T"
    )
    gamma: float = _stage_2(0.1, "--gamma", "weight of the distillation against the labels", metavar="G")
    isc: bool = _stage_2(
        True, "--isc", "Inline Subnetwork Collaboration: exits read the logits of the exit before them"
    )
    ofa: bool = _stage_2(True, "--ofa", "One-for-all distillation: exits learn from the last exit of stage 1")
    isc_gradient: str = _stage_2(
        "cut",
        "--isc-gradient",
        "gradient from an exit into the one before: cut (paper), flow (released code)",
        choices=("cut", "flow"),
    )
    kl_reduction: str = _stage_2(
        "sum",
        "--kl",
        "over classes: sum (paper), mean (released code, 1/C of the weight)",
        choices=("sum", "mean"),
    )
    backbone_bn: str = _stage_2(
        "frozen",
        "--backbone-bn",
        "BatchNorm of the frozen network: frozen (paper), moving (released code)",
        choices=("frozen", "moving"),
    )
    single_stage: bool = _stage_2(
        False,
        "--single-stage",
        "train network and classifiers at once from scratch (GE + ISC + OFA)",
        switch=True,
    )
    released: bool = option(
        False,
        "--released",
        "the choices of the released program where it differs from the paper (its bugs left out); such a flag beside it still counts",
        switch=True,
    )

    lr_type: str = _optimisation(
        "multistep", "--lr-type", "schedule after the warm-up", choices=("multistep", "cosine")
    )
    lr_milestones: tuple[float, ...] | None = _optimisation(
        None,
        "--lr-milestones",
        "epochs at which multistep decays",
        kind=float_list,
        metavar="E,E",
        shown="at 50 % and 75 %",
    )
    decay_rate: float = _optimisation(
        0.1, "--decay-rate", "factor of every multistep decay", kind=above(0), metavar="R"
    )
    warmup_epochs: float = _optimisation(
        0.0, "--warmup-epochs", "epochs of linear warm-up", kind=in_range(0), metavar="E"
    )
    momentum: float = _optimisation(0.9, "--momentum", "momentum of SGD", metavar="M")
    nesterov: bool = _optimisation(False, "--nesterov", "Nesterov momentum")
    weight_decay: float = _optimisation(
        1e-4, "--weight-decay", "weight decay", aliases=("--wd",), kind=in_range(0), metavar="W"
    )
    label_smoothing: float = _optimisation(
        0.0, "--label-smoothing", "label smoothing of the cross-entropies", metavar="S"
    )
    ema_decay: float | None = _optimisation(
        None,
        "--ema-decay",
        "evaluate and keep an exponential moving average of the weights, with this decay a step",
        metavar="D",
        kind=in_range(0, 1),
        shown="the weights themselves",
    )
    clip_grad: float | None = _optimisation(
        None, "--clip-grad", "clip the gradient's norm", kind=above(0), metavar="NORM", shown="no clipping"
    )
    accumulate: int = _optimisation(
        1, "--accumulate", "work a step's images off in N parts, for less memory; the batch size stays"
    )

    amp: str = _speed(
        "auto",
        "--amp",
        "mixed precision; auto: the 16-bit type that the device is faster with, off where none is",
        choices=("auto", "off", "bf16", "fp16"),
    )
    tf32: bool = _speed(
        True, "--tf32", "TensorFloat-32 in float32 convolutions and matrix products on GPUs that have it"
    )
    channels_last: bool = _speed(True, "--channels-last", "memory layout NHWC")
    fused_optimizer: bool = _speed(True, "--fused-optimizer", "update all weights in one kernel")
    compile: str = _speed(
        "auto",
        "--compile",
        "torch.compile of the training step, which takes minutes the first time; auto: when the training is long enough to pay for it; "
        "reduce-overhead: with CUDA graphs",
        choices=("auto", "off", "default", "reduce-overhead", "max-autotune"),
    )
    checkpoint_activations: bool = _speed(
        False,
        "--checkpoint-activations",
        "compute what is inside blocks again in the backward pass: less memory, more time",
    )
    sync_bn: bool = _speed(
        False,
        "--sync-bn",
        "batch normalisation over all GPUs of torchrun together; they wait for each other at every layer",
    )


def plain(settings: Settings) -> dict[str, Any]:
    """Settings in plain types, as checkpoints and ``run.json`` keep them."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }


OPTIONS: dict[str, Field] = {described.name: described for described in fields(Settings)}
FLAGS = {name: described.metadata["flag"] for name, described in OPTIONS.items()}
INHERITED = [
    name
    for name, described in OPTIONS.items()
    if name in NETWORK_FIELDS or described.metadata.get("inherited")
]

RESUMABLE = {name for name, described in OPTIONS.items() if described.metadata.get("resumable")}

# --released: the released program's side of README's "Differences", but for its bugs.
RELEASED_CHOICES = {
    "gradient_equilibrium_scales": "coarsest",
    "initialization": "pytorch",
    "kl_reduction": "mean",
    "backbone_bn": "moving",
    "isc_gradient": "flow",
}

_DEMO = {"num_blocks": 4, "step_mode": "lin_grow", "num_channels": 4, "growth_rate": 4}
_FOLDER = {"num_blocks": 4, "base": 2, "step": 2, "num_channels": 16, "growth_rate": 8}
_CIFAR_5_EXITS = {
    "num_blocks": 5,
    "step_mode": "lin_grow",
    "step": 1,
    "base": 1,
    "num_channels": 16,
    "growth_rate": 6,
}
_CIFAR_7_EXITS = {
    "num_blocks": 7,
    "step_mode": "even",
    "step": 2,
    "base": 4,
    "num_channels": 16,
    "growth_rate": 6,
}
_IMAGENET = {
    "num_blocks": 5,
    "step_mode": "even",
    "step": 4,
    "base": 4,
    "num_channels": 32,
    "growth_rate": 16,
}
_IMAGENET_SCALES = {"growth_factors": (1, 2, 4, 4), "bottleneck_factors": (1, 2, 4, 4)}
_BATCH_512_COSINE = {"batch_size": 512, "lr": 0.8, "lr_type": "cosine"}
_BATCH_128_NESTEROV = {"batch_size": 128, "lr_type": "cosine", "weight_decay": 5e-4, "nesterov": True}
_BATCH_64_MULTISTEP = {"batch_size": 64, "lr": 0.1, "lr_type": "multistep"}
_BATCH_256_MULTISTEP = {"batch_size": 256, "lr": 0.1, "lr_milestones": (30.0, 60.0)}

# Settings shared by both stages, then those of each. Published ones: kalviny/MSDNet-PyTorch for CIFAR-10 and the 7-exit network,
# yifanpu001/IMTA for CIFAR-100 with 5 exits and for every CIFAR stage 2, kalviny/IMTA for ImageNet. Ours: demo, folder and
# cifar100-boosted, the recipe of results/30_epochs with what gained beyond the paper.
PRESETS = {
    "demo": {
        "both": {"data": "demo", "val_size": 1000, **_DEMO, "batch_size": 64, "lr_type": "cosine"},
        "GE": {"epochs": 5, "lr": 0.1, "warmup_epochs": 0.5},
        "IMTA": {"epochs": 12, "lr": 0.2, "warmup_epochs": 0.5, "weight_decay": 5e-4},
    },
    "folder": {
        "both": {"data": "folder", **_FOLDER, "batch_size": 32, "lr_type": "cosine"},
        "GE": {"epochs": 60, "lr": 0.05, "warmup_epochs": 2.0},
        "IMTA": {"epochs": 20, "lr": 0.05},
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
    "cifar100-boosted": {
        "both": {
            "data": "cifar100",
            "val_size": 5000,
            **_CIFAR_5_EXITS,
            "boosted_exits": True,
            **_BATCH_128_NESTEROV,
        },
        "GE": {"epochs": 30, "lr": 0.2, "warmup_epochs": 1.0},
        "IMTA": {"epochs": 10, "lr": 0.1},
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
            **_IMAGENET,
            **_IMAGENET_SCALES,
            "epochs": 90,
            **_BATCH_256_MULTISTEP,
        },
        "GE": {},
        "IMTA": {},
    },
}
