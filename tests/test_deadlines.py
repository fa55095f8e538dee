"""Deadlines and budgets of time are kept on machines that become slower and fast again."""

from types import SimpleNamespace

import pytest
import torch

from adaptive_inference.policies import Point, Policy
from adaptive_inference.promises.deadlines import (
    ALLOWED_LATE,
    HORIZON_CALLS,
    HORIZON_IMAGES,
    RECENT_CALLS,
    AnytimePredictor,
    BudgetPredictor,
)
from tests.helpers import logits_of, make_network
from utils import UserError


class Timing:
    """Reserves 10 milliseconds for each of the first ``exits`` blocks, an impossible time for the others."""

    batch_size = 1

    def __init__(self, exits=3):
        self.exits = exits

    def reserve(self, k, num_images):
        return 10.0 if k < self.exits else 1e6


class BlockClock:
    """A clock on which ``milliseconds`` pass whenever a classifier of ``network`` runs."""

    def __init__(self, network, milliseconds):
        self.milliseconds, self.now = milliseconds, 0.0
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(self.advance)

    def advance(self, *_):
        self.now += self.milliseconds

    def __call__(self):
        return self.now / 1e3


@pytest.fixture
def network():
    return make_network(1)


@pytest.fixture
def image():
    return torch.randn(1, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("exits", [1, 2, 3])
def test_no_block_starts_that_would_end_late(network, image, exits):
    prediction = AnytimePredictor(network, 1e5, Timing(exits))(image)
    assert prediction.exits.tolist() == [exits - 1]
    assert prediction.classes == logits_of(network, image)[exits - 1].argmax()
    with pytest.raises(
        UserError, match="deadline of 5 ms is too short here: the first exit takes up to 10 ms"
    ):
        AnytimePredictor(network, 5.0, Timing())


@pytest.mark.parametrize("slow", [13.0, 30.0, 1000.0])
def test_deadline_follows_a_slower_machine_and_recovers(network, image, slow):
    clock = BlockClock(network, 9.0)
    predictor = AnytimePredictor(network, 29.0, Timing(), clock=clock)

    def call():
        before = clock.now
        exit_number = predictor(image).exits.item()
        return exit_number, clock.now - before > 29.0

    assert [call() for _ in range(10)] == [(2, False)] * 10
    clock.milliseconds = slow
    slow_calls = [call() for _ in range(50)]
    late_with_later_blocks = sum(late for exit_number, late in slow_calls if exit_number > 0)
    assert late_with_later_blocks <= ALLOWED_LATE + 1
    assert slow_calls[-1][0] == (1 if slow == 13 else 0)
    clock.milliseconds = 9.0
    exits = [call()[0] for _ in range(RECENT_CALLS)]
    assert exits[0] < 2
    assert exits[-1] == 2
    assert predictor.margin == 1


def test_single_late_calls_change_nothing(network, image):
    clock = BlockClock(network, 9.0)
    predictor = AnytimePredictor(network, 29.0, Timing(), clock=clock)
    for _ in range(ALLOWED_LATE):
        clock.milliseconds = 100.0
        predictor(image)
        clock.milliseconds = 9.0
        assert predictor(image).exits.item() == 2


def test_empty_batch_by_a_deadline(network):
    prediction = AnytimePredictor(network, 29.0, Timing())(torch.empty(0, 3, 32, 32, dtype=torch.float64))
    assert len(prediction.classes) == 0


@pytest.mark.parametrize(
    "slowness", [pytest.param(0.7, marks=pytest.mark.slow), 1.0, pytest.param(1.5, marks=pytest.mark.slow)]
)
def test_a_budget_is_kept_on_a_machine_that_got_slower(network, slowness):
    policy = Policy((-1e8,) * 3)
    points = [
        Point(policy, 50.0 + cost, float(cost), (1 - cost / 10, 0.0, cost / 10)) for cost in range(1, 11)
    ]
    timing = SimpleNamespace(milliseconds=lambda shares: 10 * shares[2])
    looks, now = [0], [0.0]

    def clock():
        """Every second look is at the end of a call with two images."""
        looks[0] += 1
        if looks[0] % 2 == 0:
            now[0] += 1e-3 * slowness * 2 * predictor.point.operations
        return now[0]

    predictor = BudgetPredictor(network, points, 4.5, timing, clock)
    assert predictor.point.operations == 4
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    horizon = HORIZON_IMAGES + 2 * HORIZON_CALLS
    for _ in range(horizon // 2):
        predictor(images)
    assert 1e3 * now[0] / horizon == pytest.approx(4.5, rel=0.05)
    for _ in range(500 - horizon // 2):
        predictor(images)
    assert 1e3 * now[0] / 1000 == pytest.approx(4.5, rel=0.02)
    with pytest.raises(UserError, match=r"0\.5ms is too small here: the cheapest policy allowed needs 1ms"):
        BudgetPredictor(network, points, 0.5, timing)
