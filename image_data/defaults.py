"""Defaults that depend on the data set's name, its image size or the machine.

Images of at most ``SMALL_IMAGE_SIZE`` pixels a side are treated as CIFAR's: they stay in memory, training
shifts them within a black border, evaluation sees them whole, and the network gets the stem and exits for
small inputs. Where no values are published, small images are normalised by the training images, others as
ImageNet's.
"""

from models.normalizer import IMAGENET_MEAN, IMAGENET_STD
from utils import available_cores

NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
}
# Height and width of the images of each --data.
IMAGE_SIZES = {"demo": 32, "cifar10": 32, "cifar100": 32, "imagenet": 224, "folder": 224}
SMALL_IMAGE_SIZE = 64
MAX_DEFAULT_WORKERS = 4
LARGE_CROP_SHARE = 0.875  # of the shorter side, that evaluation sees of images that are not small


def num_workers(workers: int | None) -> int:
    """Return the number of threads for --workers: by default all cores, at most ``MAX_DEFAULT_WORKERS``."""
    return min(available_cores(), MAX_DEFAULT_WORKERS) if workers is None else workers


def default_crop_share(image_size: int) -> float:
    """Return the share of the shorter side that evaluation sees, if no pretrained network says otherwise."""
    return 1.0 if image_size <= SMALL_IMAGE_SIZE else LARGE_CROP_SHARE
