"""Anytime and budgeted evaluation: the logits of every exit are collected once, and all results are functions of them.

logits, targets = collect_logits(network, data.test, processes)   # (K, N, C), (N,)
rows = anytime_rows(logits, targets, operations)
"""

import torch
from torch import Tensor, nn

from dataloader import Batches
from engine.distributed import Processes


@torch.no_grad()
def collect_logits(
    network: nn.Module, batches: Batches, processes: Processes
) -> tuple[Tensor, Tensor] | None:
    """Logits of every exit for all images, on the CPU: (K, N, C) float32, and targets (N,); the main process gets them, others None."""
    network.eval()
    count = len(batches.own())
    logits = torch.empty(count, network.num_exits, network.num_classes)
    targets = torch.empty(count, dtype=torch.int64)
    start = 0
    for images, labels in batches:
        part = slice(start, start + len(labels))
        logits[part] = torch.stack(network(images), dim=1).float().cpu()
        targets[part] = labels.cpu()
        start += len(labels)
    logits, targets = (processes.interleave(own, batches.num_images) for own in (logits, targets))
    return (logits.transpose(0, 1).contiguous(), targets) if processes.is_main else None


@torch.no_grad()
def accuracy_per_exit(
    network: nn.Module, batches: Batches, processes: Processes
) -> tuple[list[float], list[float]]:
    """Top-1 and top-5 accuracy of every exit in percent, without keeping the logits."""
    network.eval()
    correct = torch.zeros(2, network.num_exits, dtype=torch.float64, device=processes.device)
    for images, labels in batches:
        correct += correct_in_top(torch.stack(network(images)), labels).sum(dim=2)
    acc1, acc5 = (100 * processes.sum(correct) / batches.num_images).tolist()
    return acc1, acc5


def correct_in_top(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the target is the best, and among the best five: logits (K, N, C), targets (N,) -> bool (2, K, N)."""
    best = logits.topk(min(5, logits.shape[2]), dim=2).indices == targets[None, :, None]
    return torch.stack([best[:, :, 0], best.any(dim=2)])


def anytime_rows(logits: Tensor, targets: Tensor, operations: list[int]) -> list[dict]:
    """Every exit on its own: ``exit`` (1-based), ``operations``, ``acc1``, ``acc5`` in percent."""
    # One exit at a time keeps the memory small.
    accuracies = [
        correct_in_top(z[None], targets)[:, 0].double().mean(dim=1).mul(100).tolist() for z in logits
    ]
    return [
        {"exit": k + 1, "operations": operations[k], "acc1": round(acc1, 4), "acc5": round(acc5, 4)}
        for k, (acc1, acc5) in enumerate(accuracies)
    ]
