"""Temperatures mend confidences that are too high or too low; ensembles of exits answer where they are right more often."""

import pytest
import torch

from adaptive_inference.promises.ensemble import (
    calibration_errors,
    classes_together,
    fit_ensemble,
    fit_temperatures,
    operations_together,
)


def drawn(count=20_000, classes=5):
    """Logits (count, classes), and targets drawn from their probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_temperature_of_scaled_logits_is_found():
    logits, targets = drawn()
    scaled = torch.stack([3 * logits, logits, logits / 2])
    temperatures = fit_temperatures(scaled, targets)
    assert temperatures == pytest.approx([3, 1, 0.5], rel=0.05)
    before, after = calibration_errors(scaled, targets), calibration_errors(scaled, targets, temperatures)
    assert before[0] > 10
    assert before[2] > 5
    assert max(after) < 1.5


def test_error_by_hand():
    """Two images sure to 0.75, one of them right: 25 % apart."""
    logits = torch.tensor([[[3.0, 1.0], [3.0, 1.0]]]).log()
    assert calibration_errors(logits, torch.tensor([0, 1])) == pytest.approx([25.0])


def test_separable_answers_have_a_limit():
    logits = torch.tensor([[[5.0, 0.0], [0.0, 5.0]]])
    assert 0 < fit_temperatures(logits, torch.tensor([0, 1]))[0] < 1


def test_parts_of_the_truth_are_added():
    """The logits of which targets were drawn, in two noisy halves: the second exit does best with the first's help, the third alone."""
    logits, targets = drawn(4000)
    noise = 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    exits = torch.stack([logits + noise, logits - noise, logits])
    temperatures = fit_temperatures(exits, targets)
    ensemble = fit_ensemble(exits, targets, temperatures)
    assert ensemble[0] == (round(1 / temperatures[0], 4), 0.0, 0.0)
    assert ensemble[1] == pytest.approx((0.5, 0.5, 0.0), abs=0.05)
    assert ensemble[2] == (0.0, 0.0, round(1 / temperatures[2], 4))
    right = (classes_together(exits, ensemble) == targets).double().mean(dim=1)
    alone = (classes_together(exits, None) == targets).double().mean(dim=1)
    assert right[1] > alone[1] + 0.05
    assert right[[0, 2]].tolist() == alone[[0, 2]].tolist()


def test_operations_are_counted():
    assert operations_together([10, 20, 40], 5) == [15, 30, 55]


def test_exits_that_say_the_same_stay_alone():
    logits, targets = drawn(1000)
    assert fit_ensemble(torch.stack([logits, 2 * logits]), targets, [1.0, 0.5]) is None
    assert fit_ensemble(torch.stack([logits, logits])[:, :3], targets[:3], [1.0, 1.0]) is None
