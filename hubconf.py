"""Trained networks by ``torch.hub``: in evaluation mode, with a ``description``.

network = torch.hub.load(REPOSITORY, "imta_cifar100")                      # of GitHub
network = torch.hub.load("path/of/a/clone", "imta_cifar100", source="local")   # offline
"""

from models import IMTA, MSDNet, load

dependencies = ["torch", "safetensors"]


def imta_cifar100() -> IMTA:
    """GE + ISC + OFA for CIFAR-100, 5 exits."""
    return load("imta_cifar100")


def msdnet_cifar100() -> MSDNet:
    """MSDNet with GE for CIFAR-100, 5 exits."""
    return load("msdnet_cifar100")


def msdnet_boosted_cifar100() -> MSDNet:
    """MSDNet with GE and boosted exits for CIFAR-100, 5 exits."""
    return load("msdnet_boosted_cifar100")
