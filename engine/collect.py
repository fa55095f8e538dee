"""Evaluation: the logits of every exit are collected once, and all results are functions of them.

Example:
    logits, targets = collect_logits(network, data.test, processes)   # (K, N, C), (N,)
    rows = anytime_rows(logits, targets, operations)
"""

import torch
from torch import Tensor, nn

from engine.runtime.distributed import Processes
from image_data.batches import Batches
from models import ExitNetwork
from utils import UserError


@torch.no_grad()
def collect_logits(
    network: ExitNetwork, batches: Batches, processes: Processes
) -> tuple[Tensor, Tensor] | None:
    """Collect the logits of every exit for all images that can be read.

    Returns:
        In the main process the logits (K, N, C), float32 on the CPU, and the targets (N,); None in the
        others.

    Raises:
        UserError: None of the images can be read.
    """
    network.eval()
    count = len(batches.local_indices())
    logits = torch.empty(count, network.num_exits, network.num_classes)
    targets = torch.empty(count, dtype=torch.int64)
    start = 0
    for images, labels in batches:
        part = slice(start, start + len(labels))
        logits[part] = torch.stack(network(images), dim=1).float().cpu()
        targets[part] = labels.cpu()
        start += len(labels)
    indices = batches.local_indices()  # fewer if some could not be read
    logits, targets = (processes.gather(own[:start], indices) for own in (logits, targets))
    if not processes.is_main:
        return None
    if len(targets) == 0:
        raise UserError(f"none of the {batches.num_images} images can be read")
    return logits.transpose(0, 1).contiguous(), targets


def collected_indices(batches: Batches, processes: Processes) -> Tensor | None:
    """Return the indices (N,) of the images that ``collect_logits`` has collected; None as there."""
    indices = batches.local_indices()
    return processes.gather(indices, indices)


@torch.no_grad()
def accuracy_per_exit(
    network: ExitNetwork, batches: Batches, processes: Processes
) -> tuple[list[float], list[float], float]:
    """Return top-1 and top-5 accuracy per exit in percent, and the mean cross-entropy summed over exits.

    Raises:
        UserError: None of the images can be read.
    """
    network.eval()
    # Rows: images, correct by top-1, correct by top-5, summed losses; a column per exit.
    totals = torch.zeros(4, network.num_exits, dtype=torch.float64, device=processes.device)
    for images, labels in batches:
        logits = torch.stack(network(images))
        totals[0] += len(labels)
        totals[1:3] += correct_in_top(logits, labels).sum(dim=2)
        for k, z in enumerate(logits):
            totals[3, k] += nn.functional.cross_entropy(z.float(), labels, reduction="sum")
    count, top1, top5, losses = processes.all_reduce_sum(totals)
    if count[0] == 0:
        raise UserError(f"none of the {batches.num_images} images can be read")
    acc1, acc5 = (100 * torch.stack([top1, top5]) / count).tolist()
    return acc1, acc5, (losses / count).sum().item()


def correct_in_top(logits: Tensor, targets: Tensor) -> Tensor:
    """Return whether the target is the best class, and among the best five: (2, K, N) bool.

    Args:
        logits: (K, N, C).
        targets: (N,).
    """
    best = logits.topk(min(5, logits.shape[2]), dim=2).indices == targets[None, :, None]
    return torch.stack([best[:, :, 0], best.any(dim=2)])


def anytime_rows(logits: Tensor, targets: Tensor, operations: list[int]) -> list[dict]:
    """Return a row per exit: ``exit`` (from 1), ``operations``, ``acc1`` and ``acc5`` in percent."""
    # One exit at a time keeps the memory small.
    accuracies = [
        correct_in_top(z[None], targets)[:, 0].double().mean(dim=1).mul(100).tolist() for z in logits
    ]
    return [
        {"exit": k + 1, "operations": operations[k], "acc1": round(acc1, 4), "acc5": round(acc5, 4)}
        for k, (acc1, acc5) in enumerate(accuracies)
    ]
