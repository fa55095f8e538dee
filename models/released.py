"""Checkpoints of the released code, kalviny/MSDNet-PyTorch and kalviny/IMTA, and its forks.

Reads stage-1 (``msdnet``, ``msdnet_ge``) and stage-2 (``IMTA_MSDNet``) files and writes our weights under the
released names. The published networks are recognised by the shapes of the tensors; any other needs its
published flags.

Example:
    network = load_released("msdnet-step=4.pth.tar")  # in evaluation mode
    torch.save({"state_dict": to_released(network)}, "for_released_programs.pth.tar")
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import is_network_file
from .imta import IMTA
from .layers import Transition
from .msdnet import MSDNet
from .pytorch_files import STATE_DICTS, WRAPPERS, read_checkpoint

Shapes = dict[str, tuple[int, ...]]
Flags = dict[str, Any]

# Published flag -> option of MSDNet.
PUBLISHED_NAMES = {
    "num_classes": "num_classes",
    "nBlocks": "num_blocks",
    "base": "base",
    "stepmode": "step_mode",
    "step": "step",
    "grFactor": "growth_factors",
    "nChannels": "num_channels",
    "growthRate": "growth_rate",
    "bottleneck": "bottleneck",
    "bnFactor": "bottleneck_factors",
    "prune": "prune",
    "reduction": "reduction",
}
# Flags of the published networks with small inputs (CIFAR) and with large ones (ImageNet).
_COMMON = {"bottleneck": True, "prune": "max", "reduction": 0.5}
_CIFAR = {**_COMMON, "nChannels": 16, "growthRate": 6, "grFactor": (1, 2, 4), "bnFactor": (1, 2, 4)}
_IMAGENET = {**_COMMON, "nChannels": 32, "growthRate": 16, "grFactor": (1, 2, 4, 4), "bnFactor": (1, 2, 4, 4)}
_PUBLISHED = {
    True: [
        {**_CIFAR, "stepmode": "lin_grow", "base": 1, "step": 1},
        {**_CIFAR, "stepmode": "even", "base": 4, "step": 2},
    ],
    False: [{**_IMAGENET, "stepmode": "even", "base": depth, "step": depth} for depth in range(2, 8)],
}
# No module of the released networks has such a name.
_WRAPPERS = (*WRAPPERS, "model")


def load_released(
    file_or_dict: str | os.PathLike | Mapping, *, gradient_equilibrium: bool | None = None, **published_flags
) -> MSDNet | IMTA:
    """Load the network of a released checkpoint: float32, on the CPU, in evaluation mode.

    What training it further needs is set as in the released code: Gradient Equilibrium on the coarsest
    scale only, an ISC gradient that flows, BatchNorm of the frozen backbone that follows the batches.

    Args:
        file_or_dict: A file, its content, or a bare state dict, with or without the ``module.`` of
            DataParallel and the like before names. A file is read with ``weights_only=True``: nothing in it
            can run.
        gradient_equilibrium: Whether the network rescales gradients. If None, exactly when the file's
            ``arch`` is ``msdnet_ge``; a stage-2 backbone always does.
        published_flags: ``nBlocks``, ``base``, ``step``, ``stepmode``, ``nChannels``, ``growthRate``,
            ``grFactor``, ``bnFactor``, ``prune``, ``reduction``, ``bottleneck``, ``data``, ``num_classes``:
            numbers, lists, and texts such as ``1-2-4``. They take the place of those of the published
            networks; None is a flag not given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another kind, or needs more than tensors and plain types; the
            tensors are not those of a released network; a flag disagrees with the file. One line that names
            the file and the reason.
    """
    is_file = not isinstance(file_or_dict, Mapping)
    source = str(file_or_dict) if is_file else "the given checkpoint"
    if is_file and is_network_file(Path(file_or_dict)):
        raise ValueError(f"{source}: it is a safetensors file; models.load reads those of this project")
    checkpoint = read_checkpoint(Path(file_or_dict)) if is_file else file_or_dict
    try:
        flags = _parse_flags(published_flags)
        if str(checkpoint.get("format")).startswith("imta-msdnet"):
            raise ValueError(
                "it is a run of this project to resume; models.load reads the best.safetensors beside it"
            )
        tensors = _tensors_of(checkpoint)
        stage_2 = any(name.startswith("net.") for name in tensors)
        is_rescaled = stage_2 or checkpoint.get("arch") == "msdnet_ge"
        rescale = is_rescaled if gradient_equilibrium is None else gradient_equilibrium
        network = _fitting_network(
            {name: tuple(t.shape) for name, t in tensors.items()}, flags, stage_2, rescale
        )
        weights = _under_our_names(network, tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    network.load_state_dict(weights, assign=True)
    return network.eval()


def to_released(network: MSDNet | IMTA) -> dict[str, Tensor]:
    """Return the weights of a network under the released names and in the released order.

    That is the ``state_dict`` of a released checkpoint, with the ``module.`` of DataParallel before every
    name. The tensors are those of ``network.state_dict()``, not copies.

    Raises:
        ValueError: The released code has no such network (``IMTA`` with ``isc=False``, ``MSDNet`` with
            ``boosted_exits=True``, ``Backbone``).
    """
    if not isinstance(network.stage_1, MSDNet):
        raise ValueError(f"a {network.stage_1.kind} has no released form")
    if network.boosted or network.stage_1.boosted:
        raise ValueError("a network with boosted exits has no released form")
    if isinstance(network, IMTA) and network.links is None:
        raise ValueError(
            "an IMTA network with isc=False has no released form: "
            "the released stage 2 always has the ISC links"
        )
    ours = network.state_dict()
    return {f"module.{released_name}": ours[our_name] for our_name, released_name in _names(network)}


def _names(network: MSDNet | IMTA) -> Iterator[tuple[str, str]]:
    """Yield (our name, released name) of every tensor, in the released order."""
    for our_module, released_module in _module_names(network):
        for suffix in network.get_submodule(our_module).state_dict():
            yield f"{our_module}.{suffix}", f"{released_module}.{suffix}"


def _module_names(network: MSDNet | IMTA) -> Iterator[tuple[str, str]]:
    if isinstance(network, IMTA):
        for ours, released in _module_names(network.backbone):
            yield f"backbone.{ours}", f"net.{released}"
        for k in range(network.num_exits):
            yield f"classifiers.{k}", f"classifier.{k}"
        for k in range(network.num_exits - 1):
            yield f"links.{k}", f"isc_modules.{k}"
        return
    for s in range(network.num_scales):
        yield f"stem.scales.{s}", _stem_name(s, network.small_inputs)
    for k, block in enumerate(network.blocks):
        for i, layer in enumerate(block):
            # The released first block begins with the stem.
            yield from _layer_names(layer, f"blocks.{k}.{i}", f"blocks.{k}.{i + 1 if k == 0 else i}")
    for k in range(network.num_exits):
        for i in range(2):
            yield f"exits.{k}.convolutions.{i}", f"classifier.{k}.m.{i}.net"
        yield f"exits.{k}.linear", f"classifier.{k}.linear"


def _layer_names(layer: nn.Module, ours: str, released: str) -> Iterator[tuple[str, str]]:
    # In the released code, scales are counted among the remaining ones.
    for r, s in enumerate(layer.scales):
        if isinstance(layer, Transition):
            yield f"{ours}.reduce.{s}", f"{released}.m.{r}.net"
            continue
        if str(s) in layer.down:
            yield f"{ours}.down.{s}", f"{released}.layers.{r}.conv_down.net"
        yield f"{ours}.normal.{s}", f"{released}.layers.{r}.conv_normal.net"


def _stem_name(scale: int, small_inputs: bool) -> str:
    return f"blocks.0.0.layers.{scale}" + (".net" if small_inputs or scale > 0 else "")


def _parse_flags(given: Flags) -> Flags:
    allowed = (*PUBLISHED_NAMES, "data")
    for flag in given:
        if flag not in allowed:
            raise ValueError(f"--{flag} says nothing about a released network; allowed: {', '.join(allowed)}")
    flags = {flag: value for flag, value in given.items() if value is not None}
    for flag in ("grFactor", "bnFactor"):
        text = flags.get(flag)
        if isinstance(text, str):
            try:
                flags[flag] = [int(part) for part in text.split("-")]
            except ValueError:
                raise ValueError(f"--{flag} is {text!r}; it takes whole numbers such as 1-2-4") from None
    return flags


def _tensors_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint or bare state dict, without what wrappers put before their names."""
    state_dict = next(
        (checkpoint[name] for name in STATE_DICTS if isinstance(checkpoint.get(name), Mapping)), checkpoint
    )
    if not any(isinstance(x, Tensor) for x in state_dict.values()):
        raise ValueError(
            f"it holds no state dict of a network, but {', '.join(map(ascii, state_dict)) or 'nothing':.100}"
        )
    tensors = {}
    for full_name, x in state_dict.items():
        if not isinstance(full_name, str) or not isinstance(x, Tensor):
            raise ValueError(
                f"its state dict holds a {type(x).__name__} named {full_name!r}, where a tensor is expected"
            )
        name = ".".join(part for part in full_name.split(".") if part not in _WRAPPERS)
        if name in tensors:
            raise ValueError(f"{name} is there twice, with and without a prefix")
        is_plain = (
            x.layout == torch.strided
            and not x.is_meta
            and (x.is_floating_point() or name.endswith("num_batches_tracked"))
        )
        # A tensor may repeat one number along a dimension of any claimed length.
        if not is_plain or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{name} is not a plain tensor of floating point numbers, all of them stored")
        tensors[name] = x.detach()
    return tensors


