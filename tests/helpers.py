"""Networks, logits, predictions and policies that several test modules use."""

import torch

from adaptive_inference.budgeted import ExitPredictions
from adaptive_inference.confidence import confidence_by_exit
from adaptive_inference.policies import Policy
from models import IMTA, ExitNetwork, MSDNet
from tests.conftest import TINY_NETWORK
from tests.golden import FIXTURES

NONE, ALL = 1e8, -1e8  # thresholds at which no image leaves, and at which all do
OPERATIONS = [10, 20, 40]  # to the exits of ``make_predictions``


def images_for(network: ExitNetwork, count: int = 2) -> torch.Tensor:
    size = next(size for size in range(32, 300) if accepts(network, size))
    return torch.randn(count, 3, size, size)


def accepts(network: ExitNetwork, size: int) -> bool:
    try:
        network.check_image_size(size)
    except ValueError:
        return False
    return True


def make_network(stage, **options):
    """Make a network in float64: no confidence is near a threshold by rounding, and logits vary."""
    network = MSDNet(**{**TINY_NETWORK, **options})
    if stage == 2:
        network = IMTA(network)
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 1, 3)
    with torch.no_grad():
        network.double()(images_for(network, 64).double())
    return network.eval()


def logits_of(network, images):
    with torch.no_grad():
        return torch.stack(network(images))


def quantile_policy(logits, share, measure="softmax"):
    """Make thresholds between two neighbouring confidences: ``share`` of all images are above them."""
    confidence = confidence_by_exit(logits, measure)[0].sort(dim=1).values
    rank = round((1 - share) * confidence.shape[1])
    middle = (confidence[:, rank - 1] + confidence[:, rank]) / 2
    return Policy(tuple(middle.tolist()), measure)


def make_predictions(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, count, 5, generator=generator)
    targets = torch.randint(5, (count,), generator=generator)
    logits += torch.tensor([0.5, 1.0, 1.5])[:, None, None] * torch.nn.functional.one_hot(targets, 5)
    return logits, targets


def predictions_of(confidence, correct):
    """The right class is always 0, a wrong one 1."""
    return ExitPredictions(confidence, (~correct).long(), torch.zeros(confidence.shape[1], dtype=torch.int64))


def golden_predictions():
    """Predictions for held-out and test images, operations, and the released rows."""
    golden = torch.load(FIXTURES / "budgeted_prediction.pt", weights_only=True)
    val, test = (
        predictions_of(golden[f"{part}_confidence"], golden[f"{part}_correct"]) for part in ("val", "test")
    )
    return val, test, golden["flops"], golden["rows"]
