"""Our networks and losses against outputs of the released ones, in ``tests/fixtures``."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import train_IMTA
from engine.checkpoint import LoadedNetwork
from models import (
    IMTA,
    MSDNet,
    count_operations,
    load_released,
    measure_cost,
    one_for_all_loss,
    sum_of_cross_entropies,
    to_released,
)
from models.description import DataInfo
from settings.command_line import parse
from tests.golden import FIXTURES, PUBLISHED, STAGE_1, STAGE_2, golden_case, sketch


def assert_same(ours: Tensor | float, golden: Tensor | float) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-9, atol=1e-9)


def assert_same_gradients(ours: dict[str, Tensor | None], golden: dict[str, list[float] | None]) -> None:
    """Compare gradients by released name; golden ones are sketches, and None where no gradient reaches."""
    assert {name for name, gradient in ours.items() if gradient is not None} == {
        name for name, g in golden.items() if g is not None
    }
    assert golden.keys() <= ours.keys()
    for name, expected in golden.items():
        if expected is None:
            continue
        expected = torch.tensor(expected, dtype=torch.float64)
        # float32 rounds at 6e-8 of an element; the signed sums may cancel, so that the norm is the measure.
        # The floor is for a bias before BatchNorm, whose gradient is zero but for rounding.
        tolerance = 1e-6 * expected.abs().max().item() + 1e-12
        found = sketch(name, ours[name])
        torch.testing.assert_close(
            found, expected, rtol=1e-6, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def five_steps(
    network: MSDNet | IMTA, settings: dict, forward: Callable[[], tuple[Tensor, list[Tensor]]]
) -> tuple[list[float], list[Tensor], dict[str, Tensor | None]]:
    """Return the losses of five SGD steps on one batch, and logits and gradients of the first.

    ``forward`` returns (loss, logits). Gradients have their released names.
    """
    names = {tensor.data_ptr(): name for name, tensor in to_released(network).items()}
    parameters = {names[p.data_ptr()]: p for p in network.parameters()}
    optimizer = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], **settings)
    losses = []
    for step in range(5):
        loss, logits = forward()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first_logits = [z.detach() for z in logits]
            first_gradients = {
                name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()
            }
        optimizer.step()
        losses.append(loss.item())
    return losses, first_logits, first_gradients


@pytest.mark.parametrize("name", [*STAGE_1, STAGE_2])
def test_evaluation(name):
    case = golden_case(name)
    network = load_released(case["checkpoint"], **case["config"]).double()
    images = case["images"].double()
    with torch.no_grad():
        features, logits = network.features(images), network(images)
        assert_same(features, case["eval_features"])
        assert_same(logits, case["eval_logits"])
        if name == STAGE_2:
            assert_same(network.teacher_logits(features, logits), case["eval_teacher_logits"])


@pytest.mark.parametrize("name", STAGE_1)
def test_stage_1_training(name):
    case = golden_case(name)
    network = load_released(case["checkpoint"], **case["config"]).double().train()
    images, targets = case["images"].double(), case["targets"]
    assert network.gradient_equilibrium == case["gradient_equilibrium"]

    def forward() -> tuple[Tensor, list[Tensor]]:
        logits = network(images)
        return sum_of_cross_entropies(logits, targets).mean(), logits

    losses, first_logits, first_gradients = five_steps(network, case["sgd"], forward)
    assert_same(first_logits, case["train_logits"])
    assert_same_gradients(first_gradients, case["gradients"])
    assert_same(losses, case["sgd_losses"])


@pytest.mark.parametrize("run", [0, 1])
def test_stage_2_training_with_the_flag_released(run):
    """Through the stage's own pieces: --released builds the network on the frozen stage 1 and the loss."""
    case = golden_case(STAGE_2)
    golden = case["released_runs"][run]
    options = {"temperature": golden["temperature"], "gamma": golden["gamma"]}
    flags = [
        "--released",
        "--amp",
        "off",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]
    settings = parse("IMTA", flags).settings()
    released = load_released(case["checkpoint"], **case["config"])
    data = DataInfo(
        "cifar100", [str(i) for i in range(100)], 32, 1.0, "bilinear", [0.5] * 3, [0.5] * 3, 1, ""
    )
    network = train_IMTA.Stage2().make_network(
        settings, data, LoadedNetwork(FIXTURES, released.backbone, None, None)
    )
    network.load_state_dict(released.state_dict())
    objective = train_IMTA.Stage2Objective(network.double(), settings).train()
    images, targets, teachers = case["images"].double(), case["targets"], []

    def forward() -> tuple[Tensor, list[Tensor]]:
        losses, logits = objective(images, targets)
        return losses.mean(), list(logits.unbind(1))

    def noted(*args) -> Tensor:
        teachers.append(teacher_logits(*args))
        return teachers[-1]

    teacher_logits, network.teacher_logits = network.teacher_logits, noted
    losses, first_logits, first_gradients = five_steps(network, case["sgd"], forward)
    assert_same(first_logits, golden["train_logits"])
    assert_same(teachers[0], golden["teacher_logits"])
    assert_same_gradients(first_gradients, golden["gradients"])
    assert_same(losses, golden["losses"])
    assert_same(
        one_for_all_loss(first_logits, targets, teachers[0], **options).mean().item(),
        golden["loss_batchmean"],
    )


def published_network(name: str) -> tuple[MSDNet, int]:
    """A network without values, and its image size in pixels."""
    with torch.device("meta"):
        network = MSDNet(**PUBLISHED[name])
    return network, 32 if network.small_inputs else 224


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_and_parameters(name):
    golden = json.loads((FIXTURES / "operation_counts.json").read_text())
    assert golden.keys() == PUBLISHED.keys()
    network, image_size = published_network(name)
    cost = measure_cost(network, image_size)
    assert cost.operations == golden[name]["flops"]
    assert cost.parameters == golden[name]["params"]
    assert sum(p.numel() for p in network.parameters()) == golden[name]["total"]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar100_batch_lin5", [5.96, 12.75, 24.72, 40.50, 58.48]),
        ("imagenet_step4", [255.8, 615.0, 964.7, 1254.5, 1360.5]),
    ],
)
def test_lazy_operations(name, millions):
    network, image_size = published_network(name)
    lazy, whole = (count_operations(network, image_size, lazy) for lazy in (True, False))
    digits = 2 if image_size == 32 else 1
    assert [round(n / 1e6, digits) for n in lazy] == millions
    assert lazy[-1] == whole[-1]
    assert all(a <= b for a, b in zip(lazy, whole, strict=True))
