"""Temperatures mend confidences that are too high or too low."""

import pytest
import torch

from adaptive_inference.calibration import calibration_errors, fit_temperatures


def test_temperature_of_scaled_logits_is_found():
    """Targets drawn from the probabilities themselves; then the logits are made too large."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
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
