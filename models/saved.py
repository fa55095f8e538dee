"""Networks as files: weights in a safetensors file, whose header describes network, data and training.

Example:
    network = load("imta_cifar100")    # of the folder weights/; or any such file, or the directory of a run
    network.description.data.class_names, network.description.data.mean
    content = network_bytes(network, description, split)

The ``safetensors`` library checks sizes and runs no code, and a checksum finds damage.

Which function loads what:

==========================================  ===============================================================
``models.load``                             the network of a file, a run or a name: what most programs need
``adaptive_inference.load_predictor``       the same, folded, with a policy: to predict
``engine.checkpoint.load_saved``            the same for a command line, with description and split
``engine.checkpoint.load_checkpoint``       the state of a run that is resumed, ``last.pt``
``models.load_released``                    a checkpoint of the released code
``read_network``                            network, description and split of one file
``network_from_tensors``                    the same from the tensors of a file that was read already
``build_with_weights``                      a network from its options and its state dict
==========================================  ===============================================================
"""

import dataclasses
import hashlib
import json
import math
import operator
import os
import shlex
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .description import SPLIT_TENSORS, DataInfo, Description, Split
from .errors import first_line
from .files import expand_home, find
from .module_state import has_finite_weights, load_tensors, tie_parameters, tied_parameters
from .network import CannotBuildError, ExitNetwork, build_network, to_config
from .operations import count_operations

FORMAT = "imta-msdnet network 3"
# A file of others may ask for images that take all memory, or that nothing can make.
MAX_IMAGE_SIZE, SMALLEST_CROP_SHARE = 10_000, 0.1
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


def load(path_or_name: str | os.PathLike, network: nn.Module | None = None) -> ExitNetwork:
    """Load the network of a file, of a run's directory or of a name in ``weights/``.

    Args:
        path_or_name: The file, directory or name.
        network: The network without exits, for the file of a ``Backbone`` on a custom network; it
            becomes part of the result.

    Returns:
        The network in float32, on the CPU, in evaluation mode, with its ``description``. A network that is
        passed keeps its device and dtype.

    Raises:
        OSError: There is no such file, or no such name.
        ValueError: ``read_network`` refuses the file; one line that names it.
    """
    return read_network(find(path_or_name), network)[0]


def save(
    path: str | os.PathLike,
    network: ExitNetwork,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_share: float = 1.0,
    interpolation: str = "bilinear",
) -> None:
    """Write a network that was trained by code of your own, as ``load`` and ``load_predictor`` read it.

    Args:
        path: The file; an old one is replaced.
        network: The network. ``load`` builds it in float32: policies found in another dtype do not fit it.
        class_names: Names in the order of the logits.
        image_size: Height and width in pixels of the images.
        mean: Mean of each of the three channels, for values from 0 to 1, by which images are normalised.
        std: Standard deviation of each of the three channels, for values from 0 to 1.
        crop_share: Share of the shorter side that the central crop of an image keeps.
        interpolation: Name of the interpolation that resizes images.

    Raises:
        OSError: The file cannot be written; an old one is kept.
        TypeError: ``image_size`` is no integer.
        ValueError: An argument does not fit the network, or ``load`` could not read the file.
    """
    if not isinstance(network, ExitNetwork):
        raise ValueError(f"a {type(network).__name__} cannot be saved: pass the network with exits inside it")
    if ExitNetwork.kinds.get(network.kind) is not type(network):
        raise ValueError(
            f"a {type(network).__name__} cannot be saved: it is folded, or its class is not registered"
        )
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names is {class_names!a:.60}: pass a list of names")
    if not all(0 <= value <= 1 for value in mean):
        raise ValueError(f"mean is {list(mean)!a:.60}: pass values from 0 to 1, for pixels from 0 to 1")
    if not all(0 < value <= 1 for value in std):
        raise ValueError(f"std is {list(std)!a:.60}: pass values above 0, at most 1, for pixels from 0 to 1")
    data = DataInfo(
        name="folder",
        class_names=list(class_names),
        image_size=operator.index(image_size),
        crop_share=float(crop_share),
        interpolation=interpolation,
        mean=[float(value) for value in mean],
        std=[float(value) for value in std],
        num_training_images=0,
        fingerprint=hashlib.sha256(json.dumps(list(class_names)).encode()).hexdigest()[:16],
    )
    if data.image_size < 1:
        raise ValueError(f"image_size is {data.image_size}")
    single_stage = {"single_stage": True} if network.is_single_stage else {}
    path = expand_home(path)
    description = Description(
        network=to_config(network),
        data=data,
        operations=count_operations(network, data.image_size),
        stage="GE" if network.stage_1 is network else "IMTA",
        title=path.stem,
        recipe={"preset": data.name, "data": data.name, **single_stage},
        seed=None,
        commit=None,
        held_out_are_new=False,  # nobody knows: its training images are not recorded
        split_is_complete=False,
    )
    _check(description, network, Split.unknown())
    _check_rebuilt(network)
    _write_atomically(path, network_bytes(network, description, Split.unknown()))


