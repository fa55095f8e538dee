"""The baseline of ``benchmarks.training_speed``: training as programs of this field usually do it.

Images of torchvision's data set are augmented one by one, as PIL images, by DataLoader workers. The network
runs eagerly in float32, and every step waits for its loss and for the accuracies of every exit. In stage 2
the whole stage-1 network runs in training mode with frozen parameters, under new classifiers with ISC and
One-for-all distillation.
"""

import itertools
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

from image_data.defaults import LARGE_CROP_SHARE, NORMALIZATION
from models import IMTA, MSDNet, one_for_all_loss, sum_of_cross_entropies
from models.description import DataInfo


def plain_dataset(name: str, root: Path) -> tuple[Dataset, DataInfo]:
    """Return the training images of a data set, and its description.

    Args:
        name: ``cifar100`` or ``imagenet``.
        root: torchvision's archive of CIFAR-100, or a folder with ImageNet's classes in ``train``.
    """
    mean, std = NORMALIZATION[name]
    size = 32 if name == "cifar100" else 224
    crop = (
        transforms.RandomCrop(size, padding=4) if name == "cifar100" else transforms.RandomResizedCrop(size)
    )
    augment = transforms.Compose(
        [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    if name == "cifar100":
        dataset: Dataset = datasets.CIFAR100(str(root), train=True, transform=augment)
    else:
        dataset = datasets.ImageFolder(str(root / "train"), transform=augment)
    crop_share = 1.0 if name == "cifar100" else LARGE_CROP_SHARE
    info = DataInfo(
        name, list(dataset.classes), size, crop_share, "bilinear", list(mean), list(std), len(dataset), ""
    )
    return dataset, info


class PlainLoop:
    """Training of one stage by a plain loop.

    Args:
        network: An ``MSDNet``, or for stage 2 an ``IMTA`` whose frozen part follows the batches.
        dataset: Augmented images and targets, as ``plain_dataset`` gives.
        batch_size: Images per step.
        workers: Processes that augment images.
        learning_rate: Learning rate of SGD, which stays the same.
        device: Device of the network and the batches.
    """

    def __init__(
        self,
        network: MSDNet | IMTA,
        dataset: Dataset,
        batch_size: int,
        workers: int,
        learning_rate: float,
        device: torch.device,
    ):
        self.network, self.device = network.to(device).train(), device
        loader = DataLoader(
            dataset, batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda"
        )
        learning = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learning, learning_rate, momentum=0.9, weight_decay=1e-4)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.loss_sum, self.correct_sums = 0.0, [[0.0, 0.0] for _ in range(network.num_exits)]

    def run(self, steps: int) -> tuple[int, float]:
        """Train for ``steps`` steps, across epochs; return the number of images and the seconds."""
        wait = (lambda: torch.cuda.synchronize(self.device)) if self.device.type == "cuda" else (lambda: None)
        # PyTorch's defaults, which something else in this process may have changed.
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        images_done = 0
        wait()
        began = time.perf_counter()
        for _, (images, targets) in zip(range(steps), self.batches, strict=False):
            images_done += len(targets)
            self._step(images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))
        wait()
        return images_done, time.perf_counter() - began

    def _step(self, images: Tensor, targets: Tensor) -> None:
        features = self.network.features(images)
        logits = self.network.classify(features)
        if isinstance(self.network, IMTA):
            loss = one_for_all_loss(logits, targets, self.network.teacher_logits(features, logits)).mean()
        else:
            loss = sum_of_cross_entropies(logits, targets).mean()
        self.loss_sum += loss.item() * len(targets)
        for z, sums in zip(logits, self.correct_sums, strict=True):
            correct = z.detach().topk(5, dim=1).indices == targets[:, None]
            sums[0] += correct[:, :1].sum().item()
            sums[1] += correct.sum().item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
