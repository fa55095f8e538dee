"""Exit-by-exit evaluation: what is refused, and NaN. ``tests.contract`` holds it to the full pass."""

import math

import pytest
import torch

from models import MSDNet, Stepwise
from tests.conftest import TINY_NETWORK


def test_no_exit_after_the_last():
    steps = Stepwise(MSDNet(**TINY_NETWORK).eval(), torch.randn(1, 3, 32, 32))
    for _ in range(3):
        steps.next_logits()
    assert steps.exits_done == 3
    with pytest.raises(IndexError, match="all 3 exits are done"):
        steps.next_logits()


def test_training_mode_is_refused():
    network = MSDNet(**TINY_NETWORK).train()
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="evaluation mode"):
        Stepwise(network, images)
    with pytest.raises(ValueError, match="evaluation mode"):
        network.early_exit(images, [0.5] * 3)


def test_one_threshold_per_exit():
    with pytest.raises(ValueError, match="2 thresholds for 3 exits"):
        MSDNet(**TINY_NETWORK).eval().early_exit(torch.randn(1, 3, 32, 32), [0.5] * 2)


def test_nan_reaches_no_threshold():
    network = MSDNet(**TINY_NETWORK).eval()
    images = torch.randn(3, 3, 32, 32)
    assert network.early_exit(images, [math.nan] * 3)[1].tolist() == [2, 2, 2]
    images[1] = math.nan
    assert network.early_exit(images, [0.0] * 3)[1].tolist() == [0, 2, 0]
