"""Folded networks: same logits, same counts, no BatchNorm left, and the original untouched."""

import copy

import pytest
import torch

from adaptive_inference import fold
from engine.precision import half_precision
from models import Stepwise, count_operations
from tests.test_msdnet import VARIANTS, images_for
from tests.test_predictor import make_network


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("options", VARIANTS)
def test_same_logits_and_counts(stage, options):
    network = make_network(stage, **options)
    images = images_for(network).double()
    folded = fold(network)
    with torch.no_grad():
        expected, run = network(images), Stepwise(folded, images)
        for ours, exit_logits in zip(folded(images), expected, strict=True):
            torch.testing.assert_close(ours, exit_logits)
            torch.testing.assert_close(run.next_logits(), exit_logits)
    size, network = images.shape[-1], network.float()
    for lazy in (False, True):
        assert count_operations(folded, size, lazy) == count_operations(network, size, lazy)


def test_nothing_is_left_to_normalise_and_the_original_stays():
    network = make_network(2).train()
    before = copy.deepcopy(network.state_dict())
    folded = fold(network)
    assert not any(
        isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)) for module in folded.modules()
    )
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert network.links.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_half_precision_is_close():
    network = make_network(2).float()
    folded = fold(network, dtype=torch.bfloat16)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact, rough = network(images)[-1], folded(images)[-1]
    assert rough.dtype == torch.bfloat16
    assert (exact - rough).abs().max() < 0.1 * exact.abs().max()
    assert half_precision(torch.device("cpu")) in (None, torch.bfloat16)
