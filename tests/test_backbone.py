"""Any network with exits: the pieces compute what the uncut network does; what cannot be cut is refused."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaptive_inference import fold
from adaptive_inference.fingerprint import network_fingerprint
from engine.checkpoint import LoadedNetwork, save_network
from engine.networks import stage_1_network_from
from models import IMTA, Stepwise, count_operations, load
from models.backbone import Backbone, build_backbone
from models.backbone_exits import MapExit
from models.cutting import find_cuts
from models.description import Split
from models.operations import measure_cost
from models.tracing import profile_graph, trace_both_modes
from tests import test_contract
from tests.backbones import SMALL, Chain, make_small, shaken, small_resnet, small_vit
from tests.conftest import describe

NAMES = list(SMALL)
NOT_IN_CONTRACT = [name for name in SMALL if name not in test_contract.NAMES]  # which checks the same


def images_for(name, count=4):
    return torch.randn(count, 3, SMALL[name][2], SMALL[name][2])


def uncut(name, seed=0):
    torch.manual_seed(seed)
    return shaken(SMALL[name][0]())


def last_exit(network, images):
    return network.classify(network.features(images))[-1]


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_equals_the_uncut_network(name):
    network, original, images = make_small(name).eval(), uncut(name).eval(), images_for(name)
    with torch.no_grad():
        assert torch.equal(network(images)[-1], original(images))


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_the_uncut_network_in_outputs_and_statistics(name):
    # Exits with dropout or other random layers would draw from the same generator: theirs have none.
    network, original, images = make_small(name).train(), uncut(name).train(), images_for(name)
    torch.manual_seed(1)
    expected = original(images)
    torch.manual_seed(1)
    assert torch.equal(last_exit(network, images), expected)
    own = network.network.state_dict()
    for key, x in original.state_dict().items():
        assert torch.equal(own[key], x), key


@pytest.mark.parametrize("name", NOT_IN_CONTRACT)
def test_stepwise_equals_all_at_once_and_a_prefix(name):
    network, images = make_small(name).eval(), images_for(name)
    with torch.no_grad():
        logits, run = network(images), Stepwise(network, images)
        for k, expected in enumerate(logits):
            assert torch.equal(run.next_logits(), expected)
            assert torch.equal(network(images, k + 1)[-1], expected)
    for features, width in zip(network.features(images), network.feature_dims, strict=True):
        assert features.shape == (4, width)


@pytest.mark.parametrize("name", NOT_IN_CONTRACT)
def test_advance_leaves_its_arguments_alone(name):
    network, images = make_small(name).eval(), images_for(name)
    state = network.start(images)
    with torch.no_grad():
        for k in range(network.num_exits):
            before = {key: x.clone() for key, x in state.items()}
            following = network.advance(k, state)[1]
            assert all(torch.equal(state[key], x) for key, x in before.items())
            state = following


@pytest.mark.parametrize("name", NOT_IN_CONTRACT)
@pytest.mark.parametrize("boosted", [False, True])
def test_every_parameter_gets_a_gradient(name, boosted):
    network = make_small(name, boosted_exits=boosted).train()
    sum(z.square().sum() for z in network(images_for(name))).backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_equilibrium_scales_what_reaches_each_block():
    """Exit k's gradient counts 1 / (K - k) times (K - j - 1) / (K - j) for each exit j before it."""
    images = images_for("resnet")
    plain = make_small("resnet", gradient_equilibrium=False).eval()
    balanced = make_small("resnet").eval()
    balanced.load_state_dict(plain.state_dict())
    first = "network.conv1.weight"
    factors = [1 / 4, 3 / 4 * 1 / 3, 3 / 4 * 2 / 3 * 1 / 2, 3 / 4 * 2 / 3 * 1 / 2]
    for k, factor in enumerate(factors):
        gradients = []
        for network in (plain, balanced):
            network.zero_grad()
            network(images)[k].square().sum().backward()
            gradients.append(network.get_parameter(first).grad)
        torch.testing.assert_close(gradients[1], gradients[0] * factor)


