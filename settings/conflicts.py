"""Flags and settings that do not go together. The functions return a line about it, None without conflict.

A new rule goes into the first of these that knows what the rule needs:

============================ ================================================================
``conflict_of_flags``        what was typed; the parser refuses it before anything else
``conflict_of_settings``     all settings of a run
``conflict_of_new_training`` the same, in new runs alone, as older ones may break the rule
``conflict_on_machine``      the processes and GPUs that share a training
============================ ================================================================

``conflict_of_compiling`` is a part of the first and the last, and says which modes --compile auto may choose.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from args import LIBRARY_OPTIONS, OWN_NETWORKS, STAGES, all_option_names, flag_of, option_names
from utils import is_folder

MUTUALLY_EXCLUSIVE = (
    ("resume", "overwrite"),
    ("single_stage", "pretrained"),
    ("single_stage", "backbone_bn"),
    ("evalmode", "resume"),
    ("evalmode", "overwrite"),
)
# Flags that count only with this value of another setting.
REQUIRED: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("momentum", "nesterov"), ("optimizer", "sgd")),
    **dict.fromkeys(("lr_milestones", "decay_rate"), ("lr_type", "multistep")),
    **dict.fromkeys(("temperature", "gamma", "kl_reduction"), ("ofa", True)),
    "isc_gradient": ("isc", True),
    "gradient_equilibrium_scales": ("gradient_equilibrium", True),
}

# Flags that count with every value of another setting but this one.
WITHOUT_EFFECT = (
    ("pretrained_lr_factor", "freeze", "backbone"),
    ("temperature", "gamma", 0),
    ("kl_reduction", "gamma", 0),
)


def conflict_of_flags(typed: dict[str, Any], stage: str) -> str | None:
    """Check the flags that were typed for a program, that of stage ``GE`` or ``IMTA``."""
    for first, second in MUTUALLY_EXCLUSIVE:
        if first in typed and second in typed:
            return f"{flag_of(first)} and {flag_of(second)} do not go together"
    if "evaluate_from" in typed and "evalmode" not in typed:
        return "--evaluate-from needs --evalmode (anytime, dynamic or runtime)"
    is_checkpointed = typed.get("checkpoint_activations", False)
    if conflict := conflict_of_compiling(
        typed.get("compile", "auto"), is_checkpointed, typed.get("accumulate", 1)
    ):
        return conflict
    if not STAGES[stage].is_first and is_checkpointed and "single_stage" not in typed:
        return "--checkpoint-activations needs --single-stage: the frozen network keeps no activations"
    return None


def conflict_of_settings(typed: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Check that every flag that was typed changes something, given the other settings."""
    if conflict := conflict_with_arch(typed, settings["arch"]):
        return conflict
    for name, (other, value) in REQUIRED.items():
        if name in typed and settings[other] != value:
            return f"{flag_of(name)} belongs to {flag_of(other)}{'' if value is True else f' {value}'}"
    if settings["optimizer"] == "sgd" and settings["nesterov"] and settings["momentum"] == 0:
        return "--nesterov needs a --momentum above 0; some presets set --nesterov"
    if "pretrained_lr_factor" in typed and settings["pretrained"] is None:
        return f"{flag_of('pretrained_lr_factor')} needs --pretrained"
    for name, other, value in WITHOUT_EFFECT:
        if name in typed and settings.get(other) == value:
            return f"{flag_of(name)} has no effect with {flag_of(other)} {value}"
    for name in ("data_root", "skip_unreadable", "check_images"):
        if name in typed and settings["data"] == "demo":
            return _not_for_demo(name)
    return None


def _not_for_demo(name: str) -> str:
    return (
        f"{flag_of(name)} is not for the demo, which draws its images; leave it out, "
        "or train on your images with --preset folder (bash run_GE.sh folder)"
    )


def conflict_with_arch(typed: dict[str, Any], arch: str) -> str | None:
    """Check that no option of other kinds of networks was typed."""
    wrong = sorted(all_option_names() & typed.keys() - {*option_names(arch)})
    if not wrong:
        return None
    owners = [f"--arch {own}" for own in OWN_NETWORKS if wrong[0] in option_names(own)]
    if wrong[0] in LIBRARY_OPTIONS:
        owners.append("networks of torchvision and timm (--arch NAME)")
    return f"{flag_of(wrong[0])} is for {' and '.join(owners)}, not for --arch {arch}"


