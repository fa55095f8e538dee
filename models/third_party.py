"""Networks of torchvision and timm by their names, with exits, pretrained weights and their preprocessing.

Example:
    network = construct("timm", "tf_efficientnet_lite0", {})
    image_spec_of_weights("mobilenet_v3_small", "DEFAULT")     # image size, crop share, mean, ...

Only the constructors that the two libraries register are called. timm is optional.
"""

import difflib
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from .description import ImageSpec
from .errors import first_line
from .files import expand_home, is_network_file
from .network import CannotBuildError
from .normalizer import IMAGENET_MEAN, IMAGENET_STD
from .pytorch_files import STATE_DICTS, WRAPPERS, read_checkpoint

TIMM_PREFIX = "timm/"


class Constructor(NamedTuple):
    """A constructor that a library registers, and its options, in plain types.

    Attributes:
        library: ``torchvision`` or ``timm``; None for a custom network, which has to be passed.
        name: Name of the network in the library.
        options: Keyword arguments of the constructor.
    """

    library: str | None
    name: str
    options: dict[str, Any]


def check_backbone(arch: str, pretrained: str | os.PathLike | None = None) -> None:
    """Check the arguments of ``build_backbone`` that need no network to be built.

    Raises:
        ValueError: An unknown name.
        OSError: There are no such weights.
    """
    library, name = split_name(arch)
    if pretrained is None or expand_home(pretrained).is_file():
        return
    if library == "timm":
        known = ("DEFAULT",)
    else:
        known = tuple(_torchvision().get_model_weights(name).__members__)
        known = tuple(dict.fromkeys((*known, "DEFAULT"))) if known else ()
    if str(pretrained) not in known:
        names = ", ".join(known) or "none"
        raise FileNotFoundError(
            f"there is no file {pretrained}, and {arch} has no weights of that name: {names}"
        )


def image_spec_of_weights(arch: str, pretrained: str | os.PathLike | None = None) -> ImageSpec:
    """Return the images that a network's weights expect; ImageNet's usual values where nothing is known.

    Args:
        arch: Name of the network, as for ``build_backbone``.
        pretrained: Name of torchvision's weights. For files and None, those of the default weights count.

    Raises:
        ValueError: An unknown name.
    """
    library, name = split_name(arch)
    if library == "timm":
        return _timm_image_spec(name)
    all_weights = _torchvision().get_model_weights(name)
    known = isinstance(pretrained, str) and pretrained in all_weights.__members__
    weights = all_weights[pretrained] if known else getattr(all_weights, "DEFAULT", None)
    if weights is None:
        return _usual_images("bilinear")
    transform = weights.transforms()
    size, resized = transform.crop_size[0], transform.resize_size[0]
    return ImageSpec(
        image_size=size,
        crop_share=size / resized,
        interpolation=transform.interpolation.value,
        mean=list(transform.mean),
        std=list(transform.std),
    )


def _usual_images(interpolation: str) -> ImageSpec:
    return ImageSpec(
        image_size=224,
        crop_share=224 / 256,
        interpolation=interpolation,
        mean=list(IMAGENET_MEAN),
        std=list(IMAGENET_STD),
    )


def options_of_weights(arch: str, pretrained: str | os.PathLike | None) -> dict[str, Any]:
    """Return the options of a constructor that torchvision's weights need.

    The image size of a ViT; and the other normalisation inside GoogLeNet and Inception, for which these were
    trained.
    """
    library, name = split_name(arch)
    if library == "torchvision" and name in ("googlenet", "inception_v3") and pretrained is not None:
        return {"transform_input": True}
    weights = None
    if library == "torchvision" and name.startswith("vit_"):
        weights = _torchvision().get_model_weights(name).__members__.get(str(pretrained))
    return {} if weights is None else {"image_size": weights.meta["min_size"][0]}


def _timm_image_spec(name: str) -> ImageSpec:
    defaults = _timm().get_pretrained_cfg(name)
    if defaults is None:
        return _usual_images("bicubic")
    return ImageSpec(
        image_size=defaults.input_size[-1],
        crop_share=defaults.crop_pct,
        interpolation=defaults.interpolation,
        mean=list(defaults.mean),
        std=list(defaults.std),
    )


