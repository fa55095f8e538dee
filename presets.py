"""The presets of both training programs: settings that take the place of the defaults in ``args``.

Example:
    settings = DEFAULTS | PRESETS["cifar100"]["both"] | PRESETS["cifar100"]["GE"]
"""

from typing import Any

# --released: the choices of the released code where it differs from the paper, its bugs left out.
RELEASED_CHOICES = {
    "gradient_equilibrium_scales": "coarsest",
    "initialization": "pytorch",  # also the default; here so that it stays if the default changes
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

# Settings shared by both stages, then those of each. Published ones: kalviny/MSDNet-PyTorch for CIFAR-10 and
# the 7-exit network, yifanpu001/IMTA for CIFAR-100 with 5 exits and for every CIFAR stage 2, kalviny/IMTA for
# ImageNet. Ours: demo, folder, finetune and cifar100-boosted, which is the recipe of results/30_epochs with
# the additions to the paper that raised accuracy.
# environment.sh reads the names: each is the only one on its line, indented by four spaces.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
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
    "finetune": {
        "both": {"data": "folder", **_FOLDER, "batch_size": 32, "lr_type": "cosine", "nesterov": True},
        "GE": {"epochs": 30, "lr": 0.02, "warmup_epochs": 1.0},
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
