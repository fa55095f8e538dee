"""What every network with exits must do, whatever it is made of.

    python -m tests.contract                     # every network of CASES and LIBRARY_CASES, a line each
    python -m tests.contract densenet121         # torchvision's; timm's if it is installed
    python -m tests.contract imta msdnet_large   # these

``tests/test_contract.py`` checks one or two networks of every kind. A new kind of network needs one entry in
``CASES``, and its name there.
"""

import argparse
import copy
import functools
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adaptive_inference import AdaptivePredictor, confidence_by_exit, fold
from adaptive_inference.fingerprint import network_fingerprint
from adaptive_inference.policies import Policy
from engine.checkpoint import save_network
from models import IMTA, Backbone, ExitNetwork, MSDNet, State, Stepwise
from models.description import Split
from models.saved import read_network
from tests.backbones import LIBRARIES, SMALL, Chain, is_available, make_named, make_small
from tests.conftest import describe

NUM_CLASSES = 10
NEVER = 1e8  # a threshold that no confidence reaches


@dataclass(frozen=True)
class Case:
    """A network to check.

    Args:
        build: Function that makes the network, with ``NUM_CLASSES`` classes.
        image_size: Height and width in pixels.
        block_of: Function of a parameter's name that returns the number, from 0, of its block, None for
            those of exits. None: the network does not use Gradient Equilibrium, or not on everything that
            passes between blocks. -1 stands for the block of the first exit that depends on it.
    """

    build: Callable[[], ExitNetwork]
    image_size: int = 32
    block_of: Callable[[str], int | None] | None = None

    def network(self) -> ExitNetwork:
        """Make the network, float64, in evaluation mode, with BatchNorm statistics that vary the logits."""
        return copy.deepcopy(_built(self))

    def images(self, count: int = 4) -> Tensor:
        """Make random images (count, 3, H, W), float64."""
        generator = torch.Generator().manual_seed(count)
        size = self.image_size
        return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


@functools.lru_cache(maxsize=1)  # the checks of one network come one after another
def _built(case: Case) -> ExitNetwork:
    torch.manual_seed(0)
    network = case.build().double().eval()
    norms = [module for module in network.modules() if hasattr(module, "running_var")]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 1, 2)
        norm.train()
        norm.momentum = 1.0  # keep the statistics of one batch
    with torch.no_grad():
        network(case.images(16))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def msdnet_block(name: str) -> int | None:
    """Return the block of a parameter of an MSDNet, or of one inside an IMTA network."""
    part, number, *_ = name.removeprefix("backbone.").split(".")
    if part == "stem":
        return 0
    return int(number) if part == "blocks" else None


def msdnet(num_blocks: int = 3, **options: object) -> MSDNet:
    """Make a small MSDNet that reads all its parameters."""
    small = {"num_channels": 4, "growth_rate": 4, "step_mode": "lin_grow"}
    return MSDNet(NUM_CLASSES, num_blocks=num_blocks, **{**small, **options})


def backbone_block(name: str) -> int | None:
    """Return -1 for a parameter of the uncut network, None for one of an exit, also inside an IMTA."""
    return -1 if name.removeprefix("backbone.").startswith("network.") else None


def backbone_case(name: str, **options: object) -> Case:
    """Return the case of one of the small networks of ``tests.backbones``."""
    return Case(functools.partial(make_small, name, **options), SMALL[name][2], backbone_block)


