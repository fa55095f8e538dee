"""MSDNet: structure, Gradient Equilibrium by hand, options."""

import pytest
import torch
from torch import nn

from models import IMTA, MSDNet, Stepwise, count_operations
from models.options import block_depths
from tests.conftest import TINY_NETWORK
from tests.helpers import images_for

VARIANTS = [
    {},
    {"step_mode": "lin_grow"},
    {"prune": "min", "base": 3},
    {"bottleneck": False},
    {"reduction": 0},
    {"growth_factors": (1, 2), "bottleneck_factors": (1, 4)},
    {"growth_factors": (2,), "bottleneck_factors": (1,)},
    {"growth_factors": (1, 2, 2, 4), "bottleneck_factors": (1, 2, 4, 4), "num_blocks": 5},
    {"small_inputs": False, "num_classes": 7},
    {"num_blocks": 1, "base": 4},
    {"boosted_exits": True},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_shared_convolution_equals_separate_ones(options):
    network = MSDNet(**{**TINY_NETWORK, **options}).double().eval()
    images = images_for(network).double()
    together = separate = network.stem(images)
    for layer in (layer for block in network.blocks for layer in block):
        together = layer(together)
        separate = {s: layer.compute(s, separate.__getitem__) for s in layer.scales}
        torch.testing.assert_close(together, separate, rtol=0, atol=1e-12)


def test_a_shared_convolution_trains_like_separate_ones():
    network = MSDNet(**TINY_NETWORK).double()
    layer = next(layer for layer in network.blocks[0] if layer.share_convolutions and len(layer.scales) > 1)
    grid = {s: x.detach() for s, x in network.stem(images_for(network).double()).items()}
    gradients = []
    for outputs in (layer(grid), {s: layer.compute(s, grid.__getitem__) for s in layer.scales}):
        loss = sum(x.square().sum() for x in outputs.values())
        gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_boosted_exits_add_half_of_the_logits_before():
    plain, boosted = (MSDNet(**TINY_NETWORK, boosted_exits=is_boosted).eval() for is_boosted in (False, True))
    plain.load_state_dict(boosted.state_dict())
    images = images_for(plain)
    own, logits = plain(images), boosted(images)
    torch.testing.assert_close(logits[2], own[2] + 0.5 * own[1] + 0.25 * own[0])
    logits[2].sum().backward()
    assert boosted.exits[2].linear.weight.grad.any()
    assert boosted.exits[1].linear.weight.grad is None
    extra = [
        a - b for a, b in zip(*(count_operations(network, 32) for network in (boosted, plain)), strict=True)
    ]
    assert extra == [0, boosted.num_classes, 2 * boosted.num_classes]
    assert torch.equal(IMTA(boosted).teacher_logits(boosted.features(images), []), logits[2])


def test_every_parameter_of_the_published_cifar_network_gets_a_gradient():
    network = MSDNet(num_classes=10, num_blocks=5, step_mode="lin_grow", num_channels=4, growth_rate=4)
    sum(z.square().sum() for z in network(torch.randn(2, 3, 32, 32))).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("scales", ["all", "coarsest"])
def test_gradient_equilibrium_equals_hooks_that_rescale(scales):
    """The same pass with hooks: they multiply by 1 / (K - i + 1) before exit i of K, by K - i after it."""
    network = MSDNet(**{**TINY_NETWORK, "num_blocks": 4}, gradient_equilibrium_scales=scales).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    parameters = [p for p in network.parameters() if p.requires_grad]

    def rescaled(grid, factor):
        grid = {s: x.view_as(x) for s, x in grid.items()}
        for s, x in grid.items():
            if scales == "all" or s == network.num_scales - 1:
                x.register_hook(lambda gradient: gradient * factor)
        return grid

    grid, logits = network.stem(images), []
    for i, (block, exit_module) in enumerate(zip(network.blocks, network.exits, strict=True), start=1):
        grid = rescaled(block(grid), 1 / (4 - i + 1))
        logits.append(exit_module.linear(exit_module.features(grid[network.num_scales - 1])))
        grid = rescaled(grid, 4 - i)
    expected, ours = (
        torch.autograd.grad(sum(z.square().sum() for z in exits), parameters, allow_unused=True)
        for exits in (logits, network(images))
    )
    for gradient, by_hand in zip(ours, expected, strict=True):
        assert (gradient is None) == (by_hand is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, by_hand, rtol=1e-10, atol=1e-12)


def test_gradients_of_images_are_rescaled_in_evaluation_mode_but_not_from_exit_to_exit():
    network = MSDNet(**TINY_NETWORK).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    steps = Stepwise(network, images)
    for rescaled in network(images):
        (true,) = torch.autograd.grad(steps.next_logits().square().sum(), images, retain_graph=True)
        (ours,) = torch.autograd.grad(rescaled.square().sum(), images, retain_graph=True)
        assert true.any()
        torch.testing.assert_close(ours, true / network.num_exits, rtol=1e-10, atol=1e-14)


def test_equilibrium_on_the_coarsest_scale_leaves_finer_scales_alone():
    """Gradients over finer scales are divided by GE on all scales, and left alone by GE on the coarsest."""
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for options in ({}, {"gradient_equilibrium_scales": "coarsest"}, {"gradient_equilibrium": False}):
        torch.manual_seed(1)
        network = MSDNet(**TINY_NETWORK, **options).double().eval()
        network(images)[-1].square().sum().backward()
        gradients.append(network.stem.scales[0][0].weight.grad)
    on_all, on_coarsest, plain = gradients
    torch.testing.assert_close(on_all, plain / 3, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(on_coarsest, on_all, rtol=1e-3)


def test_block_depths():
    assert block_depths(4, 4, 2, "even") == [4, 2, 2, 2]
    assert block_depths(5, 1, 1, "lin_grow") == [1, 2, 3, 4, 5]
    assert block_depths(3, 2, 2, "lin_grow") == [2, 3, 5]


def test_he_initialisation():
    network = MSDNet(num_channels=32, initialization="he")
    conv = network.exits[0].convolutions[1][0]
    expected = (2 / (3 * 3 * conv.out_channels)) ** 0.5
    assert abs(conv.weight.std().item() / expected - 1) < 0.02
    assert not any(e.linear.bias.any() for e in network.exits)
    assert all(
        (m.weight == 1).all() and (m.bias == 0).all()
        for m in network.modules()
        if isinstance(m, nn.BatchNorm2d)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"growth_factors": (1, 2), "bottleneck_factors": (1, 2, 4)}, "one number per scale"),
        ({"growth_factors": ()}, "positive integers"),
        ({"step_mode": "odd"}, "even, lin_grow"),
        ({"prune": "none"}, "max, min"),
        ({"reduction": 1.5}, "between 0"),
        ({"reduction": 0.01}, "leaves no channel"),
        ({"growth_rate": 3, "growth_factors": (1, 1, 1)}, "must be even"),
        ({"initialization": "zero"}, "pytorch, he"),
        ({"num_blocks": 3.0}, "num_blocks is 3.0"),
        ({"base": True}, "base is True"),
        ({"growth_factors": "124"}, "positive integers"),
        ({"prune": "min", "num_blocks": 1}, "need 2 layers"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        MSDNet(**{**TINY_NETWORK, **options})
