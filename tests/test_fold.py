"""Folding: which layers are folded and which are left alone.

``tests.contract`` compares folded networks with the originals.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from adaptive_inference import fold
from adaptive_inference.fold import fuse
from models import ExitNetwork, count_operations
from models.backbone import Backbone
from models.network import fold_sequences
from tests.contract import CASES
from tests.helpers import make_network

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


def test_a_folded_network_names_the_network_that_it_was():
    network = make_network(2)
    folded = fold(network)
    assert (folded.kind, folded.title) == ("IMTA", network.title)
    assert fold(network.backbone).title == network.backbone.title


def test_folding_again_changes_the_dtype():
    network = make_network(2).float()
    again = fold(fold(network, dtype=torch.bfloat16), dtype=torch.float64)
    assert again.fingerprint == fold(network).fingerprint
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert again.kind == "IMTA"


def test_images_are_cast_to_the_weights():
    """Also after ``half()``, and in replicas of DataParallel, which have buffers but no parameters."""
    folded, images = fold(make_network(1)), torch.zeros(1, 3, 32, 32)
    folded.to(torch.bfloat16)
    assert folded.dtype == torch.bfloat16
    assert folded(images)[0].dtype == torch.bfloat16
    for module in folded.modules():
        module._parameters.clear()
    assert folded._cast(images).dtype == torch.bfloat16


def test_half_precision_is_close():
    network = make_network(2).float()
    folded = fold(network, dtype=torch.bfloat16)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = list(zip(network(images), folded(images), strict=True))
    for exact, rough in logits:  # bfloat16 has 8 bits: one rounding changes a value by 0.4 % at most
        assert rough.dtype == torch.bfloat16
        assert (exact - rough).abs().max() < 0.04 * exact.abs().max()


def test_a_folded_network_compiles_in_one_piece():
    folded, images = fold(make_network(2).float()), torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for ours, expected in zip(compiled(images), folded(images), strict=True):
            torch.testing.assert_close(ours, expected)


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm's: normalisation with an activation inside."""

    __module__ = "timm.layers.norm_act"

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


class Conv2dSame(Standardised):
    """A convolution that only has the name of one of timm."""


class Tokens(nn.Module):
    """Sixteen tokens of 16 channels, normalised token by token; then their mean, normalised by channel."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.mean_linear, self.mean_norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (N, 16, 16)
        tokens = self.norm(self.linear(tokens))
        return self.classifier(self.mean_norm(self.mean_linear(tokens.mean(dim=1))))


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
        ([functools.partial(Conv2dSame, 3, 3, 1), nn.BatchNorm2d], 1),
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


def test_a_linear_layer_is_folded_only_where_it_computes_no_tokens():
    """Of tokens (N, L, C), BatchNorm1d normalises L, which may be as large as C."""
    sequence = with_statistics(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)))
    tokens, features = torch.randn(4, 16, 16).double(), torch.randn(4, 16).double()
    with torch.no_grad():
        expected, expected_2d = sequence(tokens), sequence(features)
        fold_sequences(sequence, fuse)
        torch.testing.assert_close(sequence(tokens), expected)
        fold_sequences(sequence, fuse, is_2d=True)
        torch.testing.assert_close(sequence(features), expected_2d)
    assert len(sequence) == 1


def test_the_graph_of_a_network_tells_tokens_from_features():
    network = with_statistics(Backbone(Tokens(), ["patches"], image_size=32, layout="NCHW"))
    images, folded = torch.randn(4, 3, 32, 32).double(), fold(network)
    with torch.no_grad():
        for ours, expected in zip(folded(images), network(images), strict=True):
            torch.testing.assert_close(ours, expected)
    left = [name for name, module in folded.network.network.named_modules() if isinstance(module, NORMS)]
    assert left == ["norm"]


def halved(module, inputs, output):
    return output / 2


def doubled(module, inputs):
    return (2 * inputs[0],)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


CHANGES = {
    "hook on the layer": lambda layer, norm: layer.register_forward_hook(halved),
    "hook on the norm": lambda layer, norm: norm.register_forward_hook(halved),
    "pre-hook on the layer": lambda layer, norm: layer.register_forward_pre_hook(doubled),
    "pre-hook on the norm": lambda layer, norm: norm.register_forward_pre_hook(doubled),
    "weight_norm by a hook": lambda layer, norm: nn.utils.weight_norm(layer),
    "spectral_norm by a hook": lambda layer, norm: nn.utils.spectral_norm(layer),
    "weight_norm": lambda layer, norm: nn.utils.parametrizations.weight_norm(layer),
    "parametrised norm": lambda layer, norm: parametrize.register_parametrization(norm, "weight", Negative()),
}


class Indexed(ExitNetwork, register=False):
    """Two exits that run parts of one sequence, by their positions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*block(3), *block(8))
        self.linears = nn.ModuleList(nn.Linear(8, 10) for _ in range(2))
        self.num_exits, self.num_classes, self.feature_dims = 2, 10, (8, 8)
        self.config = {}

    def check_image_size(self, size):
        pass

    def start(self, images):
        return {"x": images}

    def advance(self, k, state):
        x = self.layers[3 * k : 3 * k + 3](state["x"])
        return x.mean((2, 3)), {"x": x}

    def features(self, images, num_exits=None):
        state, features = self.start(images), []
        for k in range(self.num_exits):
            own, state = self.advance(k, state)
            features.append(own)
        return features

    def classify_next(self, k, features, previous_logits):
        return self.linears[k](features)

    def classifier_parameters(self):
        return self.linears.named_parameters("linears")


def block(channels):
    return nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()


def test_layers_keep_their_places():
    network = Indexed().eval()
    for norm in (network.layers[1], network.layers[4]):
        with_statistics(norm)
    network, images = network.double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    folded = fold(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for own, expected in zip(folded(images), network(images), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("is_2d", [True, False])
def test_batchnorm_without_factors(is_2d):
    if is_2d:
        layers, x = [nn.Linear(3, 8), nn.BatchNorm1d(8, affine=False)], torch.randn(4, 3)
    else:
        layers, x = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False)], torch.randn(4, 3, 5, 5)
    sequence = nn.Sequential(*layers).double().eval()
    sequence[1].running_mean.uniform_(), sequence[1].running_var.uniform_(1, 2)
    with torch.no_grad():
        expected = sequence(x.double())
        fold_sequences(sequence, fuse, is_2d)
        torch.testing.assert_close(sequence(x.double()), expected)
    assert len(sequence) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", ["weight_norm by a hook", "spectral_norm by a hook"])
def test_networks_with_computed_weights(change):
    cnn = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    CHANGES[change](cnn[0], cnn[1])
    network, images = Backbone(cnn, exits=2, image_size=32).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for own, expected in zip(fold(network)(images), network(images), strict=True):
            torch.testing.assert_close(own, expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_layers_with_hooks_or_parametrisations_are_left_alone(change):
    sequence = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    CHANGES[change](*sequence)
    sequence.eval()
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = sequence(images)
        fold_sequences(sequence, fuse)
        torch.testing.assert_close(sequence(images), expected)
    assert len(sequence) == 2
