"""Easy and hard images, as in the MSDNet paper's figure 5: those that left first and right, and those only the last exit got right.

figure = examples_figure(images, targets, logits, policy, class_names)
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from adaptive_inference.policies import Policy
from adaptive_inference.predictor import simulate


def easy_and_hard(logits: Tensor, targets: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Indices of the easy images, the most confident first, and of the hard ones, the least sure first exit first.

    Easy: left at the first exit at which any image of the set leaves, with the right class. Hard: reached the last exit, which is right,
    while every other exit is wrong.

    Args:
        logits: of every exit, (K, N, C).
        targets: (N,).
    """
    prediction = simulate(logits, policy)
    correct = logits.argmax(dim=2) == targets
    first = prediction.exits.min()
    easy = ((prediction.exits == first) & (prediction.classes == targets)).nonzero().flatten()
    last = len(logits) - 1
    only_last = correct[-1] & ~correct[:-1].any(dim=0) & (prediction.exits == last)
    hard = only_last.nonzero().flatten()
    target_prob = logits[0].softmax(dim=1).gather(1, targets[:, None])[:, 0]
    return easy[prediction.confidence[easy].argsort(descending=True, stable=True)], hard[target_prob[hard].argsort(stable=True)]


def examples_figure(
    images: Tensor,
    targets: Tensor,
    logits: Tensor,
    policy: Policy,
    class_names: list[str],
    classes: list[int] | None = None,
    columns: int = 5,
) -> Figure:
    """A row of images a class: left the easy ones, right the hard ones; a class without examples of a kind has gaps there.

    Args:
        images: bytes, (N, 3, H, W).
        targets, logits: (N,) and (K, N, C), of the same images.
        policy: decides which images leave first.
        classes: class indices of the rows; None: the four with the most pairs of easy and hard images.
        columns: images of each kind.
    """
    easy, hard = easy_and_hard(logits, targets, policy)
    if classes is None:
        counts = [torch.bincount(targets[kind], minlength=len(class_names)).clamp(max=columns) for kind in (easy, hard)]
        order = (torch.minimum(*counts) * (columns + 1) + torch.maximum(*counts)).argsort(descending=True, stable=True)
        classes = sorted(order[:4].tolist())
    figure = Figure(figsize=(1.1 * (2 * columns + 1.2), 1.1 * len(classes) + 0.5), dpi=150, layout="constrained")
    ratios = [1.0] * columns + [0.3] + [1.0] * columns
    grid = figure.subplots(len(classes), 2 * columns + 1, squeeze=False, gridspec_kw={"width_ratios": ratios})
    for axes in grid.flat:
        axes.set_axis_off()
    for row, label in enumerate(classes):
        grid[row, 0].text(-0.1, 0.5, class_names[label], transform=grid[row, 0].transAxes, ha="right", va="center", fontsize=8)
        for first_column, kind in ((0, easy), (columns + 1, hard)):
            for column, index in enumerate(kind[targets[kind] == label][:columns].tolist(), start=first_column):
                grid[row, column].imshow(images[index].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    grid[0, columns // 2].set_title("left at the first exit, right", fontsize=9)
    grid[0, columns + 1 + columns // 2].set_title("only the last exit is right", fontsize=9)
    return figure