def test_boosted_exits_add_half_of_the_detached_logits_before():
    images = images_for("resnet")
    plain, boosted = make_small("resnet").eval(), make_small("resnet", boosted_exits=True).eval()
    own, total = plain(images), boosted(images)
    expected = own[0]
    for k in range(1, 4):
        expected = own[k] + 0.5 * expected
        torch.testing.assert_close(total[k], expected)
    assert boosted.boosted
    total[1].sum().backward()
    assert boosted.exits[0].linear.weight.grad is None


@pytest.mark.parametrize("name", ["resnet", "swin", "chain"])
def test_recomputed_activations_see_the_same_masks(name):
    images, gradients = images_for(name), []
    for checkpointing in (False, True):
        network = make_small(name).train()
        network.checkpoint_activations = checkpointing
        torch.manual_seed(3)
        sum(z.square().sum() for z in network(images)).backward()
        gradients.append([p.grad for p in network.parameters()] + list(network.buffers()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_every_tensor_is_stored_once_and_copies_are_independent():
    network = make_small("vit").eval()
    original = uncut("vit")
    own = [key for key in network.state_dict() if key.startswith("network.")]
    assert own == [f"network.{key}" for key in original.state_dict()]
    twin = copy.deepcopy(network)
    with torch.no_grad():
        before = network(images_for("vit"))[-1]
        for p in twin.parameters():
            p.zero_()
        assert not twin(images_for("vit"))[-1].any()
    assert before.any()
    assert all(p.any() for p in network.network.parameters())


def test_rebuilt_from_its_config():
    network = build_backbone("mobilenet_v3_small", 3, num_classes=7, image_size=64).eval()
    assert network.config["library"] == "torchvision"
    assert len(network.config["exits"]) == 2
    twin = Backbone.from_config(network.config).eval()
    twin.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(network(images), twin(images), strict=True))
    own = make_small("chain").eval()
    with pytest.raises(ValueError, match=r"Chain.*network="):
        Backbone.from_config(own.config)
    twin = Backbone.from_config(own.config, Chain())
    twin.load_state_dict(own.state_dict())
    assert torch.equal(twin.eval()(images)[0], own(images)[0])


def test_new_classes_replace_the_last_layer_alone():
    network = Backbone(small_resnet(), ["layer2"], num_classes=3)
    assert network.has_new_classifier
    assert network.num_classes == 3
    assert [tuple(p.shape) for name, p in network.classifier_parameters() if "weight" in name] == [
        (3, 128),
        (3, 512),
    ]
    pretrained = {id(p) for p in network.pretrained_parameters()}
    new = {name for name, p in network.named_parameters() if id(p) not in pretrained}
    assert all(name.startswith(("exits.", "network.fc.")) for name in new)
    assert "network.fc.weight" in new
    weights = small_resnet().state_dict()
    network.load_pretrained(weights)
    assert torch.equal(network.network.conv1.weight, weights["conv1.weight"])
    same = Backbone(small_resnet(), ["layer2"])
    same.load_pretrained(weights)
    assert torch.equal(same.network.fc.weight, weights["fc.weight"])
    assert not same.has_new_classifier
    with pytest.raises(ValueError, match="not those of Chain"):
        make_small("chain").load_pretrained(weights)


def names_of_pretrained(network):
    names = {parameter: name for name, parameter in network.named_parameters()}
    return [names[parameter] for parameter in network.pretrained_parameters()]


def test_a_rebuilt_network_knows_whether_its_classifier_came_with_the_weights(tmp_path):
    weights = torchvision.models.mobilenet_v3_small(num_classes=5).state_dict()
    torch.save(weights, tmp_path / "five_classes.pt")
    network = build_backbone(
        "mobilenet_v3_small", 3, 5, pretrained=tmp_path / "five_classes.pt", image_size=32
    )
    pretrained = names_of_pretrained(network)
    assert len(pretrained) == len([*network.network.parameters()])
    assert names_of_pretrained(Backbone.from_config(network.config)) == pretrained
    older = {name: value for name, value in network.config.items() if name != "has_new_classifier"}
    assert len(pretrained) - len(names_of_pretrained(Backbone.from_config(older))) == 2
    network.freeze_pretrained()
    for same in (network, Backbone.from_config(network.config)):
        assert {name.split(".")[0] for name, p in same.named_parameters() if p.requires_grad} == {"exits"}
    without_bias = {name: x for name, x in weights.items() if not name.endswith("3.bias")}
    assert len(without_bias) == len(weights) - 1
    partly = build_backbone("mobilenet_v3_small", 3, 5, image_size=32)
    partly.load_pretrained(without_bias)
    assert partly.has_new_classifier
    other = network.for_classes(7)
    assert other.has_new_classifier
    assert network.for_classes(5).has_new_classifier
    assert not network.for_classes(5, same_classes=True).has_new_classifier
    assert not partly.for_classes(5, same_classes=True).has_new_classifier
    single_stage = IMTA(network, freeze_backbone=False).for_classes(7)
    assert single_stage.stage_1.config == other.config


@pytest.mark.parametrize("is_single_stage", [False, True])
def test_the_classifier_of_a_run_comes_with_its_weights_unless_it_was_never_trained(is_single_stage):
    """A single stage trains the classifiers of stage 2 alone."""
    network = IMTA(build_backbone("mobilenet_v3_small", 3, 5, image_size=32), freeze_backbone=False)
    description = describe(network)
    description = replace(description, recipe={**description.recipe, "single_stage": is_single_stage})
    origin = LoadedNetwork(Path("best.safetensors"), network, description, Split.unknown())
    backbone = stage_1_network_from(origin, description.data)
    weights = [stage.network.classifier[3].weight for stage in (backbone, network.backbone)]
    assert torch.equal(*weights) is not is_single_stage
    assert backbone.has_new_classifier is is_single_stage
    assert torch.equal(backbone.network.features[0][0].weight, network.backbone.network.features[0][0].weight)


def test_exits_are_put_where_the_channels_can_be_told():
    pytest.importorskip("timm")
    network = build_backbone("timm/nest_tiny", 3, image_size=224)
    assert network.config["exits"] == ["levels.1", "levels.2.pool"]


def test_a_custom_network_is_not_built_again_for_other_classes():
    with pytest.raises(ValueError, match="make a new Backbone"):
        Backbone(small_resnet(), ["layer2"], num_classes=5).for_classes(7)


def test_where_the_classifier_came_from_is_no_part_of_a_fingerprint():
    network = Backbone(small_resnet(), ["layer2"], num_classes=5)
    before = network_fingerprint(network)
    network.load_pretrained(network.network.state_dict())
    assert not network.has_new_classifier
    assert network_fingerprint(network) == before


@pytest.mark.parametrize("has_classifier", [False, True])
def test_a_frozen_network_trains_its_classifier_exactly_if_the_weights_have_none(tmp_path, has_classifier):
    weights = torchvision.models.mobilenet_v3_small(num_classes=10).state_dict()
    last = ("classifier.3.weight", "classifier.3.bias")
    kept = {name: x for name, x in weights.items() if has_classifier or name not in last}
    torch.save(kept, tmp_path / "weights.pt")
    network = build_backbone(
        "mobilenet_v3_small",
        3,
        10,
        pretrained=tmp_path / "weights.pt",
        image_size=32,
        options={"num_classes": 10},
        frozen=True,
    )
    trained = [name for name, p in network.network.named_parameters() if p.requires_grad]
    assert trained == ([] if has_classifier else list(last))
    assert all(p.requires_grad for p in network.exits.parameters())
    assert not network.network.training


def test_a_frozen_network_keeps_weights_and_statistics():
    network = Backbone(small_resnet(), ["layer1", "layer2"], num_classes=5)
    network.freeze_pretrained()
    network.train()
    before = copy.deepcopy(network.network.state_dict())
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, 0.1)
    sum(z.square().sum() for z in network(torch.randn(4, 3, 32, 32))).backward()
    optimizer.step()
    changed = [key for key, x in network.network.state_dict().items() if not torch.equal(x, before[key])]
    assert changed == ["fc.weight", "fc.bias"]
    assert network.exits[0].convolution[1].training
    assert not network.network.bn1.training