def split_name(arch: str) -> tuple[str, str]:
    """Return library and name of a network.

    Raises:
        ValueError: There is none of that name; those with similar names are listed.
    """
    if arch.startswith(TIMM_PREFIX):
        library, name = "timm", arch.removeprefix(TIMM_PREFIX)
        known = [*_timm().list_models(), *_timm().list_models(pretrained=True)]  # the latter with tags
    else:
        library, name = "torchvision", arch
        known = _torchvision().list_models(module=_torchvision())
    if name not in known:
        prefix = TIMM_PREFIX if library == "timm" else ""
        near = [f"{prefix}{other}" for other in difflib.get_close_matches(name, known, 3)]
        if not near and library == "torchvision":
            near = [f"those of timm as {TIMM_PREFIX}NAME", "msdnet"]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{library} has no classification network {name!a:.60}{hint}")
    return library, name


def construct(library: str | None, name: str, options: dict[str, Any]) -> nn.Module:
    """Return a network from one of the constructors that a library registers, with random weights."""
    if library not in ("torchvision", "timm"):
        raise ValueError(f"the library is {library!a:.60}; allowed: torchvision, timm")
    split_name(f"{TIMM_PREFIX}{name}" if library == "timm" else name)
    # Options come from files too: none may name another file, as checkpoint_path of create_model does.
    create = _timm().create_model if library == "timm" else _torchvision().get_model
    refused = [option for option in options if option in inspect.signature(create).parameters]
    if refused:
        raise ValueError(f"{refused[0]!a:.60} is not an option of the network {name}")
    try:
        with torch.device("cpu"):
            if library == "timm":
                return _timm().create_model(name, pretrained=False, **options)
            return _torchvision().get_model(name, weights=None, **options)
    except Exception as error:  # what a constructor raises depends on the option
        raise ValueError(
            f"{library} cannot build {name} with the options {options}: {first_line(error):.150}"
        ) from None


def _torchvision() -> Any:
    from torchvision import models  # torch.hub loads this module where torchvision is missing

    return models


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise CannotBuildError("networks of timm need the package timm: pip install timm") from None
    return timm


_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # of GoogLeNet and Inception
_OF_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.")


def weights_of(constructor: Constructor, pretrained: str | os.PathLike) -> dict[str, Tensor]:
    """Return the state dict of pretrained weights: a file, or those of the library."""
    path = expand_home(pretrained)
    if path.is_file():
        weights = read_weights(path)
        if constructor.library == "torchvision" and constructor.name.startswith("densenet"):
            # torchvision's own files have older names.
            weights = {_OF_OLD_DENSENET.sub(r"\1\2.", name): x for name, x in weights.items()}
        return _for_options(weights, constructor)
    try:
        if constructor.library == "timm":
            # With its own number of classes: timm draws the last layer for another number, and so this would
            # count as pretrained.
            options = {name: x for name, x in constructor.options.items() if name != "num_classes"}
            return _timm().create_model(constructor.name, pretrained=True, **options).state_dict()
        # Not the weights alone: some constructors rename tensors that have the names of older networks.
        weights = _torchvision().get_model_weights(constructor.name)[str(pretrained)]
        network = _torchvision().get_model(constructor.name, weights=weights, progress=False)
        return _for_options(network.state_dict(), constructor)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the weights {pretrained} of {constructor.name} cannot be downloaded: "
            f"{first_line(getattr(error, 'reason', error)):.150}; --pretrained also takes a file of them"
        ) from None


def _for_options(weights: dict[str, Tensor], constructor: Constructor) -> dict[str, Tensor]:
    """Leave out the auxiliary classifiers of a network that was built without them."""
    if constructor.options.get("aux_logits") is not False:
        return weights
    return {name: x for name, x in weights.items() if not name.startswith(_AUXILIARY)}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or a PyTorch checkpoint (``weights_only=True``).

    Raises:
        ValueError: It holds no state dict, or cannot be read.
    """
    content: Any
    if is_network_file(path):
        try:
            content = safetensors.torch.load_file(path)
        except OSError:
            raise
        except Exception as error:  # a damaged file can make any part of the reader fail
            raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    else:
        content = read_checkpoint(path)
    # Programs nest them: a checkpoint may hold a model that holds a state dict.
    while isinstance(content, Mapping) and (
        inner := [content[name] for name in STATE_DICTS if isinstance(content.get(name), Mapping)]
    ):
        content = inner[0]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        raise ValueError(f"{path} holds no state dict of a network")
    wrapper = re.compile(f"^(({'|'.join(WRAPPERS)})[.])+")
    return {wrapper.sub("", name): x for name, x in content.items()}
