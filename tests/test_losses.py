"""Losses against three-line references."""

import pytest
import torch
from torch.nn import functional as F

from models import one_for_all_loss, sum_of_cross_entropies

N, C, K = 6, 5, 3


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(N, C, generator=generator, dtype=torch.float64) for _ in range(K)]
    return (
        logits,
        torch.randint(C, (N,), generator=generator),
        torch.randn(N, C, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize(("temperature", "gamma"), [(1.0, 0.1), (3.0, 0.9), (2.0, 0.0), (1.0, 1.0)])
def test_one_for_all_loss(case, temperature, gamma):
    logits, targets, teacher = case
    p = (teacher / temperature).softmax(1)
    expected = F.cross_entropy(logits[-1], targets)
    for z in logits[:-1]:
        kl = (p * (p / (z / temperature).softmax(1)).log()).sum(1).mean()
        expected = expected + (1 - gamma) * F.cross_entropy(z, targets) + gamma * temperature**2 * kl
    loss = one_for_all_loss(logits, targets, teacher, temperature, gamma)
    torch.testing.assert_close(loss.mean(), expected)


def test_released_kl_weighs_one_over_the_classes(case):
    logits, targets, teacher = case
    loss = {
        mean: one_for_all_loss(logits, targets, teacher, 2.0, 1.0, kl_mean_over_classes=mean)
        for mean in (True, False)
    }
    last = F.cross_entropy(logits[-1], targets, reduction="none")
    torch.testing.assert_close((loss[True] - last) * C, loss[False] - last)


def test_no_gradient_into_the_teacher(case):
    logits, targets, teacher = case
    teacher.requires_grad_()
    logits[0].requires_grad_()
    one_for_all_loss(logits, targets, teacher).sum().backward()
    assert teacher.grad is None
    assert logits[0].grad.any()


def test_without_distillation_no_teacher_counts(case):
    """Not even one whose divergence is infinite, as 0 times infinity is not a number."""
    logits, targets, teacher = case
    targets = targets.clamp(min=1)
    for z in logits:
        z[:, 0] = -torch.inf
    loss = one_for_all_loss(logits, targets, None, gamma=0.0)
    assert torch.equal(one_for_all_loss(logits, targets, teacher, gamma=0.0), loss)
    torch.testing.assert_close(loss, sum_of_cross_entropies(logits, targets))


def test_label_smoothing_reaches_every_cross_entropy(case):
    logits, targets, teacher = case
    for smoothing in (0.0, 0.1):
        expected = sum(
            F.cross_entropy(z, targets, reduction="none", label_smoothing=smoothing) for z in logits
        )
        torch.testing.assert_close(sum_of_cross_entropies(logits, targets, smoothing), expected)
        torch.testing.assert_close(
            one_for_all_loss(logits, targets, teacher, gamma=0.0, label_smoothing=smoothing), expected
        )


def test_distillation_is_in_float32_under_autocast(case):
    """On CPUs autocast would compute softmax in half precision."""
    logits, targets, teacher = case
    logits, teacher = [z.bfloat16() for z in logits], teacher.bfloat16()
    expected = one_for_all_loss([z.float() for z in logits], targets, teacher.float(), 2.0, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = one_for_all_loss(logits, targets, teacher, 2.0, 0.5)
    assert torch.equal(loss, expected)
