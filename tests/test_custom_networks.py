"""Networks and weights of users: what is kept, and what is refused in one line."""

import copy
import pickle
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

import models
from adaptive_inference import find_policies, fold, load_predictor, write_policy
from engine.checkpoint import save_network
from models import Backbone, MSDNet, build_backbone, count_operations, load, tracing
from models.backbone_exits import MapExit
from models.description import Split
from models.third_party import Constructor
from models.tracing import MODES, trace_both_modes
from tests.backbones import small_vit
from tests.conftest import describe


class Plain(nn.Module):
    """Two blocks and a linear layer; subclasses add something between the blocks or at the end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.linear = nn.Linear(12, 10)

    def between(self, x):
        return x

    def end(self, x):
        return self.linear(x.mean((2, 3)))

    def forward(self, images):
        return self.end(self.second(self.between(self.first(images))))


class FrozenNorm(Plain):
    """Statistics in buffers, from which the forward method computes scale and shift."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def between(self, x):
        scale = (self.variance + 1e-5).rsqrt()
        return (x - self.mean.reshape(1, -1, 1, 1)) * scale.reshape(1, -1, 1, 1)


class HandWrittenNorm(Plain):
    """A running mean that training updates in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def between(self, x):
        mean = x.mean((0, 2, 3)) if self.training else self.mean
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * mean.detach())
        return x - mean.reshape(1, -1, 1, 1)


class SharedBias(Plain):
    """What both blocks use is computed once from a parameter, and the batch size is read at the start."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, images):
        bias, batch_size = self.bias.exp(), images.shape[0]
        x = self.second(self.first(images) + bias) + bias
        return self.linear(x.mean((2, 3)).view(batch_size, -1))


class PlainTensor(Plain):
    """A tensor that is neither a parameter nor a buffer, and a call by keyword."""

    def __init__(self):
        super().__init__()
        self.shift = torch.rand(1, 8, 1, 1)

    def between(self, x):
        return x + self.shift

    def end(self, x):
        return self.linear(input=x.mean((2, 3)))


class LearnedQuery(Plain):
    """A linear layer that reads an expanded parameter."""

    def __init__(self):
        super().__init__()
        self.query, self.gate = nn.Parameter(torch.randn(1, 8)), nn.Linear(8, 8)

    def between(self, x):
        gate = self.gate(self.query.expand(1, -1))
        return x * gate.sigmoid().reshape(1, -1, 1, 1)


class Mask(Plain):
    """A mask with infinities in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    def between(self, x):
        return x * self.mask.softmax(-1).sum()


class WeightUsedTwice(Plain):
    """The weight of a convolution is also used directly."""

    def between(self, x):
        return F.conv_transpose2d(x, self.first[0].weight, stride=2, padding=1, output_padding=1).repeat(
            1, 3, 1, 1
        )[:, :8]


class Skip(Plain):
    """The first block's output is used again at the end, and the batch size is unpacked."""

    def forward(self, images):
        batch_size, _, _, _ = images.size()
        x = self.first(images)
        return self.linear((self.second(x) + x.mean()).mean((2, 3)).view(batch_size, -1))


class Gate(Plain):
    """The first block pools all of the image."""

    def __init__(self):
        super().__init__()
        gate = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid()]
        self.gate = nn.Sequential(*gate)

    def forward(self, images):
        return super().forward(images * self.gate(images))


class SwitchesGradients(Plain):
    def between(self, x):
        with torch.no_grad():
            return x * 2


class DrawsNumbers(Plain):
    def between(self, x):
        return x + torch.randn(8, 1, 1) if self.training else x


GENERATOR = torch.Generator()
torch.rand((), generator=GENERATOR)


class DrawsFromAGenerator(Plain):
    def between(self, x):
        return x + torch.randn(8, 1, 1, generator=GENERATOR)


class SeedsAGenerator(Plain):
    def between(self, x):
        return x + torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(5))


class DrawsWithPython(Plain):
    def between(self, x):
        return x * 2 if self.training and random.random() < 0.5 else x


