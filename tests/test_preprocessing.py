"""From photographs to predictions in Python."""

import pytest
import torch
from PIL import Image

from adaptive_inference import AdaptivePredictor, load_predictor
from adaptive_inference.policies import Policy
from image_data.preprocessing import preprocess
from models import MSDNet
from tests.conftest import TINY_NETWORK, describe


def test_paths_and_pil_images_are_predicted_alike(tmp_path):
    network = MSDNet(**TINY_NETWORK).eval()
    network.description = describe(network)
    predictor = AdaptivePredictor(network, Policy((1e8, 1e8, -1e8)))
    pixels = torch.randint(256, (60, 90, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(pixels)
    image.save(tmp_path / "photo.png")
    images = [tmp_path / "photo.png", str(tmp_path / "photo.png"), image]
    prediction = predictor.predict_images(images, preprocess, batch_size=2)
    assert prediction.probs.shape == (3, 10)
    assert prediction.classes.unique().numel() == 1
    expected = predictor(preprocess(image, network.description.data)[None])
    torch.testing.assert_close(prediction.probs[2:], expected.probs)
    none = predictor.predict_images([], preprocess)
    assert [tuple(values.shape) for values in none] == [(0,), (0,), (0,), (0, 10), (0,)]
    assert [values.dtype for values in none] == [values.dtype for values in prediction]


def test_images_of_16_bits_are_predicted_alike(tmp_path):
    network = MSDNet(**TINY_NETWORK).eval()
    data = describe(network).data
    values = torch.arange(60 * 90).reshape(60, 90).numpy().astype("uint16")
    image = Image.fromarray(values)
    image.save(tmp_path / "deep.png")
    assert image.mode == "I;16"
    pixels = preprocess(image, data)
    assert torch.equal(pixels, preprocess(tmp_path / "deep.png", data))
    assert len(pixels.unique()) > 100


def test_a_loaded_predictor_knows_its_preprocessing():
    image = Image.new("RGB", (60, 40), "navy")
    predictor = load_predictor("imta_cifar100")
    expected = predictor.predict_images([image], preprocess)
    assert torch.equal(predictor.predict_images([image]).probs, expected.probs)
    alone = AdaptivePredictor(predictor.network, predictor.policy)
    with pytest.raises(ValueError, match="preprocess is missing"):
        alone.predict_images([image])
