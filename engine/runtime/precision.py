"""The 16-bit types of ``--amp``, and which of them is faster on a device."""

import copy
import math
import time
from argparse import Namespace

import torch
from torch import Tensor

from engine.runtime.device import limit_threads_of_steps
from models import ExitNetwork
from models.module_state import set_memory_format

ROUNDS = 2
# A timing runs enough images for about MEASURED_OPERATIONS, but at least MIN_IMAGES.
MEASURED_OPERATIONS, MIN_IMAGES = 10**9, 2
# 16-bit dtypes by value of --amp; "off" has none.
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(settings: Namespace) -> torch.dtype | None:
    """Return the 16-bit type of ``--amp`` after "auto" is resolved, None for float32 alone."""
    return AMP_DTYPES.get(settings.amp)


def amp_of(dtype: torch.dtype | None) -> str:
    """Return the value of ``--amp`` that stands for a data type."""
    return next((amp for amp, amp_type in AMP_DTYPES.items() if amp_type is dtype), "off")


def fastest_dtype(
    device: torch.device,
    network: ExitNetwork,
    image_size: int,
    operations: int,
    batch_size: int,
    trains: bool,
) -> torch.dtype | None:
    """Return the 16-bit type in which ``device`` runs a network faster, None if there is none.

    On GPUs: bfloat16, or float16 before Ampere. On CPUs: bfloat16 if the processor multiplies such numbers
    (AVX512_BF16, AMX) and the network is faster with it. That is measured, in a second or two: depthwise
    convolutions are slower with it, and with some builds of PyTorch everything is.

    Args:
        device: The device.
        network: The network; a copy is run.
        image_size: Height and width of the images in pixels.
        operations: Operations of the network per image.
        batch_size: Images per step of one process.
        trains: Whether the network is trained, not only evaluated.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type != "cpu" or not cpu_multiplies_bfloat16():
        return None
    num_images = max(MIN_IMAGES, min(batch_size, MEASURED_OPERATIONS // operations))
    images = torch.zeros(num_images, 3, image_size, image_size)
    threads = torch.get_num_threads()
    seconds = {}
    for dtype in (None, torch.bfloat16):
        limit_threads_of_steps(dtype, operations * batch_size)
        try:
            seconds[dtype] = step_seconds(network, images, dtype, trains)
        except RuntimeError:  # an operation that does not exist in bfloat16
            seconds[dtype] = math.inf
        finally:
            torch.set_num_threads(threads)
    return min(seconds, key=seconds.__getitem__)


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for products of bfloat16 numbers."""
    has = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in has)


def step_seconds(network: ExitNetwork, images: Tensor, dtype: torch.dtype | None, trains: bool) -> float:
    """Return the shortest time of a step on the CPU: forward, and backward where ``trains``.

    Args:
        network: The network; a copy is run.
        images: (N, 3, H, W) in float32.
        dtype: Type of mixed precision, None for float32 alone.
        trains: Whether the network is trained, not only evaluated.
    """
    network = copy.deepcopy(network).train(trains)
    if network.stage_1.can_run_channels_last():
        set_memory_format(network, torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode(False), torch.set_grad_enabled(trains):
        for _ in range(ROUNDS + 1):  # the first one also chooses kernels
            began = time.perf_counter()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                logits = network(images)
            if trains:
                torch.stack(logits).float().sum().backward()
            seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