class DrawsWithNumpy(Plain):
    def between(self, x):
        return x * 2 if self.training and np.random.rand() < 0.5 else x  # noqa: NPY002


class RunningMean(Plain):
    """A running mean that is no buffer."""

    def __init__(self):
        super().__init__()
        self.mean = torch.ones(())

    def between(self, x):
        if self.training:
            self.mean.mul_(0.9)
        return x * self.mean


class AssignsBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def between(self, x):
        self.count = self.count + 1
        return x


class AveragesAllBatches(Plain):
    """Statistics of BatchNorm are means over all batches so far."""

    def __init__(self):
        super().__init__()
        self.first[1].momentum = None


class CountsInPython(Plain):
    """The result depends on how often it ran: a trace knows one of the passes."""

    passes = 0

    def between(self, x):
        self.passes += 1
        return x * self.passes


class Remembers(Plain):
    """The result depends on how often it ran, which is counted outside of the network."""

    def between(self, x):
        PASSES.append(1)
        return x * len(PASSES)


class RemembersBeforeZeros(Plain):
    """The same at the end, before a linear layer of zeros, with which many networks begin."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.linear.weight)

    def end(self, x):
        PASSES.append(1)
        return self.linear(x.mean((2, 3)) * len(PASSES))


class AssignsMean(Plain):
    """A running mean that is no buffer, and that training assigns."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(())

    def between(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        return x - self.mean


class AssignsMeanLate(Plain):
    """The same, but there is no mean before the first images."""

    mean = None

    def between(self, x):
        if self.training:
            mean = x.mean().detach()
            self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return x if self.mean is None else x - self.mean


class AddsInPlace(Plain):
    """A trace makes a sum out of ``+=``."""

    def between(self, x):
        same = x
        x += 1
        return x * same


class SwitchesAutocastOff(Plain):
    def between(self, x):
        with torch.autocast("cpu", enabled=False):
            return x * 2


class EndsInTokens(Plain):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()

    def end(self, x):
        return self.flatten(self.linear(x.mean((2, 3))[:, None]))


class TwoEnds(Plain):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(12, 10)

    def end(self, x):
        x = x.mean((2, 3))
        return self.auxiliary(x) if self.training else self.linear(x)


class Tied(Plain):
    """Two convolutions with the same weight, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
        self.again = self.c

    def between(self, x):
        return self.again(self.c(self.b(self.a(x))))


class LoopsOverParameters(Plain):
    def between(self, x):
        return x * sum(p.abs().sum() for p in self.first.parameters())


class LoopsOverBuffers(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((), 1.5))

    def between(self, x):
        return x * sum(buffer for name, buffer in self.named_buffers() if name == "scale").abs()


class Reversal(torch.autograd.Function):
    """The identity, with the negative gradient."""

    @staticmethod
    def forward(context, x):
        return x

    @staticmethod
    def backward(context, gradient):
        return -gradient


class ReversesGradients(Plain):
    def between(self, x):
        return Reversal.apply(x)


class Expanded(Plain):
    """A tensor whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.mean = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1).expand(1, 3, 32, 32)

    def forward(self, images):
        return super().forward(images - self.mean)


class ExpandedBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(8))


class AssignsTheSame(Plain):
    """A number that every pass computes again."""

    def __init__(self):
        super().__init__()
        self.scale = 10**-0.5

    def between(self, x):
        self.scale = self.linear.out_features**-0.5
        return x * 10**-0.5


class Hooked(Plain):
    """A last linear layer with a hook that changes its input."""

    def __init__(self):
        super().__init__()
        self.linear.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))


PASSES = []


