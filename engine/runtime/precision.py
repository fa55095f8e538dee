"""The 16-bit types of ``--amp``, and which of them is faster on a device."""

import time
from argparse import Namespace

import torch
from torch import nn

ROUNDS = 3
# By value of --amp; the value "off" stands for none of them.
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(settings: Namespace) -> torch.dtype | None:
    """Return the 16-bit type of ``--amp`` after "auto" is resolved, None for float32 alone."""
    return AMP_DTYPES.get(settings.amp)


def amp_of(dtype: torch.dtype | None) -> str:
    """Return the value of ``--amp`` that stands for a data type."""
    return next((amp for amp, amp_type in AMP_DTYPES.items() if amp_type is dtype), "off")


def fastest_dtype(device: torch.device) -> torch.dtype | None:
    """Return the 16-bit type in which ``device`` is faster, None if there is none.

    On GPUs: bfloat16, or float16 before Ampere. On CPUs: bfloat16 if the processor multiplies such numbers
    (AVX512_BF16, AMX) and convolutions of this PyTorch build are faster with it. That is measured, in a tenth
    of a second, as some builds are many times slower.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if (
        device.type == "cpu"
        and cpu_multiplies_bfloat16()
        and convolution_seconds(torch.bfloat16) < convolution_seconds(None)
    ):
        return torch.bfloat16
    return None


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for products of bfloat16 numbers."""
    has = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in has)


def convolution_seconds(dtype: torch.dtype | None) -> float:
    """Return the shortest time of a forward and backward pass through a typical convolution of training."""
    seconds = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        layer = nn.Conv2d(48, 48, 3, padding=1).to(memory_format=torch.channels_last)
        images = torch.ones(16, 48, 16, 16).to(memory_format=torch.channels_last)
        for _ in range(ROUNDS + 1):  # the first one also chooses a kernel
            began = time.perf_counter()
            layer(images).sum().backward()
            seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