SINGLE_STAGE = {"freeze_backbone": False}
CASES: dict[str, Case] = {
    "msdnet": Case(msdnet, 32, msdnet_block),
    "msdnet_coarsest": Case(lambda: msdnet(gradient_equilibrium_scales="coarsest")),
    "msdnet_coarsest_one_scale": Case(
        lambda: msdnet(gradient_equilibrium_scales="coarsest", growth_factors=(2,), bottleneck_factors=(1,)),
        32,
        msdnet_block,
    ),
    "msdnet_five_exits": Case(lambda: msdnet(5), 32, msdnet_block),
    "msdnet_without_equilibrium": Case(lambda: msdnet(gradient_equilibrium=False)),
    "msdnet_boosted": Case(lambda: msdnet(boosted_exits=True), 32, msdnet_block),
    "msdnet_large": Case(lambda: msdnet(small_inputs=False), 65, msdnet_block),
    "msdnet_four_scales": Case(
        lambda: msdnet(
            growth_factors=(1, 2, 2, 4), bottleneck_factors=(1, 2, 4, 4), step_mode="even", reduction=0
        ),
        33,
        msdnet_block,
    ),
    "msdnet_one_exit": Case(lambda: msdnet(1, base=4), 32, msdnet_block),
    "msdnet_prune_min": Case(lambda: msdnet(prune="min", base=2), 32, msdnet_block),
    "msdnet_without_bottleneck": Case(lambda: msdnet(bottleneck=False), 32, msdnet_block),
    "imta": Case(lambda: IMTA(msdnet())),
    "imta_flowing_gradient": Case(lambda: IMTA(msdnet(), cut_isc_gradient=False)),
    "imta_without_isc": Case(lambda: IMTA(msdnet(), isc=False)),
    "imta_boosted": Case(lambda: IMTA(msdnet(boosted_exits=True))),
    "imta_moving_statistics": Case(lambda: IMTA(msdnet(), freeze_batchnorm=False)),
    "imta_single_stage": Case(lambda: IMTA(msdnet(), **SINGLE_STAGE), 32, msdnet_block),
    "imta_single_stage_flowing_gradient": Case(
        lambda: IMTA(msdnet(), cut_isc_gradient=False, **SINGLE_STAGE), 32, msdnet_block
    ),
    "imta_large": Case(lambda: IMTA(msdnet(small_inputs=False)), 65),
    **{name: backbone_case(name) for name in ("chain", "vit", "swin")},
    "chain_new_classes": Case(
        lambda: Backbone(Chain(num_classes=4), ["layers.1", "layers.5"], NUM_CLASSES, image_size=32),
        32,
        backbone_block,
    ),
    "imta_backbone": Case(lambda: IMTA(make_small("chain"))),
    "imta_backbone_single_stage": Case(lambda: IMTA(make_small("chain"), **SINGLE_STAGE), 32, backbone_block),
}


# Networks of torchvision and timm: too slow for the suite, checked by ``python -m tests.contract``.
LIBRARY_CASES = {
    **{f"{name}_small": backbone_case(name) for name in ("resnet", "mobilenet_v3_small", "convnext")},
    "chain_boosted": backbone_case("chain", boosted_exits=True),
    "chain_without_equilibrium": Case(lambda: make_small("chain", gradient_equilibrium=False)),
    **{
        name: Case(functools.partial(make_named, name), size, backbone_block)
        for name, (_, size, _) in LIBRARIES.items()
    },
}


