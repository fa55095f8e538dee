"""Averaged weights forget where they began, and have BatchNorm statistics of their own."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from engine.averaging import measure_batch_norm, moving_average
from engine.runtime.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"), ())


class Small(nn.Module):
    """A convolution whose outputs have a variance far from 1, and two exits behind BatchNorm."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm2d(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())

    def forward(self, images):
        return self.layers(self.frozen(images))


@pytest.fixture
def network():
    network = Small()
    nn.init.normal_(network.layers[0].weight, std=0.01)
    network.train()
    network.frozen.eval()
    return network


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(5)]


def test_weights_by_hand():
    network = nn.Linear(1, 1, bias=False)
    average, expected = moving_average(network, 0.5), None
    for step in range(30):
        nn.init.constant_(network.weight, float(step))
        average.update_parameters(network)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step if step else 0.0
        assert average.module.weight.item() == pytest.approx(expected)


def test_first_weights_are_soon_forgotten():
    network = nn.Linear(1, 1, bias=False)
    average = moving_average(network, 0.9999)
    for step in range(50):
        nn.init.constant_(network.weight, 1.0 if step else 1000.0)
        average.update_parameters(network)
    assert average.module.weight.item() == pytest.approx(1.0, abs=1e-3)


def test_equal_weights_stay_as_they_are():
    """Bit for bit: a digest tells whether the frozen network of stage 2 has changed."""
    network = nn.Linear(2, 1, bias=False)
    network.weight.data = torch.tensor([[-0.0, 0.1]])
    average = moving_average(network, 0.9)
    for _ in range(30):
        average.update_parameters(network)
    assert torch.equal(average.module.weight.view(torch.int32), network.weight.view(torch.int32))


def test_average_of_constant_weights_predicts_as_the_network(network, batches):
    """If statistics were averaged as the weights are, most of the initial variance of 1 would be left."""
    average = moving_average(network, 0.999)
    for images in batches:
        network(images)
        average.update_parameters(network)
    measure_batch_norm(average.module, network, batches, None, ALONE)
    exact = copy.deepcopy(network).eval()
    with torch.no_grad():
        outputs = torch.cat([network.layers[0](network.frozen(images)) for images in batches])
    exact.layers[1].running_mean.copy_(outputs.mean(dim=(0, 2, 3)))
    exact.layers[1].running_var.copy_(outputs.var(dim=(0, 2, 3)))
    assert exact.layers[1].running_var.max() < 0.01
    images = batches[0]
    torch.testing.assert_close(average.module(images), exact(images), rtol=0.02, atol=0.02)


def test_statistics_as_by_pytorch(network, batches):
    network.frozen.train()
    average = moving_average(network, 0.9)
    average.update_parameters(network)
    expected = copy.deepcopy(average.module).train()
    update_bn(batches, expected)
    measure_batch_norm(average.module, network, batches, None, ALONE)
    for name, buffer in average.module.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name))
    assert not any(module.training for module in average.modules() if module is not average)
    assert average.module.layers[1].momentum == network.layers[1].momentum


def test_statistics_of_all_processes(network, batches):
    class Two(Processes):
        def all_reduce_sum(self, values):
            return values + others.pop(0)

        def share_buffers(self, network):
            network.frozen.running_mean.fill_(1.0)

    average = moving_average(network, 0.9)
    average.update_parameters(network)
    normalised = average.module.layers[1]
    average.module.frozen.running_mean.fill_(1.0)  # as in the main process
    measure_batch_norm(average.module, network, batches[:2], None, ALONE)
    average.module.frozen.running_mean.fill_(2.0)
    others = [normalised.running_mean.clone(), normalised.running_var.clone()]
    measure_batch_norm(average.module, network, batches[2:4], None, Two(0, 2, torch.device("cpu"), ()))
    measured = normalised.running_mean.clone(), normalised.running_var.clone()
    measure_batch_norm(average.module, network, batches[:4], None, ALONE)
    torch.testing.assert_close(measured, (normalised.running_mean, normalised.running_var))


def test_layers_without_running_statistics(network, batches):
    network.layers[1] = nn.BatchNorm2d(4, track_running_stats=False)
    network.frozen.train()
    average = moving_average(network, 0.9)
    average.update_parameters(network)
    measure_batch_norm(average.module, network, batches, None, ALONE)
    assert average.module.frozen.num_batches_tracked == 5
    assert average.module.layers[1].running_mean is None


def test_frozen_statistics_stay(network, batches):
    nn.init.constant_(network.frozen.running_var, 3.0)
    average = moving_average(network, 0.9)
    average.update_parameters(network)
    measure_batch_norm(average.module, network, batches, torch.bfloat16, ALONE)
    assert average.module.frozen.running_var.tolist() == [3.0] * 3
    assert average.module.frozen.num_batches_tracked == 0
    assert average.module.layers[1].num_batches_tracked == 5


def test_buffers_follow_the_network_between_measurements(network, batches):
    average = moving_average(network, 0.9)
    average.update_parameters(network)
    measure_batch_norm(average.module, network, batches, None, ALONE)
    network(batches[0])
    average.update_parameters(network)
    for own, trained in zip(average.module.buffers(), network.buffers(), strict=True):
        assert torch.equal(own, trained)
