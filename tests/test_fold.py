"""Folding: which layers are folded and which are left alone.

``tests.contract`` compares folded networks with the originals.
"""

import functools

import pytest
import torch
from torch import nn

from adaptive_inference import fold
from adaptive_inference.fold import fuse
from engine.runtime.precision import fastest_dtype
from models import count_operations
from models.network import fold_sequences
from tests.contract import CASES
from tests.test_predictor import make_network

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["msdnet_large", "imta_boosted"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_folded_network_costs_the_same(name, lazy):
    network, size = CASES[name].network(), CASES[name].image_size
    assert count_operations(fold(network), size, lazy) == count_operations(network, size, lazy)


def test_nothing_is_left_to_normalise_and_nothing_can_be_trained():
    folded = fold(make_network(2).train()).train()
    assert not any(isinstance(module, NORMS) for module in folded.modules())
    assert not any(module.training for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_folding_again_changes_the_dtype():
    network = make_network(2).float()
    again = fold(fold(network, dtype=torch.bfloat16), dtype=torch.float64)
    assert again.fingerprint == fold(network).fingerprint
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert again.kind == "IMTA"


def test_half_precision_is_close():
    network = make_network(2).float()
    folded = fold(network, dtype=torch.bfloat16)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact, rough = network(images)[-1], folded(images)[-1]
    assert rough.dtype == torch.bfloat16
    assert (exact - rough).abs().max() < 0.1 * exact.abs().max()
    assert fastest_dtype(torch.device("cpu")) in (None, torch.bfloat16)


def test_a_folded_network_compiles_in_one_piece():
    folded, images = fold(make_network(2).float()), torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ours, expected in zip(compiled(images), folded(images), strict=True):
            torch.testing.assert_close(ours, expected)


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm's: normalisation with an activation inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubling(nn.BatchNorm2d):
    """A kind of BatchNorm that nobody has heard of."""

    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    """A convolution that changes its weights whenever it is called."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


def with_statistics(network):
    for module in network.modules():
        if isinstance(module, NORMS):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.double().eval()


@pytest.mark.parametrize(
    ("layers", "norms_left"),
    [
        ([functools.partial(nn.Conv2d, 3, 3, 1), nn.BatchNorm2d, nn.ReLU], 0),
        ([functools.partial(nn.Conv2d, 3, 3, 1), BatchNormAct2d], 0),
        ([functools.partial(nn.Conv2d, 3, 3, 1), Doubling], 1),
        ([functools.partial(Standardised, 3, 3, 1), nn.BatchNorm2d], 1),
        ([nn.BatchNorm2d, functools.partial(nn.Conv2d, 3, 3, 1)], 1),
        (
            [
                functools.partial(nn.Conv2d, 3, 3, 1),
                functools.partial(nn.BatchNorm2d, track_running_stats=False),
            ],
            1,
        ),
    ],
)
def test_a_sequence(layers, norms_left):
    takes_channels = (nn.BatchNorm2d, BatchNormAct2d, Doubling)
    made = [layer(3) if getattr(layer, "func", layer) in takes_channels else layer() for layer in layers]
    sequence = nn.Sequential(*made)
    for module in sequence:
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            with_statistics(module)
    sequence.double().eval()
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = sequence(images)
        fold_sequences(sequence, fuse)
        torch.testing.assert_close(sequence(images), expected)
    assert sum(isinstance(module, NORMS) for module in sequence.modules()) == norms_left
