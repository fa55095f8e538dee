"""Learning rate as a function of the step alone, so that a resumed run needs no state for it."""

import math

from settings import Settings


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """Rate at ``step`` (over all epochs): linear warm-up, then cosine to 0, or a drop at each milestone.

    ``settings`` gives lr, lr_type, lr_milestones (epochs; None: half and three quarters of the epochs), decay_rate, warmup_epochs, epochs.
    """
    epoch = step / steps_per_epoch
    if epoch < settings.warmup_epochs:
        return settings.lr * (step + 1) / math.ceil(settings.warmup_epochs * steps_per_epoch)
    if settings.lr_type == "cosine":
        progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1e-9)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    milestones = settings.lr_milestones or (settings.epochs * 0.5, settings.epochs * 0.75)
    return settings.lr * settings.decay_rate ** sum(epoch >= milestone for milestone in milestones)