def assert_close(ours: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Raise AssertionError where the two differ by more than ``tolerance``, relative to large numbers."""
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def check_shapes_and_prefix(case: Case) -> None:
    """Stopping at exit k gives the same as the full pass up to it."""
    network, images = case.network(), case.images()
    count = len(images)
    with torch.no_grad():
        features, logits = network.features(images), network(images)
        assert [tuple(f.shape) for f in features] == [(count, width) for width in network.feature_dims]
        assert [tuple(z.shape) for z in logits] == [(count, network.num_classes)] * network.num_exits
        for k in range(1, network.num_exits + 1):
            prefix = network(images, k)
            assert len(prefix) == len(network.features(images, k)) == k
            assert all(torch.equal(a, b) for a, b in zip(prefix, logits, strict=False))
    for impossible in (0, network.num_exits + 1):
        with pytest.raises(ValueError, match=f"1 to {network.num_exits}"):
            network(images, impossible)
    network.check_image_size(case.image_size)


class _Unchanging:
    """A network that checks that methods for inference keep their arguments, and put the batch first."""

    training = False

    def __init__(self, network: ExitNetwork):
        self.network, self.num_exits = network, network.num_exits

    def start(self, images: Tensor) -> State:
        return self._called(self.network.start, images)

    def advance(self, k: int, state: State) -> tuple[Tensor, State]:
        features, new_state = self._called(self.network.advance, k, state)
        assert all(key.isidentifier() for key in new_state)
        assert {len(x) for x in new_state.values()} <= {len(features)}
        return features, new_state

    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        return self._called(self.network.classify_next, k, features, previous_logits)

    @staticmethod
    def _called(function: Callable, *arguments: object) -> object:
        before = copy.deepcopy(arguments)
        result = function(*arguments)
        for argument, old in zip(arguments, before, strict=True):
            assert type(argument) is type(old)
            if isinstance(argument, dict):
                assert list(argument) == list(old)
                assert all(torch.equal(argument[key], old[key]) for key in old)
            elif isinstance(argument, Tensor):
                assert torch.equal(argument, old)
        return result


def check_exit_by_exit(case: Case) -> None:
    """``start``, ``advance`` and ``classify_next`` give the same as the full pass, whichever images leave."""
    network, images = case.network(), case.images(2 * case.network().num_exits)
    with torch.no_grad():
        expected = network(images)
        run, left = Stepwise(_Unchanging(network), images), torch.arange(len(images))
        for k in range(network.num_exits):
            assert_close(run.next_logits(), expected[k][left])
            stays = torch.arange(len(left)) != k % len(left)
            run.keep(stays if k % 2 else stays.nonzero().flatten())
            left = left[stays]


def check_early_exit(case: Case) -> None:
    """``early_exit`` and the predictor let the same images leave at the same exits, with the same logits."""
    network, images = case.network(), case.images(8)
    with torch.no_grad():
        logits = torch.stack(network(images))
    confidence, _ = confidence_by_exit(logits)
    middle = confidence.sort(dim=1).values[:, 3:5].mean(dim=1).tolist()
    for thresholds in (middle, [NEVER] * network.num_exits, [0.0] * network.num_exits):
        leaves = confidence >= torch.tensor(thresholds, dtype=torch.float64)[:, None]
        leaves[-1] = True
        exits = leaves.int().argmax(dim=0)
        ours, our_exits = network.early_exit(images, thresholds)
        prediction = AdaptivePredictor(network, Policy(tuple(thresholds)))(images)
        assert torch.equal(our_exits, exits)
        assert torch.equal(prediction.exits, exits)
        assert_close(ours, logits[exits, torch.arange(len(images))])
        assert_close(prediction.probs, ours.softmax(dim=1))


def check_gradient_equilibrium(case: Case) -> str | None:
    """Check that a block's gradient is the sum of the exits' own, divided by the number of exits from it on.

    Exit i of K reaches block j through the exits j .. i - 1, each of which multiplies by (K - m) / (K - m +
    1), and enters with 1 / (K - i + 1): the product is 1 / (K - j + 1) for every exit. An exit's own layers
    are left alone. (Both counted from 1.)
    """
    if case.block_of is None:
        return "not on everything that passes between blocks"
    network, images = case.network(), case.images()
    assert network.gradient_equilibrium, (
        f"declare gradient_equilibrium = True in {network.kind}, or leave block_of out of its case"
    )
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def gradients(exits: Sequence[int]) -> list[Tensor | None]:
        logits = network(images)
        loss = sum(logits[k].square().sum() for k in exits)
        return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

    number = network.num_exits
    equilibrium = gradients(range(number))
    for module in network.modules():
        if isinstance(module, ExitNetwork):
            module.gradient_equilibrium = False
    by_exit = [gradients([k]) for k in range(number)]
    for name, ours, own in zip(parameters, equilibrium, zip(*by_exit, strict=True), strict=True):
        block = case.block_of(name)
        if block == -1:
            block = next(k for k, gradient in enumerate(own) if gradient is not None and gradient.any())
        expected = sum(gradient for gradient in own if gradient is not None)
        divisor = 1 if block is None else number - block
        if ours is not None and not torch.allclose(ours, expected / divisor, rtol=1e-9, atol=1e-9):
            where = "an exit" if block is None else f"block {block} (from 0)"
            raise AssertionError(
                f"the gradient of {name} in {where} is not the exits' sum / {divisor}: features() must call "
                "rescale(x, 1 / (K - k)) before exit k and rescale(x, K - k - 1) after it, or the network "
                "must leave gradient_equilibrium False and its case block_of None"
            )
    return None


def unread_parameters(network: ExitNetwork) -> set[str]:
    """Return the names of parameters that no exit depends on.

    In an MSDNet, no exit reads the finer scales of the last layers, which are part of its grid all the same.
    """
    grid, prefix = network.stage_1, "" if network.stage_1 is network else "backbone."
    if not isinstance(grid, MSDNet):
        return set()
    read = {cell for plan in grid._plans for cell in plan.computed}
    names, depth = set(), 0
    for b, block in enumerate(grid.blocks):
        for i, layer in enumerate(block):
            depth += 1
            for name, _ in layer.named_parameters():
                _, scale, *_ = name.split(".")
                if (depth, int(scale)) not in read:
                    names.add(f"{prefix}blocks.{b}.{i}.{name}")
    return names


def check_every_parameter_gets_a_gradient(case: Case) -> None:
    """Training reaches all parameters that should learn, and no others."""
    network = case.network().train()
    sum(z.square().sum() for z in network(case.images(8))).backward()
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    missing = {name for name, p in trainable.items() if p.grad is None or not p.grad.any()}
    unread = unread_parameters(network) & trainable.keys()
    if isinstance(network, IMTA):  # its backbone's own classifiers are replaced
        own = {name for name, _ in network.backbone.classifier_parameters()}
        assert not any(p.requires_grad for name, p in network.backbone.named_parameters() if name in own)
    assert missing == unread, f"without a gradient: {missing - unread}, unread with one: {unread - missing}"
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def check_checkpointed_activations(case: Case) -> None:
    """With ``checkpoint_activations``, gradients and running statistics are the same."""
    results = []
    for is_checkpointed in (False, True):
        network = case.network().train()
        network.checkpoint_activations = is_checkpointed
        torch.manual_seed(0)
        sum(z.square().sum() for z in network(case.images(8))).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        results.append({**gradients, **dict(network.named_buffers())})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert_close(checkpointed[name], plain[name])


def check_parameter_lists(case: Case) -> None:
    """Check that ``classifier_parameters`` and ``pretrained_parameters`` are parameters of the network."""
    network = case.network()
    by_name = dict(network.named_parameters())
    classifiers = dict(network.classifier_parameters())
    assert all(by_name[name] is parameter for name, parameter in classifiers.items())
    # At least a weight per exit; biases do not count.
    assert sum(p.dim() > 1 for p in classifiers.values()) >= network.num_exits
    assert set(network.pretrained_parameters()) <= set(by_name.values())


def check_rebuilt(case: Case) -> None:
    """Check that a network rebuilt from its config trains the same parameters, also if it is frozen.

    A resumed run rebuilds its network, and the groups of its optimiser have to be the same.
    """
    network = case.network().float()
    _assert_rebuilt(network)
    try:
        network.freeze_pretrained()
    except ValueError:  # nothing is pretrained
        return
    _assert_rebuilt(network)


def _assert_rebuilt(network: ExitNetwork) -> None:
    rebuilt = network.from_config(network.config, _own_network(network))
    assert rebuilt.config == network.config
    ours, expected = _names_of_parameters(rebuilt), _names_of_parameters(network)
    for which, names in expected.items():
        assert ours[which] == names, f"{which} parameters differ after rebuilding from the config"


def _names_of_parameters(network: ExitNetwork) -> dict[str, list[str]]:
    """Return the names of the parameters that are trained, pretrained, and those of classifiers."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        "trained": [name for parameter, name in names.items() if parameter.requires_grad],
        "pretrained": [names[parameter] for parameter in network.pretrained_parameters()],
        "classifier": [name for name, _ in network.classifier_parameters()],
    }


