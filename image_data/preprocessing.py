"""A photograph as a network expects it, for ``AdaptivePredictor.predict_images``.

Example:
    prediction = AdaptivePredictor(network, policy, preprocess).predict_images(["photo.jpg", pil_image])
"""

from pathlib import Path

from PIL import Image
from torch import Tensor

from image_data.reading import in_bytes, read_image
from image_data.transforms import evaluation_transform
from models.description import DataInfo


def preprocess(image: str | Path | Image.Image, data: DataInfo) -> Tensor:
    """Return bytes (3, S, S) of an image file or a PIL image, resized and cropped as in evaluation.

    Args:
        image: A path, or a PIL image.
        data: ``network.description.data``.

    Raises:
        UserError: The file cannot be read.
    """
    transform = evaluation_transform(data.image_size, data.crop_share, data.interpolation)
    return transform(in_bytes(image)) if isinstance(image, Image.Image) else read_image(image, transform)