def _under_our_names(network: MSDNet | IMTA, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for our_name, released_name in _names(network):
        if released_name.endswith("num_batches_tracked"):
            # Files from before PyTorch 0.4.1 do not have it, and with a fixed momentum nothing depends on it.
            weights[our_name] = tensors.get(released_name, torch.tensor(0)).to("cpu", torch.int64, copy=True)
        else:
            weights[our_name] = tensors[released_name].to(
                "cpu", torch.float32, copy=True, memory_format=torch.contiguous_format
            )
    return weights


def _fitting_network(shapes: Shapes, flags: Flags, stage_2: bool, rescale: bool) -> MSDNet | IMTA:
    """Build a network on the meta device with exactly these tensors: a published one, but for given flags."""
    prefix = "net." if stage_2 else ""
    small_inputs = f"{prefix}{_stem_name(0, True)}.0.weight" in shapes
    linear = re.compile(re.escape(prefix) + r"classifier\.\d+\.linear\.weight")
    linears = [shape for name, shape in shapes.items() if linear.fullmatch(name) and len(shape) == 2]
    if not linears:
        raise ValueError("it is not a released network: it has no classifier.*.linear (the exits)")
    known = {"nBlocks": len(linears), "num_classes": linears[0][0]}
    for flag, noun in (("nBlocks", "exits"), ("num_classes", "classes")):
        if flags.get(flag, known[flag]) != known[flag]:
            raise ValueError(f"the file has {known[flag]} {noun}, --{flag} says {flags[flag]}")
    data = flags.pop("data", None)
    if data is not None and (str(data).lower() == "imagenet") is small_inputs:
        raise ValueError(f"the file has {'small' if small_inputs else 'large'} inputs, --data says {data}")
    nearest = None
    for published in _PUBLISHED[small_inputs]:
        options = {PUBLISHED_NAMES[flag]: value for flag, value in {**published, **known, **flags}.items()}
        try:
            with torch.device("meta"):
                network: MSDNet | IMTA = MSDNet(
                    **options,
                    small_inputs=small_inputs,
                    gradient_equilibrium=rescale,
                    gradient_equilibrium_scales="coarsest",
                )
                if stage_2:
                    network = IMTA(network, cut_isc_gradient=False, freeze_batchnorm=False)
            ours = network.state_dict()
        except (ValueError, TypeError) as error:
            nearest = nearest or [str(error)]
            continue
        expected = {released_name: tuple(ours[our_name].shape) for our_name, released_name in _names(network)}
        differences = [
            f"{name} is {shapes.get(name, 'nothing')} there, where {expected.get(name, 'nothing')} belongs"
            for name in {**expected, **shapes}
            if expected.get(name) != shapes.get(name)
            and not (name.endswith("num_batches_tracked") and name not in shapes)
        ]
        if not differences:
            return network
        nearest = min(nearest or differences, differences, key=len)
    what = (
        "not the network of the given flags"
        if flags
        else "none of the published networks, and needs flags such as --base --step"
    )
    raise ValueError(
        f"it is {what}: {nearest[0]}" + (f", and {len(nearest) - 1} more" if len(nearest) > 1 else "")
    )
