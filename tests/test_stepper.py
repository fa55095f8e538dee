"""A step gives the same gradient in parts, in two processes, with less memory, fused or compiled."""

import functools
import math
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adaptive_inference import fold
from adaptive_inference.fold import fuse
from engine.runtime.distributed import Processes, leave_process_group
from engine.stepper import Stepper, synchronise_batch_norm
from engine.trainer import Meters
from models import IMTA, MSDNet
from models.module_state import frozen_statistics
from models.network import fold_sequences
from settings.command_line import parse
from tests import forkserver
from tests.conftest import TINY_NETWORK
from train_GE import Stage1Objective
from train_IMTA import Stage2Objective

ALONE = Processes(0, 1, torch.device("cpu"), ())
PLAIN = ["--batch-size", "12", "--amp", "off", "--compile", "off"]
# A step of rate 1 moves weights by their gradients.
PLAIN_SGD = ["--momentum", "0", "--weight-decay", "0", *PLAIN]


def settings(*flags, stage="GE"):
    return parse(stage, [*PLAIN_SGD, *flags]).settings()


def make_objective(stage, chosen, **options):
    torch.manual_seed(0)
    network = MSDNet(**{**TINY_NETWORK, **options})
    if stage == "GE":
        return Stage1Objective(network, chosen).double().train()
    return Stage2Objective(IMTA(network.double()).double(), chosen).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 32, 32, dtype=torch.float64, generator=generator), torch.randint(
        10, (12,), generator=generator
    )


def one_step(objective, chosen, processes=ALONE, observe=lambda *_: None, rates=(1.0,), later=nullcontext):
    """Make a step per rate, all but the first in the context that ``later`` makes; return the weights."""
    images, targets = batch()
    share, stepper = slice(processes.rank, None, processes.world_size), Stepper(objective, chosen, processes)
    for number, rate in enumerate(rates):
        with later() if number else nullcontext():
            stepper.step(images[share], targets[share], rate, observe)
    return {name: tensor.double() for name, tensor in objective.state_dict().items()}


def assert_close(ours, expected, tolerance=1e-9):
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            ours[name],
            expected[name],
            atol=tolerance,
            rtol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )


class LinearNetwork(nn.Linear):
    def pretrained_parameters(self):
        return iter(())


class WithoutNormalisation(nn.Module):
    """Batch normalisation sees micro-batches one by one; without it, these and the whole batch must agree."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = LinearNetwork(3 * 32 * 32, 10).double()

    def forward(self, images, targets):
        logits = self.network(images.flatten(1))
        return nn.functional.cross_entropy(logits, targets, reduction="none"), logits[:, None]


@pytest.mark.parametrize("parts", ["2", "5", "12"])
def test_parts_of_a_batch_add_up(parts):
    whole = one_step(WithoutNormalisation(), settings())
    meters = Meters(1, torch.device("cpu"))
    chosen = settings("--accumulate", parts)
    assert_close(one_step(WithoutNormalisation(), chosen, observe=meters.update), whole, 1e-12)
    assert meters.totals[0] == 12


@pytest.mark.parametrize(
    ("flags", "make_optimizer", "largest_norm"),
    [
        (
            ["--momentum", "0.9", "--nesterov", "--weight-decay", "0.1"],
            functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
            math.inf,
        ),
        (
            ["--optimizer", "adamw", "--weight-decay", "0.1"],
            functools.partial(torch.optim.AdamW, weight_decay=0.1),
            math.inf,
        ),
        ([*PLAIN_SGD, "--clip-grad", "0.01"], torch.optim.SGD, 0.01),
        # The loss is scaled; autocast leaves float64 as it is.
        ([*PLAIN_SGD, "--clip-grad", "0.01", "--amp", "fp16"], torch.optim.SGD, 0.01),
    ],
)
def test_steps_are_those_of_pytorchs_optimisers(flags, make_optimizer, largest_norm):
    chosen, rates = parse("GE", [*PLAIN, *flags]).settings(), (0.1, 0.03, 0.2)
    expected, (images, targets) = WithoutNormalisation(), batch()
    optimizer = make_optimizer(expected.parameters())
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        expected(images, targets)[0].mean().backward()
        nn.utils.clip_grad_norm_(expected.parameters(), largest_norm)
        optimizer.step()
    ours = one_step(WithoutNormalisation(), chosen, rates=rates)
    assert_close(ours, expected.state_dict(), 1e-12)


def test_the_loss_of_stage_1_is_smoothed():
    objective, (images, targets) = make_objective("GE", settings("--label-smoothing", "0.1")), batch()
    losses, logits = objective(images, targets)
    smoothed = functools.partial(nn.functional.cross_entropy, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses, sum(smoothed(z, targets) for z in logits.unbind(dim=1)))


def test_statistics_are_frozen_and_come_back():
    """Also of PyTorch's synchronised kind, which works on GPUs only and insists on a counter."""
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    with frozen_statistics(layers):
        layers[0](torch.randn(4, 3, 5, 5))
        assert all(layer.momentum == 0 and layer.num_batches_tracked is not None for layer in layers)
    assert all(layer.momentum == 0.1 for layer in layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers.state_dict().items())


def test_a_network_after_synchronised_training_is_folded_like_the_file_of_it():
    """With ``--sync-bn``, thresholds are set on the network that was trained, and used on its file's."""
    network = IMTA(MSDNet(**TINY_NETWORK)).float().eval()
    expected = fold(network)
    synchronise_batch_norm(network)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert all(map(torch.equal, fold(network)(images), expected(images)))