@pytest.mark.parametrize("name", NOT_IN_CONTRACT)
def test_folded_network_gives_the_same_logits(name):
    network, images = make_small(name).eval(), images_for(name)
    folded = fold(network)
    with torch.no_grad():
        for logits, expected in zip(folded(images), network(images), strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    left = [key for key, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == []
    assert count_operations(folded, SMALL[name][2]) == count_operations(network, SMALL[name][2])
    with pytest.raises(RuntimeError, match="folded network cannot be trained"):
        folded.network.train().features(images)


def test_isc_on_any_network():
    network, images = IMTA(make_small("chain")).eval(), images_for("chain")
    logits = network(images)
    assert [z.shape for z in logits] == [(4, 10)] * 3
    torch.testing.assert_close(fold(network)(images)[-1], logits[-1])
    network.train()
    sum(z.sum() for z in network(images_for("chain"))).backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert all(p.grad is not None for p in network.classifiers.parameters())


def test_even_exits_lie_at_even_shares_of_the_operations():
    network = build_backbone("resnet18", exits=4, num_classes=10, image_size=64)
    blocks = {name for name, _ in network.network.named_modules()}
    assert set(network.config["exits"]) <= blocks
    operations = count_operations(network, 64)
    for k, count in enumerate(operations[:-1]):
        assert abs(count / operations[-1] - (k + 1) / 4) < 0.15


def test_operations_are_those_of_the_uncut_network_and_the_exits():
    network = make_small("resnet")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.device("meta"):
        copy.deepcopy(network.network).to("meta").eval()(torch.empty(1, 3, 32, 32))
    last = measure_cost(network, 32, multiply_adds_only=True, lazy=True).operations[-1]
    heads = 0
    for width, side in ((64, 8), (128, 4), (256, 2)):
        heads += (side // 2) ** 2 * 9 * width * 128 + 128 * 10
    assert last == counter.get_total_flops() // 2 + heads


def test_exits_average_large_maps_before_their_convolution():
    network = make_small("resnet").eval()
    exit_1 = network.exits[0]
    large = torch.randn(2, exit_1.channels, 56, 42)
    averaged = nn.functional.avg_pool2d(large, 3)
    assert averaged.shape[-2:] == (18, 14)
    torch.testing.assert_close(exit_1.features(large), exit_1.features(averaged))
    not_large = torch.randn(2, exit_1.channels, 27, 27)
    convolved = exit_1.convolution(not_large)
    torch.testing.assert_close(exit_1.features(not_large), convolved.mean((2, 3)))


def old_exit_logits(network, images):
    """Return the logits of exits at layer1 and layer3 of a ResNet, by the rule of files without options."""
    resnet = network.network
    first = resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images)))))
    maps = first, resnet.layer3(resnet.layer2(first))
    return [
        exit_module.linear(exit_module.convolution(x).mean((2, 3)))
        for x, exit_module in zip(maps, network.exits, strict=True)
    ]


