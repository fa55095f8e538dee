"""A moving average of the weights (``--ema-decay``), with BatchNorm statistics of its own.

Example:
    average = moving_average(network, 0.999)
    average.update_parameters(network)                                  # after every step
    measure_batch_norm(average.module, network, batches, torch.bfloat16, processes)    # before it predicts

The decay rises to its value with the number of steps, so that the initial weights are soon forgotten. Running
statistics belong to the weights they were measured with: an average of them suits no network, and where
variances are small, a few percent of the initial variance of 1 ruin it. They are measured on training images
instead.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from engine.runtime.distributed import Processes

MEASURED_IMAGES = 10_000  # training images, of all processes, that BatchNorm statistics are measured on


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Return the average of a network's weights, with the network's buffers as of the last update.

    Update 0 copies the weights; the decay of update t after it is min(decay, (1 + t) / (10 + t)).
    """

    def update(averages: list[Tensor], values: list[Tensor], num_updates: Tensor) -> None:
        weight = 1 - ((1 + num_updates) / (10 + num_updates)).clamp(max=decay)
        for average, value in zip(averages, values, strict=True):
            # Frozen weights stay as they are, bit for bit; ``lerp_`` would turn -0.0 into 0.0.
            average.sub_((average - value) * weight.to(average.dtype))

    return AveragedModel(network, multi_avg_fn=update)


@torch.no_grad()
def measure_batch_norm(
    average: nn.Module,
    network: nn.Module,
    batches: Iterable[Tensor],
    dtype: torch.dtype | None,
    processes: Processes,
) -> None:
    """Measure the running statistics of ``average`` again, as the means over the batches of all processes.

    All processes measure with the buffers of the main process.

    Args:
        average: The average of ``network``; it is left in evaluation mode.
        network: The network that is trained, in training mode. Where one of its layers is not, such as in a
            frozen backbone, the statistics stay as they are.
        batches: Normalised images (N, 3, H, W); as many batches in every process.
        dtype: Dtype of the convolutions in training; None for float32.
        processes: The processes that train together.
    """
    average.eval()
    pairs = zip(average.modules(), network.modules(), strict=True)
    layers = [
        own
        for own, trained in pairs
        if isinstance(trained, _BatchNorm) and trained.training and own.running_mean is not None
    ]
    if not layers:
        return
    processes.share_buffers(average)  # the measured statistics depend on those of other layers
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
        layer.train()
    for images in batches:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            average(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
        for statistic in (layer.running_mean, layer.running_var):
            statistic.copy_(processes.all_reduce_sum(statistic) / processes.world_size)