def _check_rebuilt(network: ExitNetwork) -> None:
    """Raise ValueError if the options of a network describe other tensors than it has, as after pruning."""
    try:
        with torch.device("meta"):
            rebuilt = build_network(to_config(network))
    except CannotBuildError:  # a custom network, which only its user can build
        return
    shapes, expected = ({name: x.shape for name, x in n.state_dict().items()} for n in (network, rebuilt))
    for name in [*shapes, *expected]:
        if shapes.get(name) != expected.get(name):
            raise ValueError(f"a {network.kind} of these options has no such tensor {name}: it was changed")


def _write_atomically(path: Path, content: bytes) -> None:
    # utils.atomic_write does the same; models/ imports nothing else of the project.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def convert_command(path: str | os.PathLike) -> str:
    """Return the command that converts a released checkpoint or a file of format 2."""
    return f"python -m engine.convert {shlex.quote(str(path))}"


def network_bytes(network: ExitNetwork, description: Description, split: Split, half: bool = False) -> bytes:
    """Return the content of a network's file.

    Args:
        network: The network.
        description: Description to store in the file.
        split: The training images it learned from.
        half: Store floating-point tensors of two or more dimensions, such as the weights of convolutions and
            linear layers, in float16; all others stay as they are.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, x in network.state_dict().items():
        x = x.detach().cpu().contiguous()
        if half and x.dim() > 1 and x.is_floating_point():
            x = x.half()
        # A file holds tied weights once per name: safetensors takes no tensors that share memory.
        if x.untyped_storage().data_ptr() in storages:
            x = x.clone()
        storages.add(x.untyped_storage().data_ptr())
        tensors[name] = x
    tensors |= {name: x.cpu().contiguous() for name, x in split.to_tensors().items()}
    return tensor_bytes(tensors, description)


def tensor_bytes(tensors: dict[str, Tensor], description: Description) -> bytes:
    """Return a file's bytes: the tensors of a network and its split, with ``description`` in the header."""
    text = json.dumps(dataclasses.asdict(description))
    header = {"format": FORMAT, "description": text, "crc32": _crc32(safetensors.torch.save(tensors), text)}
    return safetensors.torch.save(tensors, header)


def read_network(
    path: str | os.PathLike, network: nn.Module | None = None
) -> tuple[ExitNetwork, Description, Split]:
    """Read network (float32, on the CPU, in evaluation mode), description and split of a file.

    A network that is passed keeps its device and dtype.

    Args:
        path: The file.
        network: The network without exits, as for ``load``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, foreign, of another version, or that of another network
            than the one passed; one line that names it.
    """
    path = Path(path)
    tensors, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        found = ascii(header["format"])[:80] if "format" in header else "missing"
        is_old = header.get("format") == "imta-msdnet network 2"
        way = f"; convert it once: {convert_command(path)}" if is_old else ""
        raise ValueError(
            f"{path} is not a network of this version of the project: "
            f"its format is {found}, not {FORMAT!r}{way}"
        )
    fault = "is damaged, or made by another program"
    try:
        description = Description.from_dict(json.loads(header["description"]))
        if network is not None:
            fault = "does not fit the network that was passed"
        return network_from_tensors(tensors, description, network)
    except CannotBuildError as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} {fault}: {error}") from None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the texts of the header of a file whose checksum is right.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged or foreign; one line that names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : _header_end(content)]).get("__metadata__") or {}
    except Exception as error:  # what the readers raise depends on where the damage is
        if content[:2] == b"PK" or (content[:1] == b"\x80" and content[8:9] != b"{"):  # zip or pickle
            raise ValueError(
                f"{path} is a PyTorch checkpoint; convert it once: {convert_command(path)}"
            ) from None
        if path.suffix == ".onnx":
            raise ValueError(
                f"{path} is an export, which onnx_predictor.py runs; here the trained network is needed: "
                "a safetensors file or the directory of a run"
            ) from None
        raise ValueError(
            f"{path} is truncated, damaged or no safetensors file ({type(error).__name__})"
        ) from None
    if "crc32" in header and header["crc32"] != _crc32(content, header.get("description", "")):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return tensors, header


