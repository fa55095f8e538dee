"""Stopping early predicts what the simulation does, at the same exits, and runs nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from adaptive_inference.confidence import MEASURES, confidence_by_exit
from adaptive_inference.policies import Policy
from adaptive_inference.predictor import AdaptivePredictor, NotFiniteError, simulate
from tests.helpers import ALL, NONE, logits_of, make_network, quantile_policy
from utils import UserError


def assert_same(prediction, expected):
    assert torch.equal(prediction.exits, expected.exits)
    assert torch.equal(prediction.classes, expected.classes)
    torch.testing.assert_close(prediction.confidence, expected.confidence)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("measure", ["softmax", "entropy", "margin"])
def test_same_as_simulation(stage, measure):
    """Later exits see only the images that stayed."""
    network = make_network(stage)
    images = torch.randn(97, 3, 32, 32, dtype=torch.float64)
    logits = logits_of(network, images)
    for share in (0.1, 0.5, 0.9):
        policy = quantile_policy(logits, share, measure)
        expected, counting = simulate(logits, policy), Counting(network)
        assert len(expected.exits.unique()) > 1
        assert_same(AdaptivePredictor(counting, policy)(images), expected)
        assert counting.seen == [count for k in range(3) if (count := int((expected.exits >= k).sum()))]


@pytest.mark.parametrize("batch_size", [1, 2, 33])
def test_any_batches(batch_size):
    network, images = make_network(2), torch.randn(66, 3, 32, 32, dtype=torch.float64)
    logits = logits_of(network, images)
    policy = quantile_policy(logits, 0.4)
    predictor = AdaptivePredictor(network, policy)
    parts = [predictor(batch) for batch in images.split(batch_size)]
    assert_same(
        type(parts[0])(*(torch.cat(values) for values in zip(*parts, strict=True))), simulate(logits, policy)
    )


@pytest.mark.parametrize("threshold", [1.0, 2.0, 3.0])
def test_patience(threshold):
    network = make_network(2, num_blocks=5)
    images = torch.randn(40, 3, 32, 32, dtype=torch.float64)
    logits = logits_of(network, images)
    policy = Policy((threshold,) * 5, "patience")
    prediction = AdaptivePredictor(network, policy)(images)
    assert_same(prediction, simulate(logits, policy))
    classes = logits.argmax(dim=2)
    for i in range(40):
        agreeing, k = 1, 0
        while agreeing < threshold and k < 4:
            k += 1
            agreeing = agreeing + 1 if classes[k, i] == classes[k - 1, i] else 1
        assert prediction.exits[i] == k


class Counting:
    """A network that counts how many images every exit sees."""

    def __init__(self, network):
        self.num_exits, self.num_classes = network.num_exits, network.num_classes
        self.training, self.description = False, None
        self.network, self.seen = network, []
        self.start, self.classify_next = network.start, network.classify_next

    def advance(self, k, state):
        features, state = self.network.advance(k, state)
        self.seen.append(len(features))
        return features, state


@pytest.mark.parametrize("num_images", [1, 20])
@pytest.mark.parametrize(
    ("thresholds", "exit_number", "exits_run"),
    [((ALL, ALL, ALL), 0, 1), ((NONE, ALL, ALL), 1, 2), ((NONE, NONE, ALL), 2, 3), ((NONE,) * 3, 2, 3)],
)
def test_extreme_thresholds(num_images, thresholds, exit_number, exits_run):
    network = make_network(1)
    images = torch.randn(num_images, 3, 32, 32, dtype=torch.float64)
    counting = Counting(network)
    policy = Policy(thresholds)
    prediction = AdaptivePredictor(counting, policy)(images)
    assert prediction.exits.tolist() == [exit_number] * num_images
    assert counting.seen == [num_images] * exits_run
    assert_same(prediction, simulate(logits_of(network, images), policy))


def test_ties_leave_together():
    """Equal images have equal confidence, and a threshold of just that confidence lets all of them go."""
    network = make_network(1)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64).expand(6, -1, -1, -1).contiguous()
    threshold = simulate(logits_of(network, images), Policy((ALL,) * 3)).confidence.min().item()
    prediction = AdaptivePredictor(network, Policy((threshold, NONE, ALL)))(images)
    assert prediction.exits.tolist() == [0] * 6


def test_no_image():
    prediction = AdaptivePredictor(make_network(1), Policy((ALL,) * 3))(
        torch.empty(0, 3, 32, 32, dtype=torch.float64)
    )
    assert [len(values) for values in prediction] == [0] * 5


def test_policy_of_other_length_is_refused():
    with pytest.raises(ValueError, match="4 thresholds"):
        AdaptivePredictor(make_network(1), Policy((ALL,) * 4))


@pytest.mark.parametrize("ensemble", [None, ((1.0, 0.0, 0.0), (0.5, 0.6, 0.0), (0.2, 0.3, 0.7))])
def test_output_that_is_not_finite_is_an_error_that_names_the_images(ensemble):
    predictor = AdaptivePredictor(make_network(2), Policy((0.5,) * 3, ensemble=ensemble))
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    predictor(images)
    images[1, 0, 0, 0], images[4] = float("nan"), float("inf")
    with pytest.raises(UserError, match=r"not finite for 2 of 5 images; .* from 0: 1, 4$"):
        predictor(images)


@pytest.mark.parametrize("measure", ["softmax", "entropy", "margin"])
def test_a_single_class_is_certain(measure):
    confidence, classes = confidence_by_exit(torch.randn(3, 4, 1), measure)
    assert classes.eq(0).all()
    assert confidence.eq(1).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_confidence_orders_sure_before_unsure(measure):
    sure, unsure = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0.2, 0.1, 0]])
    logits = torch.stack([torch.cat([sure, unsure]), torch.cat([sure, unsure.flip(1)])])
    confidence, classes = confidence_by_exit(logits, measure)
    assert confidence[-1, 0] > confidence[-1, 1]
    assert classes.tolist() == [[0, 0], [0, 2]]


@pytest.mark.parametrize("temperatures", [None, (2.0, 3.0, 4.0)])
@pytest.mark.parametrize("ensemble", [None, ((1.0, 0.0, 0.0), (0.5, 0.6, 0.0), (0.2, 0.3, 0.7))])
def test_temperatures_and_ensembles_change_answers_and_not_who_leaves(temperatures, ensemble):
    network, images = make_network(1), torch.randn(40, 3, 32, 32, dtype=torch.float64)
    logits = logits_of(network, images)
    alone = quantile_policy(logits, 0.4)
    policy = Policy(alone.thresholds, alone.measure, temperatures, ensemble)
    prediction = AdaptivePredictor(network, policy)(images)
    assert_same(prediction, simulate(logits, policy))
    assert torch.equal(prediction.exits, simulate(logits, alone).exits)
    for i, k in enumerate(prediction.exits.tolist()):
        expected = logits[k, i] / (temperatures[k] if temperatures else 1)
        if ensemble:
            expected = sum(weight * logits[j, i] for j, weight in enumerate(ensemble[k]))
        torch.testing.assert_close(prediction.probs[i], expected.softmax(0))


def test_outputs_after_an_image_left_change_nothing():
    logits = torch.randn(3, 20, 5)
    policy = Policy((ALL, NONE, NONE), temperatures=(1.5, 2.0, 2.5))
    expected = simulate(logits, policy)
    logits[1:] = torch.inf
    assert torch.equal(simulate(logits, policy).probs, expected.probs)


def test_exits_without_weight_may_be_infinite():
    """0 times infinity is not a number."""
    logits = torch.randn(3, 20, 5)
    policy = Policy((NONE, ALL, NONE), temperatures=(1.5, 2.0, 2.5))
    expected = simulate(logits, policy)
    logits[0, 3, 1] = torch.inf
    assert torch.equal(simulate(logits, policy).probs, expected.probs)


def described_network():
    network = make_network(1).float()
    data = SimpleNamespace(image_size=32, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    network.description = SimpleNamespace(data=data)
    return network


def test_images_without_finite_output_are_named_by_their_places_in_the_list():
    predictor = AdaptivePredictor(described_network(), Policy((NONE,) * 3))
    images = [torch.full((3, 32, 32), torch.nan if i == 3 else 0.0) for i in range(7)]
    with pytest.raises(NotFiniteError, match="for 1 of 7 images") as caught:
        predictor.predict_images(images, lambda image, data: image, batch_size=2)
    assert caught.value.positions == [3]


def test_a_single_path_is_no_list_of_images():
    predictor = AdaptivePredictor(make_network(1), Policy((ALL,) * 3))
    for images in ("photo.jpg", Path("photo.jpg"), Image.new("RGB", (4, 4)), {"photo.jpg"}, iter([])):
        with pytest.raises(TypeError, match="pass a list of paths"):
            predictor.predict_images(images)


def test_bytes_are_normalised():
    predictor = AdaptivePredictor(described_network(), Policy((NONE,) * 3))
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    torch.testing.assert_close(predictor(images).probs, predictor((images.float() / 255 - mean) / std).probs)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), "images are 3 x 32 x 32; this network wants N x 3 x 32 x 32"),
        (torch.zeros(2, 3, 32, 40), "2 x 3 x 32 x 40"),
        (torch.zeros(2, 1, 32, 32), "2 x 1 x 32 x 32"),
        (torch.zeros(2, 3, 32, 32).numpy(), "images are a ndarray; this network wants a tensor"),
        (
            torch.zeros(2, 3, 32, 32, dtype=torch.int64),
            "images are int64; this network wants uint8, or normalised floats",
        ),
    ],
)
def test_images_of_another_kind(images, message):
    with pytest.raises(UserError, match=message):
        AdaptivePredictor(described_network(), Policy((NONE,) * 3))(images)


@pytest.mark.parametrize("images", [[], ["photo.jpg"]])
def test_image_files_need_a_description(images):
    predictor = AdaptivePredictor(make_network(1), Policy((NONE,) * 3), lambda image, data: image)
    with pytest.raises(ValueError, match=r"no description, .* models\.load"):
        predictor.predict_images(images)