def test_a_config_without_the_options_of_exits_means_the_older_exits():
    new = Backbone(small_resnet(), ["layer1", "layer3"])
    older = {name: value for name, value in new.config.items() if name not in ("exit_width", "exit_size")}
    network, images = Backbone.from_config(older, small_resnet()).eval(), torch.randn(2, 3, 128, 128)
    assert network.feature_dims == (128, 256, 512)  # layer1 has 64 channels, layer3 256
    assert MapExit(600, 10, False, width=None, size=None).feature_channels == 512
    logits = network(images)
    for ours, expected in zip(logits, old_exit_logits(network, images), strict=False):
        torch.testing.assert_close(ours, expected)
    averaging = Backbone.from_config({**network.config, "exit_size": 14}, small_resnet()).eval()
    averaging.load_state_dict(network.state_dict())
    assert not torch.allclose(averaging(images)[0], logits[0])
    assert network_fingerprint(averaging) != network_fingerprint(network)


def test_the_options_of_exits_are_kept(tmp_path):
    options = {"exit_width": 24, "exit_size": 4}
    network = make_small("chain", **options)
    assert network.feature_dims[0] == 24
    assert options.items() <= network.config.items()
    assert options.items() <= Backbone.from_config(network.config, Chain()).config.items()
    networks = [network, IMTA(network)]
    images = images_for("chain")
    for saved in networks:
        save_network(tmp_path / "own.safetensors", saved, describe(saved), Split.unknown())
        again = load(tmp_path / "own.safetensors", network=Chain())
        assert options.items() <= again.stage_1.config.items()
        assert torch.equal(again(images)[0], saved.eval()(images)[0])
        assert network_fingerprint(again) == network_fingerprint(saved)
        torch.testing.assert_close(fold(again)(images)[0], again(images)[0])
    named = build_backbone("mobilenet_v3_small", 3, image_size=64, **options)
    assert options.items() <= named.for_classes(5).config.items()
    assert options.items() <= IMTA(named).for_classes(5).stage_1.config.items()