def network_from_tensors(
    tensors: dict[str, Tensor], description: Description, network: nn.Module | None = None
) -> tuple[ExitNetwork, Description, Split]:
    """Build the network that ``description`` describes from the tensors of its file.

    Raises:
        KeyError, ValueError: The tensors are not those of the described network and split.
    """
    weights = {name: x for name, x in tensors.items() if name not in SPLIT_TENSORS}
    split = Split.from_tensors(tensors)
    network = build_with_weights(description.network, weights, network)
    _check(description, network, split)
    network.description = description
    return network.eval(), description, split


def build_with_weights(
    options: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None = None
) -> ExitNetwork:
    """Build the network that ``to_config`` describes, with the weights ``tensors``.

    Args:
        options: The description.
        tensors: State dict of the network.
        network: The network without exits, as for ``load``.

    Raises:
        ValueError: The options describe no network, none without ``network``, or another one.
    """
    try:
        with torch.device("meta"):  # shapes without memory
            built = build_network(options, network)
    except CannotBuildError:
        raise
    # What PyTorch raises on absurd numbers depends on how absurd they are.
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"it describes an impossible network ({type(error).__name__}: {first_line(error):.200})"
        ) from None
    load_weights(built, tensors)
    return built


def load_weights(network: ExitNetwork, tensors: dict[str, Tensor]) -> None:
    """Strict ``load_state_dict``; a network on the meta device gets the tensors themselves, in its own types.

    Raises:
        ValueError: The first tensor that does not fit.
    """
    expected = network.state_dict()
    for name in [*expected, *tensors]:
        ours, theirs = (list(side[name].shape) if name in side else "nothing" for side in (expected, tensors))
        if ours != theirs:
            raise ValueError(f"it holds another network: {name} is {theirs} there, {ours} here")
    assign = next(network.parameters()).is_meta
    tensors = {name: x.to(expected[name].dtype) for name, x in tensors.items()}
    tied = tied_parameters(network)
    load_tensors(network, tensors, assign=assign)
    tie_parameters(network, tied)  # assigning has given every name a parameter of its own


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _crc32(content: bytes, description: str) -> str:
    """Return the checksum of the description and of everything behind the header."""
    return f"{zlib.crc32(memoryview(content)[_header_end(content) :], zlib.crc32(description.encode())):08x}"


def _check_preprocessing(data: DataInfo) -> None:
    if not SMALLEST_CROP_SHARE <= data.crop_share <= 1:
        raise ValueError(f"crop_share is {data.crop_share}")
    if data.interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {data.interpolation!a:.60}")
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} is {values!a:.60}")
    if min(data.std) <= 0:
        raise ValueError(f"std is {data.std!a:.60}")


def _check(description: Description, network: ExitNetwork, split: Split) -> None:
    data = description.data
    lengths = {
        "class_names": (data.class_names, network.num_classes),
        "operations": (description.operations, network.num_exits),
    }
    for name, (values, length) in lengths.items():
        if len(values) != length:
            raise ValueError(f"{name} has {len(values)} entries, where {length} belong")
    if not all(isinstance(n, int | float) and 0 <= n < math.inf for n in description.operations):
        raise ValueError(f"operations are {description.operations!a:.60}")
    if not isinstance(description.recipe, dict):
        raise ValueError("recipe is no dictionary")
    if type(data.image_size) is not int or not 1 <= data.image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size is {data.image_size!a:.60}")
    network.check_image_size(data.image_size)
    if not all(isinstance(name, str) for name in data.class_names):
        raise ValueError("not all class names are texts")
    _check_preprocessing(data)
    if len(split.pixel_digests) not in (0, len(split.held_out)):
        raise ValueError(f"there are {len(split.pixel_digests)} digests of {len(split.held_out)} images")
    if not has_finite_weights(network):
        raise ValueError("not all weights are finite numbers")
    if (
        len(split.held_out)
        and not 0 <= split.held_out.min() <= split.held_out.max() < data.num_training_images
    ):
        raise ValueError(f"held_out are not numbers of {data.num_training_images} training images")