def check_other_classes(case: Case) -> str | None:
    """For other classes all but the classifiers stays as it is, and all parameters are trained."""
    network = case.network().stage_1
    if _own_network(network) is not None:
        return "a custom network: its constructor is not in torchvision or timm"
    other = network.for_classes(7)
    shapes, theirs = ({name: x.shape for name, x in n.state_dict().items()} for n in (network, other))
    assert theirs.keys() == shapes.keys()
    changed = {name for name in shapes if theirs[name] != shapes[name]}
    assert changed == {name for name, _ in network.classifier_parameters()}
    assert {len(z[0]) for z in other.eval()(case.images().float())} == {other.num_classes} == {7}
    assert all(parameter.requires_grad for parameter in other.parameters())
    return None


def check_file(case: Case) -> None:
    """A network that is written and read gives the same logits, and has the same fingerprint."""
    network, images = case.network().float(), case.images().float()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "network.safetensors"
        save_network(path, network, describe(network, case.image_size), Split.unknown())
        loaded, *_ = read_network(path, _own_network(network))
        assert loaded.config == network.config
        assert network_fingerprint(loaded) == network_fingerprint(network)
        for ours, expected in zip(loaded(images), network(images), strict=True):
            assert torch.equal(ours, expected)


def _own_network(network: ExitNetwork) -> nn.Module | None:
    """Return the network without exits if it is a custom one, which a file cannot describe."""
    inner = network.stage_1
    if isinstance(inner, Backbone) and inner.config["library"] is None:
        return copy.deepcopy(inner.network)
    return None


def check_uncut(case: Case) -> str | None:
    """Check the last exit and the running statistics against the uncut network, in both modes."""
    network = case.network()
    if not isinstance(network, Backbone) or network.boosted:
        return "not cut from another network"
    original = copy.deepcopy(network.network)
    for training in (False, True):
        network.train(training)
        original.train(training)
        torch.manual_seed(0)
        expected = original(case.images())
        torch.manual_seed(0)
        ours = network.classify_next(network.num_exits - 1, network.features(case.images())[-1], None)
        assert torch.equal(ours, expected)
    own = network.network.state_dict()
    assert all(torch.equal(own[name], x) for name, x in original.state_dict().items())
    return None


