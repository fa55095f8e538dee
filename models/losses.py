"""Training losses, unreduced, so that gradient accumulation and several processes average exactly.

Stage 1 adds all exits' cross-entropies. Stage 2 is One-for-all distillation (OFA), Li et al., "Improved
Techniques for Training Adaptive Deep Networks", ICCV 2019 (arXiv 1908.06294), section 3.3.
docs/extending.md says how to add a loss.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def sum_of_cross_entropies(logits: list[Tensor], targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the stage-1 loss (N,): the sum of the cross-entropies of all exits.

    Args:
        logits: One tensor (N, C) per exit.
        targets: Class indices (N,).
        label_smoothing: Share of the targets that is spread over all classes.
    """
    return sum(F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing) for z in logits)


def one_for_all_loss(
    logits: list[Tensor],
    targets: Tensor,
    teacher_logits: Tensor | None,
    temperature: float = 1.0,
    gamma: float = 0.1,
    kl_mean_over_classes: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the stage-2 loss (N,): all exits learn from the labels, all but the last also from the teacher.

    Before the last exit, the loss is (1 - gamma) CE + gamma T^2 KL(softmax(teacher / T) || softmax(z_k / T)).
    The last exit has the depth of the teacher, so it is not distilled: its loss is the cross-entropy alone.

    Args:
        logits: One tensor (N, C) per exit.
        targets: Class indices (N,).
        teacher_logits: (N, C); no gradient flows into them. None where ``gamma`` is 0.
        temperature: T.
        gamma: Weight of the distillation term; 0 leaves it out.
        kl_mean_over_classes: Use the released code's KL, which is also averaged over classes and so weighs
            1 / C of the paper's.
        label_smoothing: Share of the targets that is spread over all classes.
    """
    loss = F.cross_entropy(logits[-1], targets, reduction="none", label_smoothing=label_smoothing)
    soft_targets = None
    if gamma > 0:
        soft_targets = F.softmax(_in_float32(teacher_logits.detach()) / temperature, dim=1)
    for z in logits[:-1]:
        cross_entropy = F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing)
        loss = loss + (1 - gamma) * cross_entropy
        if soft_targets is not None:  # 0 times an infinite divergence would be NaN
            log_probs = F.log_softmax(_in_float32(z) / temperature, dim=1)
            kl = F.kl_div(log_probs, soft_targets, reduction="none")
            kl = kl.mean(dim=1) if kl_mean_over_classes else kl.sum(dim=1)
            loss = loss + gamma * temperature**2 * kl
    return loss


def _in_float32(logits: Tensor) -> Tensor:
    """Return logits in float32, float64 as they are.

    Autocast computes softmax in float32 on GPUs, but in half precision on CPUs, where a divergence of two
    distributions would be off by a percent.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