@pytest.mark.parametrize(
    ("option", "value"), [("exit_width", 0), ("exit_width", "128"), ("exit_size", -14), ("exit_size", 14.0)]
)
def test_bad_options_of_exits_are_refused_in_one_line(option, value):
    with pytest.raises(ValueError, match=f"^{option} is {value!r}; it must be a positive integer or None$"):
        Backbone(Chain(), 3, **{option: value})


@pytest.mark.parametrize(
    ("make", "exits", "message"),
    [
        (small_resnet, ["layer7"], "no module 'layer7' in ResNet; exits can be at: layer"),
        (small_resnet, ["layer2.0.bn3"], r"exits can be at: layer\d"),
        (small_resnet, ["layer1.0.conv1"], "2 values cross a cut there .layer1.0.conv1, maxpool."),
        (small_resnet, ["layer2", "layer1"], "in the network's order: layer1, layer2"),
        (small_resnet, ["layer1", "layer1.0"], "'layer1' and 'layer1.0' are the same place"),
        (small_resnet, ["layer1.0.relu"], "more than once"),
        (small_resnet, ["fc"], "nothing but the last linear layer"),
        (small_resnet, [], "exits is empty"),
        (small_resnet, 1, "at least 2"),
        (small_resnet, 30, "has places for"),
        (torchvision.models.squeezenet1_1, 3, "does not end in an nn.Linear"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(make, exits, message):
    with pytest.raises(ValueError, match=message) as caught:
        Backbone(make(), exits)
    assert "\n" not in str(caught.value)


class Encoder(nn.Module):
    """Two patches a side, and an encoder that is one layer for ``torch.fx``."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 16, stride=16)
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
        self.encoder, self.linear = nn.TransformerEncoder(layer, 3), nn.Linear(16, 10)

    def encode(self, x):
        return self.encoder(x)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.linear(self.encode(x).mean(dim=1))


class LayerByLayer(Encoder):
    def encode(self, x):
        for layer in self.encoder.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("exits", [["encoder.layers.1"], 3])
def test_how_to_cut_inside_a_module_that_is_not_traced(exits):
    hint = "torch.fx does not look into 'encoder'; call its layers one by one in the forward method$"
    with pytest.raises(ValueError, match=hint):
        Backbone(Encoder(), exits)
    early = Backbone(LayerByLayer(), exits).config["exits"]
    assert early == (exits if isinstance(exits, list) else ["encoder.layers.0", "encoder.layers.1"])


def test_the_example_of_the_cuts():
    network = torchvision.models.resnet18()
    traces = trace_both_modes(network)
    cuts = find_cuts(network, traces, profile_graph(network, traces, 224), exits=4)
    assert (cuts.paths, cuts.layouts) == (["layer1.0", "layer2", "layer3"], ["NCHW"] * 3)


class CopiesOfInputs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_segments_that_begin_in_place_copy_their_input_once(training):
    network = make_small("chain").train(training)  # both later segments begin with a ReLU
    with CopiesOfInputs() as copies, torch.no_grad():
        network(images_for("chain"))
    assert copies.count == 2


class Undecided(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_what_cannot_be_traced_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"torch.fx cannot trace Undecided: .*control flow"):
        Backbone(Undecided())


def test_layout_is_found_and_can_be_said():
    assert make_small("swin").config["layout"] == ["NHWC", "NHWC"]
    assert make_small("vit").config["layout"] == ["NLC", "NLC"]
    assert make_small("convnext").config["layout"] == ["NCHW", "NCHW"]
    said = Backbone(small_resnet(), ["layer1", "layer2"], layout="NCHW")
    assert said.feature_dims == (128, 128, 512)
    pooled = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(4), nn.Flatten(2), nn.Conv1d(8, 24, 3)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(336, 5)),
    )
    with pytest.raises(ValueError, match=r"cannot be told from the shapes .*: pass layout="):
        Backbone(pooled, ["3"])
    assert Backbone(pooled, ["3"], layout="NCL").config["layout"] == ["NCL"]
    with pytest.raises(ValueError, match="layout is 'CHWN'; allowed"):
        Backbone(small_resnet(), ["layer1"], layout="CHWN")


def test_image_sizes():
    vit, resnet = make_small("vit"), make_small("resnet")
    vit.check_image_size(32)
    with pytest.raises(ValueError, match="takes images of 32 pixels only, not of 64"):
        vit.check_image_size(64)
    with pytest.raises(ValueError, match="takes images of 32 pixels only, not of 64"):
        Backbone(small_vit(), 3, image_size=64)
    unusual = torchvision.models.VisionTransformer(40, 8, 3, 2, 32, 64, num_classes=10)
    for image_size, end in ((None, r"\); say image_size=$"), (48, r"\)$")):
        with pytest.raises(ValueError, match=f"does not run on colour images of any usual size .*{end}"):
            Backbone(unusual, 3, image_size=image_size)
    for size in (32, 33, 224):
        resnet.check_image_size(size)
    with pytest.raises(ValueError, match="images of 4 pixels are too small: this network needs at least 5"):
        resnet.check_image_size(4)
    resnet.check_image_size(5)


def test_files(tmp_path):
    for network, own in ((make_small("chain"), Chain()), (IMTA(make_small("chain")), Chain())):
        description, split = describe(network), Split.unknown()
        save_network(tmp_path / "own.safetensors", network, description, split)
        with pytest.raises(ValueError, match=r"own.safetensors: 'Chain' is a custom network; pass it"):
            load(tmp_path / "own.safetensors")
        message = r"own.safetensors does not fit the network that was passed: it (holds another|describes an)"
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "own.safetensors", network=small_resnet())
        again = load(tmp_path / "own.safetensors", network=own)
        images = images_for("chain")
        assert all(torch.equal(a, b) for a, b in zip(again(images), network.eval()(images), strict=True))
        assert again.config == network.config


@pytest.mark.slow
def test_example_of_own_network_runs_outside_the_clone(tmp_path):
    clone = Path(__file__).parents[1]
    program = tmp_path / "own_network.py"
    program.write_text((clone / "examples" / "own_network.py").read_text())
    ended = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        check=True,
    )
    accuracy, images = float(ended.stdout.split()[0]), ended.stdout.rpartition(" exits taken: ")[2]
    assert accuracy > 90
    assert sum(int(part.split()[0]) for part in images.split(", ")) == 200