class Views(Plain):
    """Maps are flattened by ``view``, which channels-last memory does not allow."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12 * 8 * 8, 10)

    def end(self, x):
        return self.linear(x.view(x.size(0), -1))


KEPT = [
    Plain,
    Views,
    AveragesAllBatches,
    FrozenNorm,
    HandWrittenNorm,
    SharedBias,
    PlainTensor,
    LearnedQuery,
    Mask,
    WeightUsedTwice,
    Gate,
    Tied,
    Hooked,
    Expanded,
    AssignsTheSame,
    SeedsAGenerator,
]


def make(kind, seed=0):
    """Return a network whose statistics and buffers are not those it was made with."""
    torch.manual_seed(seed)
    network = kind()
    with torch.no_grad():
        for x in (x for x in network.buffers() if x.is_floating_point() and x.isfinite().all()):
            x.add_(torch.rand_like(x) - 0.5)
    return network


def save(network, path, image_size=32):
    save_network(path, network, describe(network, image_size), Split.unknown())


@pytest.mark.parametrize("kind", KEPT)
def test_outputs_statistics_folding_and_files(kind, tmp_path):
    uncut, images = make(kind), torch.randn(4, 3, 32, 32)
    network = Backbone(make(kind), ["first"])
    for training in (True, False):
        expected = uncut.train(training)(images)
        assert torch.equal(network.train(training)(images)[-1], expected)
    assert all(torch.equal(a, b) for a, b in zip(uncut.buffers(), network.network.buffers(), strict=True))

    torch.testing.assert_close(fold(network)(images)[-1], expected)
    save(network, tmp_path / "network.safetensors")
    loaded = load(tmp_path / "network.safetensors", network=make(kind, seed=1))
    if kind is not PlainTensor:  # that tensor is in no file
        assert torch.equal(loaded(images)[-1], expected)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (SwitchesGradients, "switches gradients off"),
        (DrawsNumbers, "draws random numbers"),
        (DrawsFromAGenerator, "draws random numbers"),
        (DrawsWithPython, "draws random numbers"),
        (DrawsWithNumpy, "draws random numbers"),
        (AssignsBuffer, "changes count, which|as buffer 'count'"),  # the latter by PyTorch 2.6
        (CountsInPython, "changes passes, which"),
        (RunningMean, "changes mean, which"),
        (AssignsMean, "changes mean, which"),
        (AssignsMeanLate, "gives other outputs in evaluation mode"),
        (Remembers, "gives other .* in training mode"),
        (RemembersBeforeZeros, "gives other outputs in training mode"),
        (AddsInPlace, r"usual causes: .* or x \+= y where x is used again$"),
        (LoopsOverParameters, r"such as a loop over parameters\(\)"),
        (LoopsOverBuffers, "gives other"),
        (ReversesGradients, "gives other gradients of 'first"),
        (SwitchesAutocastOff, r"uses torch\.autocast, which"),
        (EndsInTokens, r"ends in linear, whose output is \(2, 1, 10\)"),
        (TwoEnds, "other linear layers in training: auxiliary and linear"),
    ],
)
def test_what_a_trace_would_lose_is_refused_and_changes_nothing(kind, message):
    network = make(kind)
    before, attributes = copy.deepcopy(network), dict(vars(network))
    # no_grad: some programs build networks so.
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        Backbone(network, ["first"])
    assert vars(network) == attributes
    for name, x in (*network.state_dict().items(), *vars(network).items()):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, before.state_dict().get(name, vars(before).get(name)))


class CallsModulesInAnotherThread(Plain):
    """As a server does that predicts while it loads another network."""

    def between(self, x):
        thread = threading.Thread(target=lambda: CALLED.append(LAYER(torch.ones(1, 2)).shape))
        thread.start()
        thread.join()
        return x


LAYER, CALLED = nn.Linear(2, 2), []


def test_another_thread_calls_modules_while_a_network_is_traced():
    CALLED.clear()
    trace_both_modes(CallsModulesInAnotherThread())
    assert [(1, 2)] * len(MODES) == CALLED


def test_networks_are_traced_one_after_the_other(monkeypatch):
    """torch.fx has one tracer for all threads."""
    trace, running, most = tracing._Tracer.run, [], []

    def run(self, root):
        running.append(root)
        most.append(len(running))
        time.sleep(0.02)  # for the other thread
        found = trace(self, root)
        running.remove(root)
        return found

    monkeypatch.setattr(tracing._Tracer, "run", run)
    with ThreadPoolExecutor(4) as pool:
        networks = list(pool.map(lambda _: Backbone(Plain(), ["first"]), range(8)))
    assert {network.num_exits for network in networks} == {2}
    assert max(most) == 1


def test_another_thread_draws_random_numbers_while_a_network_is_traced(monkeypatch):
    for number_of_threads in (2, 1):
        states = iter([0, 1])  # what a network draws, every attempt draws
        monkeypatch.setattr(tracing, "_random_states", lambda states=states: next(states, 1))
        monkeypatch.setattr(tracing.threading, "active_count", lambda number=number_of_threads: number)
        if number_of_threads == 1:
            with pytest.raises(ValueError, match="draws random numbers"):
                Backbone(Plain(), ["first"])
        else:
            assert Backbone(Plain(), ["first"]).num_exits == 2


def test_a_refused_image_size_changes_nothing():
    network = small_vit()
    classifier = find_cuts_classifier(network)
    requires = [p.requires_grad for p in network.parameters()]
    with pytest.raises(ValueError, match="pixels only, not of 48"):
        Backbone(network, 2, num_classes=7, image_size=48, frozen=True)
    assert find_cuts_classifier(network) is classifier
    assert [p.requires_grad for p in network.parameters()] == requires


def find_cuts_classifier(network):
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def test_a_layer_that_knows_no_size_yet_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(ValueError, match="uninitialized parameter"):
        Backbone(network, ["0"])


def test_a_buffer_that_could_not_be_loaded_is_refused():
    with pytest.raises(ValueError, match="scale of ExpandedBuffer has elements that share memory"):
        Backbone(ExpandedBuffer(), ["first"])


def test_numbers_of_numpy_are_saved(tmp_path):
    number = np.int64(7)
    for network in (
        Backbone(Plain(), ["first"], number, image_size=np.int64(32)),
        MSDNet(number, num_blocks=1),
    ):
        names = [str(k) for k in range(7)]
        models.save(tmp_path / "x.safetensors", network, names, 32, mean=[0.5] * 3, std=[0.5] * 3)


def test_the_check_draws_no_random_numbers_and_seeds_nothing():
    weights = []
    for is_checked in (True, False):  # networks of libraries are not checked
        network = Plain()
        torch.manual_seed(5)
        constructor = None if is_checked else Constructor("torchvision", "resnet18", {})
        weights.append(Backbone(network, ["first"], constructor=constructor).exits[0].linear.weight)
    assert torch.equal(*weights)


def test_whole_numbers_are_not_rounded_in_half_precision(tmp_path):
    numbers = torch.tensor([[4097, 4099]])
    network, other = make(Plain), make(Plain)
    network.register_buffer("index", numbers)
    other.register_buffer("index", torch.zeros_like(numbers))
    network = Backbone(network, ["first"])
    description = describe(network)
    save_network(tmp_path / "network.safetensors", network, description, Split.unknown(), half=True)
    assert torch.equal(load(tmp_path / "network.safetensors", network=other).network.index, numbers)


class NormByMean(HandWrittenNorm):
    """What it computes depends on the buffer that it changes."""

    def between(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)).detach())
        return x * self.mean.reshape(1, -1, 1, 1)


class FunctionalNorm(Plain):
    """Batch normalisation that PyTorch counts as no change of its buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def between(self, x):
        return nn.functional.batch_norm(x, self.mean, self.var.abs(), training=self.training)


