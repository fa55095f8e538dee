"""Operation counts of a network small enough to count by hand, and of stage 2; see also test_golden.py."""

import copy

import pytest
import torch
from torch import nn

from models import IMTA, Backbone, MSDNet, count_operations, measure_cost


def test_one_scale_by_hand():
    network = MSDNet(
        num_classes=10,
        num_blocks=1,
        base=1,
        num_channels=4,
        growth_rate=6,
        growth_factors=(1,),
        bottleneck_factors=(1,),
    )
    pixels = 32 * 32
    stem = pixels * (3 * 4 * 9 + 4)
    layer = pixels * (4 * 4 + 4) + pixels * (
        4 * 6 * 9 + 6
    )  # 1x1 to min(4, 1 * 6) channels, 3x3 to 6, each with its ReLU
    exit = 256 * (10 * 128 * 9 + 128) + 64 * (128 * 128 * 9 + 128) + 128 * 64 + 128 * 10 + 10
    assert count_operations(network, 32) == [stem + layer + exit]
    activations = pixels * (4 + 4 + 6) + 256 * 128 + 64 * 128
    pooling_and_bias = 128 * 64 + 10
    multiply_adds = measure_cost(network, 32, multiply_adds_only=True).operations
    assert multiply_adds == [stem + layer + exit - activations - pooling_and_bias]


def test_stage_2_counts_links_and_new_classifiers_and_no_old_ones():
    backbone = MSDNet(num_classes=10, num_blocks=3, num_channels=4, growth_rate=4)
    old, new = measure_cost(backbone, 32), measure_cost(IMTA(backbone), 32)
    link = 10 * 128 + 128 + 128  # linear, its bias, ReLU
    wider = 128 * 10  # a new classifier reads twice the features
    assert [b - a for a, b in zip(old.operations, new.operations, strict=True)] == [
        0,
        link + wider,
        2 * (link + wider),
    ]
    parameters = link + 128 + wider  # the link's BatchNorm has two a channel, its ReLU none
    assert [b - a for a, b in zip(old.parameters, new.parameters, strict=True)] == [
        0,
        parameters,
        2 * parameters,
    ]


def test_lazy_never_costs_more_and_ends_the_same():
    network = MSDNet(num_blocks=5, step_mode="lin_grow")
    lazy, published = count_operations(network, 32, lazy=True), count_operations(network, 32)
    assert all(a < b for a, b in zip(lazy[:-1], published[:-1], strict=True))
    assert lazy[-1] == published[-1]


@pytest.mark.parametrize("step_mode", ["even", "lin_grow"])
def test_lazy_evaluation_keeps_only_what_later_exits_read(step_mode):
    network = MSDNet(num_classes=10, num_blocks=3, base=2, step=2, num_channels=4, step_mode=step_mode).eval()

    def advance(first, last, state):
        for k in range(first, last):
            _, state = network.advance(k, state)
        return state

    state = network.start(torch.randn(1, 3, 32, 32))
    for k in range(3):
        for name in state:
            with pytest.raises(KeyError):
                advance(k, 3, {other: cell for other, cell in state.items() if other != name})
        state = advance(k, k + 1, state)
    assert state == {}


@pytest.mark.parametrize(
    "layer",
    [nn.CELU(), nn.PReLU(), nn.Softplus(), nn.LogSigmoid(), nn.Threshold(0.1, 0.0), nn.RReLU()],
    ids=lambda layer: type(layer).__name__,
)
def test_an_activation_is_one_operation_per_element(layer):
    counts = [
        count_operations(Backbone(ResidualBlock(kind, False), ["block"]), 32) for kind in (layer, nn.ReLU())
    ]
    assert counts[0] == counts[1]


def test_counted_in_inference_mode():
    network = MSDNet(num_classes=10, num_blocks=2, num_channels=4, growth_rate=4)
    expected = [count_operations(network, 32), count_operations(network, 32, lazy=True)]
    with torch.inference_mode():
        made_here = MSDNet(num_classes=10, num_blocks=2, num_channels=4, growth_rate=4)
        for counted in (network, made_here):
            found = [count_operations(counted, 32), count_operations(counted, 32, lazy=True)]
            assert found == expected


def test_counting_leaves_the_network_alone():
    network = MSDNet(num_blocks=2, num_channels=4, growth_rate=4).train()
    before = copy.deepcopy(network.state_dict())
    count_operations(network, 32)
    assert all(module.training for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("small_inputs", [True, False])
def test_too_small_an_image(small_inputs):
    network = MSDNet(num_channels=4, growth_rate=4, small_inputs=small_inputs)
    smallest = (
        17 if small_inputs else 65
    )  # three scales; an exit halves twice, a large stem twice; 2 pixels are pooled
    assert len(count_operations(network, smallest)) == 5
    with pytest.raises(ValueError, match=f"at least {smallest}"):
        count_operations(network, smallest - 1)


class ResidualBlock(nn.Module):
    """A convolution of 3 channels, BatchNorm and an activation, added to their input; then a linear layer."""

    def __init__(self, activation, in_place):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.activation, self.in_place = nn.BatchNorm2d(3), activation, in_place
        self.block = nn.Identity()
        self.convolution_2 = nn.Conv2d(3, 3, 1)
        self.linear = nn.Linear(3, 10)

    def forward(self, images):
        x = self.activation(self.norm(self.convolution(images)))
        if self.in_place:
            x += images
        else:
            x = x + images
        return self.linear(self.convolution_2(self.block(x)).mean((2, 3)))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardswish(), nn.GELU(), nn.SiLU(inplace=True)],
)
def test_residual_block_by_hand(activation, in_place):
    network = Backbone(ResidualBlock(activation, in_place), ["block"], exit_width=4, exit_size=16)
    pixels = 32 * 32
    block = pixels * 3 * 3 * 9 + pixels * 3 + pixels * 3  # convolution, activation, addition
    # The exit averages 2 x 2 pixels; its convolution has stride 2, and each of its ReLUs is read once more.
    exit = pixels * 3 + 8 * 8 * (3 * 4 * 9 + 4) + 8 * 8 * 4 + 4 * 10 + 10
    end = pixels * 3 * 3 + pixels * 3 + 3 * 10 + 10  # convolution, mean, linear layer with its bias
    assert count_operations(network, 32) == [block + exit, block + exit + end]
    multiply_adds = measure_cost(network, 32, multiply_adds_only=True).operations
    assert multiply_adds[0] == pixels * 3 * 3 * 9 + 8 * 8 * 3 * 4 * 9 + 4 * 10
