"""Networks as files: weights in a safetensors file, whose header describes the network, its data and its training.

    network = load("imta_cifar100")    # of the folder weights/; or any such file, or the directory of a run
    network.description.class_names, network.description.mean
    save_network(path, network, description, split)

The ``safetensors`` library checks sizes and runs no code, and a checksum tells damage.
"""

import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from torch import Tensor

from models.files import SUFFIX, find
from models.imta import IMTA
from models.msdnet import MSDNet

FORMAT = "imta-msdnet network 2"
MAX_IMAGE_SIZE = 10_000  # pixels


@dataclass(frozen=True)
class Description:
    """What a file says of its network, in plain types.

    Args:
        network: ``type``, and the options of its constructor.
        class_names: in the order of the logits.
        image_size: height and width in pixels.
        mean, std: of the three channels, for values from 0 to 1.
        operations: to each exit.
        stage: ``GE`` or ``IMTA``.
        title: of its curves.
        recipe: the settings it was trained with.
        seed: of initialisation, order and augmentation.
        commit: of the code, None outside a git clone.
        data: ``name``, ``num_training_images`` and ``fingerprint`` of its data set.
        epoch: training epochs done.
        accuracy: of every exit in percent: ``val_acc1`` on held-out images, ``test_acc1`` and more where it was measured.
        origin: the file that training started from.
        frozen_digest: fingerprint of what stage 2 must not change.
        training: ``hardware`` and ``minutes`` of a shipped network's training.
    """

    network: dict[str, Any]
    class_names: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    operations: list[int]
    stage: str
    title: str
    recipe: dict[str, Any]
    seed: int
    commit: str | None
    data: dict[str, Any]
    epoch: int = 0
    accuracy: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    origin: str | None = None
    frozen_digest: str | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, hint in get_type_hints(Description).items():
            value, kind = getattr(self, name), get_origin(hint)
            is_right = isinstance(value, kind if kind in (list, dict) else hint)
            if kind is list and is_right:
                is_right = all(
                    isinstance(x, (int, float) if float in get_args(hint) else get_args(hint)) for x in value
                )
            if not is_right:
                raise ValueError(f"{name} is {value!a:.60}")


class Split(NamedTuple):
    """The training images a network learned from, and those it did not.

    ``held_out`` (N,) int64: indices of the images that were held out, sorted; ``names`` (M,) int64: digests of the names of all training
    images, by which files that came or went are told apart; empty for an archive.
    """

    held_out: Tensor
    names: Tensor


def load(path_or_name: str | os.PathLike) -> MSDNet | IMTA:
    """The network of a file, of a run's directory or of a name in ``weights/``: float32, on the CPU, in evaluation mode.

    Its ``description`` tells the rest.

    Raises:
        OSError: there is no such file, or no such name.
        ValueError: as ``read_network``.
    """
    return read_network(find(path_or_name))[0]


def is_network_file(path: Path) -> bool:
    """Whether a file is, or should be, a safetensors file."""
    if path.suffix == SUFFIX or not path.is_file():
        return path.suffix == SUFFIX
    with path.open("rb") as stream:
        return stream.read(9)[8:] == b"{"


def save_network(
    path: Path, network: MSDNet | IMTA, description: Description, split: Split, half: bool = False
) -> None:
    """Write a file atomically; an old one stays until the new one has been read back.

    Args:
        half: weights of convolutions and linear layers in float16; all others stay as they are.

    Raises:
        UserError: the file cannot be written; an old one is then untouched.
    """
    # Here, as torch.hub loads this module, and must not import a module of so common a name.
    from utils import atomic_write

    content = _to_bytes(network, description, split, half)

    def check(written: Path) -> None:
        if written.read_bytes() != content:
            raise OSError("what was written reads back differently")

    with atomic_write(path, "wb", check) as stream:
        stream.write(content)


