"""Exits on a custom network: train it and stop early, with ``models`` of this project alone.

PYTHONPATH=path/to/this/repository python own_network.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from models import Backbone, count_operations, sum_of_cross_entropies


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Make a convolution that halves the resolution, with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class MyNetwork(nn.Module):
    """Three convolutions and a linear layer."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.first, self.second, self.third = block(3, 16), block(16, 32), block(32, 64)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.third(self.second(self.first(images)))
        return self.linear(x.mean(dim=(2, 3)))


def make_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make noisy squares at one of four places: (count, 3, 32, 32), and the places (count,)."""
    places = torch.randint(4, (count,))
    squares = F.one_hot(places, 4).float().reshape(count, 1, 2, 2)
    return F.interpolate(squares, size=32) + 0.5 * torch.randn(count, 3, 32, 32), places


def main() -> float:
    """Train, stop early, and return the accuracy in percent."""
    torch.manual_seed(0)
    network = Backbone(MyNetwork(num_classes=4), exits=["first", "second"])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        images, targets = make_images(32)
        loss = sum_of_cross_entropies(network(images), targets).mean()  # with Gradient Equilibrium
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    network.eval()
    images, targets = make_images(200)
    logits, exits = network.early_exit(images, thresholds=[0.9, 0.9, 0.0])
    accuracy = 100 * (logits.argmax(dim=1) == targets).float().mean().item()
    operations = torch.tensor(count_operations(network, 32))[exits].float().mean()
    taken = ", ".join(f"{(exits == k).sum()} at exit {k + 1}" for k in range(network.num_exits))
    print(f"{accuracy:.1f} % correct with {operations:,.0f} operations per image; exits taken: {taken}")
    return accuracy


if __name__ == "__main__":
    main()
