"""Temperatures correct confidences; ensembles of exits predict where they are right more often."""

import math

import pytest
import torch

from adaptive_inference.calibration import (
    calibration_errors,
    ensemble_classes,
    ensemble_operations,
    fit_ensemble,
    fit_temperatures,
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


def test_a_temperature_below_1_needs_many_images():
    """On images that an exit never gets wrong, the best temperature would be 0."""
    for count, expected in ((12, [1.0]), (999, [1.0]), (5000, None)):
        targets = torch.arange(count) % 4
        logits = 2 * torch.nn.functional.one_hot(targets, 4).float()[None]
        temperatures = fit_temperatures(logits, targets)
        assert 0.1 <= temperatures[0] <= 1
        assert expected in (None, temperatures)


@pytest.mark.parametrize("seed", range(5))
def test_a_dozen_images_do_not_make_confidences_worse(seed):
    """Confidences that are right: the temperatures stay near 1, however the twelve images fall."""
    logits, targets = drawn()
    chosen = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))[:12]
    (temperature,) = fit_temperatures(logits[None, chosen], targets[chosen])
    assert 1.0 <= temperature < 1.5
    assert calibration_errors(logits[None], targets, [temperature])[0] < 12


def easy_logits(seed, scale):
    """Return logits of three exits for 20 to 60 images of easy classes, as after one epoch."""
    generator = torch.Generator().manual_seed(seed)
    count = 20 + seed % 41
    targets = torch.randint(3, (count,), generator=generator)
    logits = torch.randn(3, count, 3, generator=generator)
    return logits + scale * torch.nn.functional.one_hot(targets, 3), targets


def test_small_fits_are_finite():
    for seed in range(40):
        logits, targets = easy_logits(seed, scale=(1.0, 5.0, 50.0, 1e4)[seed % 4])
        temperatures = fit_temperatures(logits, targets)
        ensemble = fit_ensemble(logits, targets, temperatures) or ((0.0,),)
        assert all(0.1 <= temperature <= 10 for temperature in temperatures)
        assert all(0 <= weight <= 10 and math.isfinite(weight) for row in ensemble for weight in row)


def test_rounding_does_not_change_the_choice():
    """Logits with and without a gain by an ensemble, each with the rounding of other kernels."""
    logits, targets = drawn(2000)
    for size in (0.05, 2.0):
        noise = size * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        exits = torch.stack([logits + noise, logits - noise])
        fits = [fit_ensemble(exits * (1 + i * 1e-6), targets, [1.0, 1.0]) for i in range(3)]
        assert len(set(fits)) == 1
        assert (fits[0] is not None) == (size == 2.0)


def test_parts_of_the_truth_are_added():
    """Targets drawn from the third exit's logits; the exits before add noise of opposite signs to them."""
    logits, targets = drawn(4000)
    noise = 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    exits = torch.stack([logits + noise, logits - noise, logits])
    temperatures = fit_temperatures(exits, targets)
    ensemble = fit_ensemble(exits, targets, temperatures)
    assert ensemble[0] == pytest.approx((1 / temperatures[0], 0.0, 0.0), abs=1e-3)
    assert ensemble[1] == pytest.approx((0.5, 0.5, 0.0), abs=0.05)
    assert ensemble[2] == pytest.approx((0.0, 0.0, 1 / temperatures[2]), abs=1e-3)
    right = (ensemble_classes(exits, ensemble) == targets).double().mean(dim=1)
    alone = (ensemble_classes(exits, None) == targets).double().mean(dim=1)
    assert right[1] > alone[1] + 0.05
    assert right[[0, 2]].tolist() == alone[[0, 2]].tolist()


def test_operations_are_counted():
    assert ensemble_operations([10, 20, 40], 5) == [15, 30, 55]


def test_three_gains_are_too_few():
    """Of six images, an ensemble is right on three that the second exit alone gets wrong; then of twelve."""
    targets = torch.arange(6) % 2
    wrong = torch.arange(6) < 3
    sure = 6 * torch.nn.functional.one_hot(targets, 2).float()
    unsure = torch.where(wrong[:, None], 0.5 * (1 - sure / 6), sure)
    together = sure + unsure
    assert (together.argmax(dim=1) == targets).all()
    assert fit_ensemble(torch.stack([sure, unsure]), targets, [1.0, 1.0]) is None
    more = torch.stack([sure, unsure]).repeat(1, 2, 1)
    assert fit_ensemble(more, targets.repeat(2), [1.0, 1.0]) is not None


def test_exits_that_predict_the_same_stay_alone():
    logits, targets = drawn(1000)
    assert fit_ensemble(torch.stack([logits, 2 * logits]), targets, [1.0, 0.5]) is None
    assert fit_ensemble(torch.stack([logits, logits])[:, :3], targets[:3], [1.0, 1.0]) is None
