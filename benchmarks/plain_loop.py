"""The loop that ``benchmarks.training_speed`` compares with: training as programs of this field usually do it.

Images of torchvision's data set are augmented one by one, as PIL images, by DataLoader workers. The network runs eagerly in float32, and
every step waits for its loss and for the accuracies of every exit. In stage 2 the whole stage-1 network runs in training mode, with
parameters that do not learn, under new classifiers with ISC and One-for-all distillation.
"""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from datasets import NORMALIZATION, DataInfo
from models import MSDNet


def plain_dataset(name: str, root: Path) -> tuple[Dataset, DataInfo]:
    """Training images of ``cifar100`` (torchvision's archive in ``root``) or ``imagenet`` (folders of classes in ``root``/train)."""
    mean, std = NORMALIZATION[name]
    size = 32 if name == "cifar100" else 224
    crop = transforms.RandomCrop(size, padding=4) if name == "cifar100" else transforms.RandomResizedCrop(size)
    augment = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)])
    if name == "cifar100":
        dataset: Dataset = datasets.CIFAR100(str(root), train=True, transform=augment)
    else:
        dataset = datasets.ImageFolder(str(root / "train"), transform=augment)
    return dataset, DataInfo(name, list(dataset.classes), size, list(mean), list(std), len(dataset), "")


class PlainLoop:
    """One stage's training.

    Args:
        network: images (N, 3, H, W) -> a list of logits (N, C), or, in stage 2, a ``PlainStage2``.
        dataset: augmented images and targets, as ``plain_dataset`` gives.
        workers: processes that augment images.
    """

    def __init__(self, network: nn.Module, dataset: Dataset, batch_size: int, workers: int, learning_rate: float, device: torch.device):
        self.network, self.device = network.to(device).train(), device
        self.loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda")
        learning = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learning, learning_rate, momentum=0.9, weight_decay=1e-4)
        self.batches = iter(())
        self.loss_sum, self.correct_sums = 0.0, [[0.0, 0.0] for _ in range(network.num_exits)]

    def run(self, steps: int) -> tuple[int, float]:
        """Images and seconds of the next ``steps`` steps; a new epoch begins when one ends."""
        wait = (lambda: torch.cuda.synchronize(self.device)) if self.device.type == "cuda" else (lambda: None)
        # PyTorch's defaults, which something else in this process may have changed.
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        images_done = 0
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            images, targets = self._next_batch()
            images_done += len(targets)
            self._step(images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))
        wait()
        return images_done, time.perf_counter() - began

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch

    def _step(self, images: Tensor, targets: Tensor) -> None:
        if isinstance(self.network, PlainStage2):
            logits, teacher_logits = self.network(images)
            loss = _distillation_loss(logits, targets, teacher_logits)
        else:
            logits = self.network(images)
            loss = sum(F.cross_entropy(z, targets) for z in logits)
        self.loss_sum += loss.item() * len(targets)
        for z, sums in zip(logits, self.correct_sums, strict=True):
            answers = z.detach().topk(5, dim=1).indices == targets[:, None]
            sums[0] += answers[:, :1].sum().item()
            sums[1] += answers.sum().item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class PlainStage2(nn.Module):
    """Images -> logits of every new classifier, (N, C) each, and the teacher's (N, C)."""

    def __init__(self, backbone: MSDNet):
        super().__init__()
        self.backbone, self.num_exits = backbone.requires_grad_(False), backbone.num_exits
        widths, classes = [exit.feature_channels for exit in backbone.exits], backbone.num_classes
        self.links = nn.ModuleList(nn.Sequential(nn.Linear(classes, width), nn.BatchNorm1d(width), nn.ReLU()) for width in widths[1:])
        self.classifiers = nn.ModuleList(nn.Linear(width if k == 0 else 2 * width, classes) for k, width in enumerate(widths))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features = self.backbone.features(images)
        old_logits = self.backbone.classify(features)
        logits = [self.classifiers[0](features[0])]
        for f, link, classifier in zip(features[1:], self.links, self.classifiers[1:], strict=True):
            logits.append(classifier(torch.cat([f, link(logits[-1])], dim=1)))
        return logits, old_logits[-1]


def _distillation_loss(logits: list[Tensor], targets: Tensor, teacher_logits: Tensor, gamma: float = 0.1) -> Tensor:
    loss = F.cross_entropy(logits[-1], targets)
    soft_targets = F.softmax(teacher_logits, dim=1)
    for z in logits[:-1]:
        distillation = F.kl_div(F.log_softmax(z, dim=1), soft_targets, reduction="batchmean")
        loss = loss + (1 - gamma) * F.cross_entropy(z, targets) + gamma * distillation
    return loss