@pytest.mark.parametrize("kind", [NormByMean, FunctionalNorm])
def test_recomputed_activations_change_buffers_once_and_see_the_same_values(kind):
    images, results = torch.randn(4, 3, 32, 32), []
    for is_checkpointed in (False, True):
        network = Backbone(make(kind), ["first"]).train()
        network.checkpoint_activations = is_checkpointed
        torch.manual_seed(3)
        sum(z.square().sum() for z in network(images)).backward()
        results.append([p.grad for p in network.network.parameters()] + list(network.network.buffers()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_checkpoints_copy_only_the_buffers_of_a_segment():
    """Each buffer once, instead of all of them once per exit."""

    class Copies(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.clone:
                shapes.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    shapes, network = [], Backbone(make(NormByMean), ["first"]).train()
    network.checkpoint_activations = True
    with Copies():
        network(torch.randn(4, 3, 32, 32))
    assert shapes == [network.network.mean.shape]


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


def test_a_last_layer_of_its_own_kind_is_kept_and_not_replaced():
    for kind in (Cosine, nn.Linear):
        network = make(Plain)
        network.linear = kind(network.linear.in_features, 10)
        if kind is nn.Linear:
            network.linear.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
        with pytest.raises(ValueError, match=f"linear, the last layer of Plain, is a {kind.__name__} with"):
            Backbone(network, ["first"], num_classes=5)
        assert Backbone(network, ["first"], num_classes=10).network.linear is network.linear


def test_state_that_no_file_can_hold_is_refused_before_training():
    class CountsSteps(Plain):
        def get_extra_state(self):
            return {"steps": 1}

    with pytest.raises(ValueError, match="CountsSteps has extra state, _extra_state, which is no tensor"):
        Backbone(make(CountsSteps), ["first"])


def test_copies_but_no_pickles():
    network = Backbone(make(Plain), ["first"])
    assert copy.deepcopy(network).num_exits == 2
    with pytest.raises(
        pickle.PicklingError, match=r"^a Backbone cannot be pickled: save its state_dict\(\)$"
    ):
        pickle.dumps(network)


def test_why_a_number_of_exits_is_too_large():
    with pytest.raises(ValueError, match=r"at most: first; none can be at 'second': 2 values cross"):
        Backbone(make(Skip), 3)


def test_networks_without_weights_and_torchscript_are_refused():
    with pytest.raises(ValueError, match=r"does not end in an nn\.Linear"):
        Backbone(nn.Sequential(nn.Flatten()), 2)
    with pytest.raises(ValueError, match="TorchScript"):
        Backbone(torch.jit.trace(make(Plain).eval(), torch.rand(1, 3, 32, 32)), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_in_other_dtypes(dtype):
    network = Backbone(make(Plain).to(dtype), 2)
    assert {z.dtype for z in network(torch.rand(2, 3, 32, 32, dtype=dtype))} == {dtype}
    network.check_image_size(48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": "first"}, "exits is 'first'; give paths of modules"),
        ({"exits": [2, 4]}, r"^exits is \[2, 4\]; give paths of modules, such as .* or a number of exits$"),
        ({"exits": ["unused"]}, "does not run it"),
        ({"exits": ["first"], "layout": "NLC"}, "does not fit the output of 'first'"),
        ({"exits": ["first"], "num_classes": 0}, "num_classes is 0"),
    ],
)
def test_wrong_arguments(options, message):
    network = make(Plain)
    network.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        Backbone(network, **options)


def test_a_predictor_of_a_custom_network(tmp_path):
    network, file = Backbone(make(Plain), ["first"]).eval(), tmp_path / "network.safetensors"
    names = [f"class {i}" for i in range(10)]
    models.save(file, network, names, image_size=32, mean=np.full(3, 0.5), std=[0.25] * 3)
    images = torch.rand(60, 3, 32, 32)
    with torch.no_grad():
        logits = torch.stack(network(images))
    curve = find_policies(network, count_operations(network, 32), logits, logits[-1].argmax(1))
    write_policy(tmp_path / "network.policy.json", curve)
    predictor = load_predictor(file, network=make(Plain, seed=1))
    assert set(predictor(images).exits.tolist()) <= {0, 1}
    assert predictor.network.description.data.class_names == names
    assert len(predictor.predict_images([Image.new("RGB", (40, 50))]).classes) == 1
    with pytest.raises(ValueError, match="pass it: load"):
        load_predictor(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_names": ["one"]}, "class_names has 1 entries, where 10 belong"),
        ({"image_size": 0}, "image_size is 0"),
        ({"mean": [0.5]}, r"mean is \[0.5\]"),
        ({"std": [0, 1, 1]}, "std is"),
        ({"interpolation": "best"}, "interpolation is 'best'"),
        ({"mean": [123, 117, 104]}, "mean is .* for pixels from 0 to 1"),
        ({"std": [255, 255, 255]}, "std is .* for pixels from 0 to 1"),
        ({"class_names": "abcdefghij"}, "pass a list of names"),
        ({"network": nn.DataParallel(nn.Linear(2, 2))}, "a DataParallel cannot be saved"),
    ],
)
def test_a_description_that_does_not_fit_replaces_no_file(arguments, message, tmp_path):
    network, file = Backbone(make(Plain), ["first"]), tmp_path / "network.safetensors"
    fitting = {"class_names": list("abcdefghij"), "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    models.save(file, network, **fitting)
    content = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        models.save(file, **({"network": network} | fitting | arguments))
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    network = MSDNet(num_blocks=2, base=1, step=1, num_channels=4, growth_rate=4, num_classes=10).eval()
    fitting = {"class_names": list("abcdefghij"), "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    with pytest.raises(ValueError, match="FoldedNetwork cannot be saved"):
        models.save(tmp_path / "folded.safetensors", fold(network), **fitting)
    models.save(tmp_path / "whole.safetensors", network, **fitting)
    description = load(tmp_path / "whole.safetensors").description
    assert not description.held_out_are_new
    assert description.data.knows_class_names
    prune.l1_unstructured(network.exits[0].linear, "weight", 0.5)
    with pytest.raises(ValueError, match=r"no such tensor .*weight_orig: it was changed"):
        models.save(tmp_path / "pruned.safetensors", network, **fitting)


def test_hooks_of_joined_convolutions_fire():
    """Such as those of ``torch.nn.utils.prune``."""
    network = MSDNet(num_blocks=2, base=2, step=2, num_channels=4, growth_rate=4, num_classes=10).eval()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    images, fired = torch.randn(2, 3, 32, 32), []
    expected = network(images)
    for convolution in convolutions:
        convolution.register_forward_hook(lambda module, *_: fired.append(id(module)))
    for logits, other in zip(network(images), expected, strict=True):
        torch.testing.assert_close(logits, other)
    assert sorted(fired) == sorted(map(id, convolutions))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.ReLU])
def test_hooks_behind_joined_convolutions_fire_in_a_folded_network(kind):
    """A BatchNorm with a hook is not folded, so one of two joined convolutions may have a bias alone."""
    network = MSDNet(num_blocks=2, base=2, step=2, num_channels=4, growth_rate=4, num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    layers = [name for name, module in network.named_modules() if isinstance(module, kind)]
    for name in layers:
        fired, changed = [], copy.deepcopy(network)
        changed.get_submodule(name).register_forward_hook(lambda *_, fired=fired: fired.append(1))
        for logits, other in zip(fold(changed)(images), expected, strict=True):
            torch.testing.assert_close(logits, other)
        assert fired == [1], name


@pytest.mark.parametrize(("name", "size"), [("mobilenet_v3_small", 2), ("resnet18", 4)])
def test_images_of_which_the_first_block_makes_one_pixel_are_refused(name, size):
    with pytest.raises(ValueError, match=f"images of {size} pixels are too small"):
        build_backbone(name, 3, 5, image_size=size)


def test_gradients_of_exits_on_one_pixel_in_bfloat16():
    exit_module = MapExit(96, 10, channels_last=False, width=128, size=None)
    x = torch.randn(64, 96, 1, 1).contiguous(memory_format=torch.channels_last)
    for _ in range(5):  # undefined values are not always wrong ones
        garbage = torch.full((200_000,), float("nan"))
        del garbage
        with torch.autocast("cpu", torch.bfloat16):
            exit_module.features(x).square().sum().backward()
    gradient = exit_module.convolution[0].weight.grad.clone()
    assert gradient.isfinite().all()
    gradient[:, :, 1, 1] = 0
    assert not gradient.any()  # the border of the kernel meets zeros alone


def test_pretrained_weights_that_are_not_finite():
    weights = make(Plain).state_dict()
    weights["linear.bias"][0] = float("nan")
    with pytest.raises(ValueError, match=r"w\.pth: not all weights are finite"):
        Backbone(make(Plain), ["first"]).load_pretrained(weights, "w.pth")