def test_synchronising_keeps_the_activations_inside_timms_layers():
    layers = pytest.importorskip("timm.layers")
    norm = layers.BatchNormAct2d(3)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), norm).eval()
    for values in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    images = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        expected = network(images)
        synchronise_batch_norm(network)
        assert torch.equal(network(images), expected)
        fold_sequences(network, fuse)
        assert not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
        torch.testing.assert_close(network(images), expected)


def test_checkpointed_activations_change_neither_gradients_nor_statistics():
    chosen = settings()
    objective = make_objective("GE", chosen)
    objective.network.checkpoint_activations = True
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    objective.network.blocks[0][0].register_forward_pre_hook(count)
    assert_close(one_step(objective, chosen), one_step(make_objective("GE", chosen), chosen), 1e-12)
    assert calls == 2  # and once more in the backward pass


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["GE", "IMTA"])
def test_compiled_step_agrees(stage, monkeypatch):
    """There is one graph, and a new learning rate does not compile again (or capture, on a GPU)."""
    # Tracing is what can fail on our networks; generating code takes minutes.
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    torch.compiler.reset()
    compiled, plain = (
        settings(*flags, "--momentum", "0.9", stage=stage) for flags in (["--compile", "default"], [])
    )
    objectives = (make_objective(stage, chosen, num_blocks=2) for chosen in (compiled, plain))
    once = functools.partial(torch.compiler.set_stance, "fail_on_recompile")
    ours, expected = (
        one_step(objective, chosen, rates=(0.1, 0.03, 0.2), later=once)
        for objective, chosen in zip(objectives, (compiled, plain), strict=True)
    )
    assert_close(ours, expected)


class Overflowing(WithoutNormalisation):
    factor = 1e38

    def forward(self, images, targets):
        losses, logits = super().forward(images, targets)
        return losses * self.factor, logits


def test_steps_that_overflow_in_half_precision_are_skipped_and_counted():
    chosen = settings("--amp", "fp16")
    objective = Overflowing().float()
    stepper, meters = Stepper(objective, chosen, ALONE), Meters(1, torch.device("cpu"), only_finite=True)
    stepper.load_state_dict(
        Stepper(objective, settings(), ALONE).state_dict()
    )  # of a run that needed no scaling
    before = objective.network.weight.clone()
    images, targets = batch()
    stepper.step(images.float(), targets, 0.1, meters.update)
    assert stepper.was_skipped
    assert torch.equal(objective.network.weight, before)
    objective.factor = 1.0
    stepper.step(images.float(), targets, 0.1, meters.update)
    assert not stepper.was_skipped
    assert not torch.equal(objective.network.weight, before)
    objective.factor = float("inf")
    images_before = meters.totals[0].item()
    stepper.step(images.float(), targets, 0.1, meters.update)
    assert stepper.was_skipped
    assert meters.totals[0] == images_before
    assert meters.totals.isfinite().all()


def test_a_first_step_that_overflows_leaves_no_momentum():
    """Fused SGD makes buffers for it and then writes nothing; deterministic settings fill them with NaN."""
    images, targets = batch()
    weights = []
    for factors in ([1e38, 1.0, 1.0], [1.0, 1.0]):
        torch.manual_seed(0)
        objective = Overflowing().float()
        stepper = Stepper(objective, settings("--amp", "fp16", "--momentum", "0.9"), ALONE)
        torch.use_deterministic_algorithms(True)
        for factor in factors:
            objective.factor = factor
            stepper.step(images.float(), targets, 0.01, lambda *_: None)
        weights.append(objective.network.weight.clone())
    torch.testing.assert_close(*weights)


class ChangesBuffer(WithoutNormalisation):
    """The losses are multiplied by a buffer that every forward pass changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64))

    def forward(self, images, targets):
        losses, logits = super().forward(images, targets)
        return losses * self.scale.mul_(0.9), logits


def step_together(_):
    """Make steps as one of two processes, and save the weights."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/rendezvous", rank=rank, world_size=2)
    processes = Processes(rank, 2, torch.device("cpu"), ())
    results = {}
    for stage in ("GE", "IMTA"):
        chosen = settings(stage=stage)
        results[stage] = one_step(make_objective(stage, chosen).eval(), chosen, processes)
        chosen = settings("--amp", "bf16", stage=stage)
        objective = make_objective(stage, chosen).float()
        images, targets = (part[rank::2] for part in batch())
        Stepper(objective, chosen, processes).step(images.float(), targets, 0.1, lambda *_: None)
        results[f"{stage} in bf16"] = dict(objective.named_parameters())
    results["accumulated"] = one_step(WithoutNormalisation(), settings("--accumulate", "3"), processes)
    results["changed buffer"] = one_step(ChangesBuffer(), settings(), processes)
    torch.save(results, f"{rank}.pt")
    leave_process_group()
    return 0


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """Weights are the same after a step on the same global batch, in float64, with frozen BatchNorm."""
    ended = forkserver.run(step_together, [], tmp_path, {"RANK": 0}, {"RANK": 1})
    assert ended.statuses == [0, 0], ended.errors
    ours = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for stage in ("GE", "IMTA"):
        chosen = settings(stage=stage)
        expected = one_step(make_objective(stage, chosen).eval(), chosen)
        for rank in range(2):
            assert_close(ours[rank][stage], expected)
        assert_close(*(ours[rank][f"{stage} in bf16"] for rank in range(2)), 0)
    for rank in range(2):
        assert_close(ours[rank]["accumulated"], one_step(WithoutNormalisation(), settings()))
        assert_close(ours[rank]["changed buffer"], one_step(ChangesBuffer(), settings()))