def conflict_of_new_training(typed: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Check --test-size, that what is frozen was trained, and that the schedule fits the epochs."""
    if "test_size" in typed and (conflict := _conflict_of_test_size(settings)):
        return conflict
    if settings["freeze"] == "backbone":
        if settings["arch"] in OWN_NETWORKS:
            return "--freeze backbone is for networks of torchvision and timm (--arch NAME)"
        if settings["pretrained"] is None:
            return "--freeze backbone needs --pretrained: it would freeze random weights"
    if "warmup_epochs" in typed and typed["warmup_epochs"] >= settings["epochs"]:
        return f"--warmup-epochs {typed['warmup_epochs']:g} must lie below --epochs {settings['epochs']}"
    milestones, epochs = settings["lr_milestones"] or (), settings["epochs"]
    if settings["lr_type"] != "multistep" or all(0 < milestone < epochs for milestone in milestones):
        return None
    numbers = ",".join(f"{milestone:g}" for milestone in milestones)
    if "lr_milestones" in typed:
        return f"--lr-milestones {numbers} must lie above 0 and below --epochs {epochs}"
    return (
        f"--preset {settings['preset']} decays the learning rate at epochs {numbers}, which must lie below "
        f"--epochs {epochs}; pass --lr-milestones too"
    )


def _conflict_of_test_size(settings: dict[str, Any]) -> str | None:
    """Check that there are folders of images, from which test images can be split off."""
    data = settings["data"]
    if data == "demo":
        return _not_for_demo("test_size")
    if data in ("cifar10", "cifar100") and not is_folder(Path(settings["data_root"]) / "train"):
        return f"--test-size is for folders of images: {data} comes with test images"
    return None


def conflict_of_compiling(
    mode: str, checkpoint_activations: bool, accumulate: int, num_gpus: int = 1, images_per_process: int = 0
) -> str | None:
    """Check what a mode of --compile goes together with.

    Args:
        mode: Value of --compile.
        checkpoint_activations: Whether activations are computed again in the backward pass.
        accumulate: Micro-batches of a step.
        num_gpus: GPUs of one process.
        images_per_process: Images per step of one process; 0 if it is not known.
    """
    if mode in ("auto", "off"):
        return None
    if checkpoint_activations:
        return "--compile and --checkpoint-activations do not go together"
    if num_gpus > 1:
        return "--compile needs one process per GPU: start with torchrun instead of --gpu"
    if mode != "default" and accumulate > 1:
        return (
            f"--compile {mode} keeps gradients in the memory of its graphs, which --accumulate needs; "
            "use --compile default"
        )
    if images_per_process % accumulate:
        return (
            f"--compile needs micro-batches of one size; --accumulate {accumulate} does not divide "
            f"{images_per_process} images"
        )
    return None


def conflict_on_machine(
    settings: Namespace, world_size: int, num_gpus: int, has_batch_norm_1d: bool
) -> str | None:
    """Check the settings of a training, without "auto", in the processes that share it.

    Args:
        settings: The settings.
        world_size: Number of processes.
        num_gpus: GPUs of each of them; 0 on CPUs.
        has_batch_norm_1d: Whether the network normalises features over the images of a batch alone.
    """
    if settings.sync_bn and world_size > 1 and num_gpus == 0:
        return "--sync-bn needs GPUs: on CPUs every process normalises by its share of a batch"
    if settings.sync_bn and num_gpus > 1:
        return "--sync-bn needs one process per GPU: start with torchrun instead of --gpu"
    images_per_process, num_parts = settings.batch_size // world_size, settings.accumulate
    compiling = (settings.compile, settings.checkpoint_activations, num_parts, num_gpus, images_per_process)
    if conflict := conflict_of_compiling(*compiling):
        return conflict
    if num_parts > images_per_process:
        return f"--accumulate {num_parts}: a process has only {images_per_process} images per step"
    # Split as ``Stepper.step`` and DataParallel do.
    parts = torch.empty(images_per_process).tensor_split(num_parts)
    chunks = [chunk for part in parts for chunk in part.chunk(max(num_gpus, 1))]
    smallest = min(map(len, chunks))
    if has_batch_norm_1d and smallest < 2:
        return (
            "BatchNorm1d needs at least 2 images per process, GPU and micro-batch; "
            f"--batch-size {settings.batch_size} gives {smallest}"
        )
    return None
