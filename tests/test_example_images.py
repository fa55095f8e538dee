"""Easy and hard images are what their names say, and the picture shows them."""

import pytest
import torch

from adaptive_inference.policies import Policy
from engine.example_images import TITLES, example_images, examples_figure

# (class, logit) at every exit, for every image.
PREDICTIONS = [
    [(0, 5.0), (0, 5.0), (0, 5.0)],  # easy
    [(0, 9.0), (0, 5.0), (0, 5.0)],  # easier
    [(1, 9.0), (0, 5.0), (0, 5.0)],  # left first, and wrong
    [(1, 1.0), (2, 1.0), (0, 1.0)],  # hard
    [(1, 1.5), (2, 1.0), (0, 1.0)],  # harder
    [(1, 1.0), (0, 1.0), (0, 1.0)],  # the second exit has it right too
    [(1, 1.0), (2, 9.0), (0, 5.0)],  # left at the second exit
]


@pytest.fixture
def easy_and_hard():
    logits = torch.zeros(3, len(PREDICTIONS), 3)
    for i, exits in enumerate(PREDICTIONS):
        for k, (label, size) in enumerate(exits):
            logits[k, i, label] = size
    return example_images(logits, torch.zeros(7, dtype=torch.int64), Policy((0.8, 0.8, -1e8)))


def test_example_images(easy_and_hard):
    assert [images.tolist() for images in easy_and_hard] == [[1, 0], [4, 3]]


@pytest.mark.parametrize("names", [["a", "b", "c"], ["cost in $ or " + 5 * "very long ", "b$", "c$"]])
def test_figure(easy_and_hard, names):
    images, targets = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8), torch.zeros(7, dtype=torch.int64)
    figure = examples_figure(lambda i: images[i], targets, easy_and_hard, names)
    figure.canvas.draw()
    (axes,) = figure.axes
    lefts = sorted(image.get_extent()[0] for image in axes.images)
    assert len(lefts) == 4
    assert lefts[1] + 1 < lefts[2]  # two of each kind, the hard ones on the right
    texts = [text.get_text().replace("\n", " ") for text in axes.texts]
    # Classes without any such image have no row, and a kind takes no more columns than it has images.
    assert texts == [names[0].strip(), *TITLES]
    assert lefts[-1] + 1 <= axes.get_xlim()[1] < lefts[-1] + 1.2
    name = axes.texts[0].get_window_extent()
    assert name.x0 >= 0
    assert name.height < 1.2 * 150  # of a row of pictures, about


def test_figure_of_one_kind_and_of_none(easy_and_hard):
    images, targets = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8), torch.zeros(7, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    for kinds, titles in (((none, easy_and_hard[1]), [TITLES[1]]), ((none, none), [])):
        figure = examples_figure(lambda i: images[i], targets, kinds, ["a", "b", "c"])
        figure.canvas.draw()
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert texts == (["a", *titles] if titles else ["no easy and no hard images"])