def check_folded(case: Case) -> None:
    """A folded copy gives the same logits to rounding, in both ways to run it; the original is unchanged."""
    network, images = case.network().float(), case.images()
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        expected = network(images.float())
        for channels_last in (True, False):
            folded = fold(network, channels_last)
            assert network_fingerprint(folded) == network_fingerprint(network)
            assert not any(parameter.requires_grad for parameter in folded.parameters())
            for copied in (folded, copy.deepcopy(folded).train()):
                run = Stepwise(copied, images)  # in float64: a folded network casts
                for logits, z in zip(copied(images), expected, strict=True):
                    assert_close(logits, z, 1e-4)
                    assert_close(run.next_logits(), z, 1e-4)
        half = fold(network, dtype=torch.bfloat16)(images)
        assert {z.dtype for z in half} == {torch.bfloat16}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def check_onnx(case: Case) -> str | None:
    """Both kinds of export give the same logits, at the same exits."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        return "onnx, onnxscript or onnxruntime is not installed"
    from adaptive_inference.export import convert_blocks, export_blocks, export_onnx
    from onnx_predictor import OnnxPredictor

    network = case.network().float()
    size = case.image_size
    network.description = describe(network, size)
    pixels = torch.randint(256, (4, 3, size, size), dtype=torch.uint8)
    mean, std = (
        torch.tensor(x).reshape(3, 1, 1)
        for x in (network.description.data.mean, network.description.data.std)
    )
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        images, blocks = (pixels / 255 - mean) / std, convert_blocks(network)
        confidence, _ = confidence_by_exit(torch.stack(network(images)))
        in_order = confidence.sort(dim=1).values
        gap = in_order.diff(dim=1).argmax(dim=1, keepdim=True)  # the widest: float32 rounds
        middle = (in_order.gather(1, gap) + in_order.gather(1, gap + 1)).flatten() / 2
        for export, path in ((export_onnx, Path(folder) / "network.onnx"), (export_blocks, Path(folder))):
            export(network, path, None, blocks)
            runner = OnnxPredictor(path, threads=1)
            same_exit = [[NEVER] * k + [0.0] * (network.num_exits - k) for k in range(network.num_exits)]
            for thresholds in (*same_exit, middle.tolist()):
                found = runner.predict(pixels.numpy(), thresholds)
                logits, exits = network.early_exit(images, thresholds)
                assert found.exits.tolist() == exits.tolist()
                # float32 rounds each logit in proportion to the largest ones it is a sum of.
                scale = logits.abs().max().clamp(min=1)
                assert_close(torch.from_numpy(found.logits) / scale, logits / scale, 1e-4)
    return None


# Each returns None, or why it does not apply, and raises AssertionError.
CHECKS: dict[str, Callable[[Case], str | None]] = {
    function.__name__.removeprefix("check_"): function
    for function in (
        check_shapes_and_prefix,
        check_exit_by_exit,
        check_early_exit,
        check_gradient_equilibrium,
        check_every_parameter_gets_a_gradient,
        check_checkpointed_activations,
        check_parameter_lists,
        check_rebuilt,
        check_other_classes,
        check_file,
        check_uncut,
        check_folded,
        check_onnx,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Check the named networks and print a line for each; return 1 if any check failed."""
    cases = CASES | LIBRARY_CASES
    parser = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    options = parser.parse_args(argv)
    names = options.names or [name for name in cases if is_available(name)]
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join(cases)}")
    if options.jobs == 1 or len(names) <= options.jobs:
        kept = [_is_kept(name) for name in names]  # all of them, also after a failure
        return int(not all(kept))
    slowest_first = sorted(names, key=lambda name: name in CASES)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return int(not all(list(pool.map(_is_kept, slowest_first))))


def _is_kept(name: str) -> bool:
    """Check one network, print a line, and return True if it keeps the contract."""
    began = time.perf_counter()
    case = (CASES | LIBRARY_CASES)[name]
    failures, left_out = [], []
    for check, keeps in CHECKS.items():
        try:
            reason = keeps(case)
        except Exception as error:  # whatever it is, the other networks are still to be checked
            first_line = "".join(str(error).strip().splitlines()[:1])
            failures.append(f"{check}: {type(error).__name__} {first_line}".strip())
        else:
            left_out += [] if reason is None else [f"{check} left out: {reason}"]
    result = "; ".join([*(failures or ["ok"]), *left_out])
    print(f"{name:40} {result}  ({time.perf_counter() - began:.1f} s)", flush=True)
    return not failures


if __name__ == "__main__":
    sys.exit(main())