def read_network(path: str | os.PathLike) -> tuple[MSDNet | IMTA, Description, Split]:
    """Network (float32, on the CPU, in evaluation mode), description and split of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, foreign or of another version; one line that names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : _header_end(content)]).get("__metadata__") or {}
    except Exception as error:  # what the readers raise depends on where the damage is
        if content[:2] == b"PK" or content[:1] == b"\x80":
            raise ValueError(
                f"{path} is a PyTorch checkpoint; models.load_released reads those of the released programs"
            ) from None
        raise ValueError(
            f"{path} is truncated, damaged or no safetensors file ({type(error).__name__})"
        ) from None
    if header.get("format") != FORMAT:
        found = ascii(header["format"])[:80] if "format" in header else "missing"
        raise ValueError(
            f"{path} is no network of this version of the project: its format is {found}, not {FORMAT!r}"
        )
    if header.get("crc32") != _crc32(content, header.get("description", "")):
        raise ValueError(f"{path} is damaged: its checksum is another")
    try:
        description = Description(**json.loads(header["description"]))
        network = build_network(description.network)
        split = Split(*(tensors.pop(name) for name in Split._fields))
        load_weights(network, tensors)
        _check(description, network, split)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or made by another program: {error}") from None
    network.description = description
    return network.eval(), description, split


def network_options(network: MSDNet | IMTA) -> dict[str, Any]:
    """Plain description from which ``build_network`` makes the same network."""
    return {"type": type(network).__name__, **network.config}


def build_network(options: dict[str, Any]) -> MSDNet | IMTA:
    """The network that ``network_options`` described, on the meta device: shapes without memory, for ``load_weights``.

    Raises:
        ValueError: they describe none.
    """
    kind, options = options.get("type"), {name: value for name, value in options.items() if name != "type"}
    try:
        with torch.device("meta"):
            if kind == "IMTA":
                return IMTA(MSDNet(**options.pop("backbone")), **options)
            if kind != "MSDNet":
                raise ValueError(f"its type is {kind!a:.60}")
            return MSDNet(**options)
    # What PyTorch raises on absurd numbers depends on how absurd they are.
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"it describes an impossible network ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        ) from None


def load_weights(network: MSDNet | IMTA, tensors: dict[str, Tensor]) -> None:
    """Strict ``load_state_dict``; a network on the meta device gets the tensors themselves, in its own types.

    Raises:
        ValueError: the first tensor that does not fit.
    """
    expected = network.state_dict()
    for name in [*expected, *tensors]:
        here, there = (list(side[name].shape) if name in side else "nothing" for side in (expected, tensors))
        if here != there:
            raise ValueError(f"it holds another network: {name} is {there} there, {here} here")
    assign = next(network.parameters()).is_meta
    network.load_state_dict({name: x.to(expected[name].dtype) for name, x in tensors.items()}, assign=assign)


def _to_bytes(network: MSDNet | IMTA, description: Description, split: Split, half: bool) -> bytes:
    tensors = {name: x.detach().cpu().contiguous() for name, x in network.state_dict().items()}
    if half:
        tensors = {name: x.half() if x.dim() > 1 else x for name, x in tensors.items()}
    tensors |= {name: x.cpu().contiguous() for name, x in split._asdict().items()}
    text = json.dumps(dataclasses.asdict(description))
    header = {"format": FORMAT, "description": text, "crc32": _crc32(safetensors.torch.save(tensors), text)}
    return safetensors.torch.save(tensors, header)


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _crc32(content: bytes, description: str) -> str:
    """Of the description, and of everything behind the header."""
    return f"{zlib.crc32(memoryview(content)[_header_end(content) :], zlib.crc32(description.encode())):08x}"


def _check(description: Description, network: MSDNet | IMTA, split: Split) -> None:
    lengths = {"class_names": network.num_classes, "operations": network.num_exits, "mean": 3, "std": 3}
    for name, length in lengths.items():
        if len(getattr(description, name)) != length:
            raise ValueError(f"{name} has {len(getattr(description, name))} entries, where {length} belong")
    network.check_image_size(description.image_size)
    if description.image_size > MAX_IMAGE_SIZE:
        raise ValueError(f"image_size is {description.image_size}")
    if not all(
        abs(mean) < 1e3 and 1e-3 < std < 1e3
        for mean, std in zip(description.mean, description.std, strict=True)
    ):
        raise ValueError(f"mean is {description.mean}, std {description.std}")
    if {name: type(value) for name, value in description.data.items()} != {
        "name": str,
        "num_training_images": int,
        "fingerprint": str,
    }:
        raise ValueError(f"data is {description.data!a:.80}")
    if not all(x.isfinite().all() for x in network.state_dict().values()):
        raise ValueError("not all weights are finite numbers")
    num_images = description.data["num_training_images"]
    held_out, is_list = split.held_out, all(x.dtype == torch.int64 and x.dim() == 1 for x in split)
    if not is_list or (len(held_out) and not 0 <= held_out.min() <= held_out.max() < num_images):
        raise ValueError(f"held_out are not numbers of {num_images} training images")
