"""Memory layout and running statistics of any module, changed in place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def set_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Put all tensors with four dimensions into a memory layout, in place.

    ``nn.Module.to`` does the same, but refuses networks that also hold tensors with five dimensions.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch normalisation in ``module`` as they are within the block."""
    tracking = [layer for layer in module.modules() if getattr(layer, "track_running_stats", False)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in tracking]
    for layer in tracking:
        # A counter to be thrown away: some kinds of batch normalisation insist on one.
        counter = None if layer.num_batches_tracked is None else torch.zeros_like(layer.num_batches_tracked)
        layer.momentum, layer.num_batches_tracked = 0.0, counter
    try:
        yield
    finally:
        for layer, (momentum, num_batches_tracked) in zip(tracking, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, num_batches_tracked
