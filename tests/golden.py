"""Golden cases: outputs of the released networks, and how their weights are rebuilt (fixtures/README.md)."""

import functools
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"
STAGE_1 = ("msdnet_cifar100_lin_grow", "msdnet_ge_cifar100_even", "msdnet_ge_imagenet")
STAGE_2 = "imta_cifar100_even"

_LIN_GROW = {"base": 1, "step": 1, "step_mode": "lin_grow"}
_IMAGENET = {
    **{"num_blocks": 5, "num_classes": 1000, "num_channels": 32, "growth_rate": 16, "small_inputs": False},
    **{"growth_factors": (1, 2, 4, 4), "bottleneck_factors": (1, 2, 4, 4)},
}
# Options of the networks in operation_counts.json.
PUBLISHED = {
    "cifar100_any_7x2": {"num_blocks": 7, "base": 4, "step": 2},
    "cifar100_batch_lin5": {"num_blocks": 5, **_LIN_GROW},
    "cifar100_batch_lin7": {"num_blocks": 7, **_LIN_GROW},
    "cifar10_10x2": {"num_blocks": 10, "base": 4, "step": 2, "num_classes": 10},
    "cifar100_min_5": {"num_blocks": 5, "base": 4, "step": 2, "prune": "min"},
    "imagenet_step4": {"base": 4, "step": 4, **_IMAGENET},
    "imagenet_step6": {"base": 6, "step": 6, **_IMAGENET},
    "imagenet_step7": {"base": 7, "step": 7, **_IMAGENET},
}


@functools.cache
def golden_case(name: str) -> dict:
    """Load config, images, targets, outputs, ``checkpoint`` with weights, and ``gradients`` as sketches.

    Callers must not change them.
    """
    case = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    stored = case.pop("stored")
    state = _drawn(case.pop("drawn"), case.pop("seed"))
    state |= zip(stored["names"], stored["values"].split(stored["sizes"]), strict=True)
    state = {name: state.get(name, torch.tensor(0)) for name in case.pop("names")}
    digest = hashlib.sha256()
    for key, x in state.items():
        digest.update(key.encode())
        digest.update(x.numpy().tobytes())
    if digest.hexdigest() != case.pop("sha256"):
        raise ValueError(f"{name}: the rebuilt weights are not those of the golden file")
    case["checkpoint"]["state_dict"] = state
    return case


def _drawn(names_and_shapes: list, seed: int) -> dict[str, Tensor]:
    """Draw PyTorch's default initialisation: uniform within 1 / sqrt(fan-in), for a bias that of its weight.

    NumPy's ``RandomState`` has the same stream as ``torch.manual_seed``, and is frozen for good.
    """
    random = np.random.RandomState(seed)
    weights, bound = {}, np.float32(0)
    for name, shape in names_and_shapes:
        if name.endswith(".weight"):
            bound = np.float32(np.prod(shape[1:]) ** -0.5)
        bits = random.randint(0, 2**32, size=shape, dtype=np.uint32)
        # PyTorch takes 24 bits as a fraction f and rounds 2 * bound * f - bound once, to float32; in float64
        # it is exact before that.
        fractions = (bits & np.uint32(2**24 - 1)) * 2.0**-24
        weights[name] = torch.from_numpy(
            (fractions * np.float64(2 * bound) - np.float64(bound)).astype(np.float32)
        )
    return weights


def sketch(name: str, gradient: Tensor) -> Tensor:
    """Return the norm of a gradient and its products with three vectors of random signs, float64 (4,).

    The signs depend on the parameter's name.
    """
    g = gradient.detach().double().flatten().numpy()
    signs = np.random.RandomState(zlib.crc32(name.encode())).randint(0, 2, size=(3, g.size)) * 2.0 - 1.0
    # Plain sums, not BLAS, whose order of summation depends on the number of threads.
    return torch.tensor([np.sqrt((g * g).sum()), *(signs * g).sum(axis=1)], dtype=torch.float64)
