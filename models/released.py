"""Checkpoints of the released programs: kalviny/MSDNet-PyTorch, kalviny/IMTA and forks that share their parameter names.

Reads stage-1 (``msdnet``, ``msdnet_ge``) and stage-2 (``IMTA_MSDNet``) files and writes our weights under the released names. The network
is inferred from the shapes of the tensors; published flags may be given besides and must agree with them.

    network = load_released("msdnet-step=4.pth.tar")  # in evaluation mode
    logits = network(images)
    torch.save({"arch": released_flags(network)["arch"], "state_dict": to_released(network)}, "for_released_programs.pth.tar")
"""

import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.imta import IMTA
from models.layers import Transition
from models.msdnet import MSDNet, block_depths, remaining_scales

Shapes = dict[str, tuple[int, ...]]
Flags = dict[str, Any]

STAGE_1_ARCHS = ("msdnet", "msdnet_ge")
STAGE_2_ARCH = "IMTA_MSDNet"
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


def load_released(
    file_or_dict: str | os.PathLike | Mapping, *, gradient_equilibrium: bool | None = None, **published_flags
) -> MSDNet | IMTA:
    """The network of a released checkpoint, float32, on the CPU, in evaluation mode; stage 2 gives an ``IMTA``.

    What training it further needs is set as in the released programs: Gradient Equilibrium on the coarsest scale only, an ISC gradient
    that flows, BatchNorm of the frozen backbone that follows the batches.

    Args:
        file_or_dict: a file, its content, or a bare state dict, with or without the ``module.`` that DataParallel puts before names. A
            file is read with ``weights_only=True``: nothing in it can run.
        gradient_equilibrium: whether the network rescales gradients. None: exactly when the file's ``arch``, or the flag where the file
            has none, is ``msdnet_ge``; a stage-2 backbone always does.
        published_flags: ``nBlocks``, ``base``, ``step``, ``stepmode``, ``nChannels``, ``growthRate``, ``grFactor``, ``bnFactor``,
            ``nScales``, ``prune``, ``reduction``, ``bottleneck``, ``data``, ``num_classes``, ``arch``: as on the released command line or
            typed. They only choose where several networks fit the tensors; None is a flag not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another kind, or needs more than tensors and plain types; the tensors are not those of a
            released network; a flag disagrees with the file. One line that names the file and the reason.
    """
    is_file = not isinstance(file_or_dict, Mapping)
    source = str(file_or_dict) if is_file else "the given checkpoint"
    flags = _parse_flags(published_flags)
    if gradient_equilibrium not in (None, True, False):
        raise ValueError(f"gradient_equilibrium is {gradient_equilibrium!r}; allowed: True, False, None")
    checkpoint = _read(Path(file_or_dict)) if is_file else file_or_dict
    try:
        tensors = _tensors_of(checkpoint)
        stage_2 = any(name.startswith("net.") for name in tensors)
        rescale = _rescales_gradients(checkpoint.get("arch"), flags.pop("arch", None), stage_2, gradient_equilibrium)
        network = _fitting_network({name: tuple(t.shape) for name, t in tensors.items()}, flags, stage_2, rescale)
        weights = _under_our_names(network, tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    network.load_state_dict(weights, assign=True)
    return network.eval()


def to_released(network: MSDNet | IMTA, module_prefix: bool = True) -> dict[str, Tensor]:
    """Weights of a network under the released names and in the released order: the ``state_dict`` of a released checkpoint.

    The tensors are those of ``network.state_dict()``, not copies.

    Args:
        module_prefix: put ``module.`` before every name, as the released programs do, which save from within DataParallel.

    Raises:
        ValueError: the released programs have no such network (``IMTA`` with ``isc=False``).
    """
    prefix = "module." if module_prefix else ""
    ours = network.state_dict()
    return {prefix + released_name: ours[our_name] for our_name, released_name in _names(network)}


def released_flags(network: MSDNet | IMTA) -> Flags:
    """Published flags of a network, by their published names and spellings; ``load_released`` takes them too.

    ``data`` follows from the kind of inputs and, for small ones, from the number of classes. The released programs derive
    ``num_classes`` from ``data``; for another number of classes it has to be set there.

    Raises:
        ValueError: as ``to_released``.
    """
    _check_representable(network)
    stage_2 = isinstance(network, IMTA)
    config = network.config["backbone"] if stage_2 else network.config
    flags = {flag: config[name] for flag, name in PUBLISHED_NAMES.items()}
    for flag in ("grFactor", "bnFactor"):
        flags[flag] = "-".join(map(str, flags[flag]))
    small_data = "cifar10" if config["num_classes"] == 10 else "cifar100"
    return {
        "arch": STAGE_2_ARCH if stage_2 else STAGE_1_ARCHS[config["gradient_equilibrium"]],
        "data": small_data if config["small_inputs"] else "ImageNet",
        **flags,
    }


def _check_representable(network: nn.Module) -> None:
    if not isinstance(network, (MSDNet, IMTA)):
        raise ValueError(f"a {type(network).__name__} has no released form; allowed: MSDNet, IMTA")
    if isinstance(network, IMTA) and network.links is None:
        raise ValueError("an IMTA network with isc=False has no released form: the released stage 2 always has the ISC links")


def _names(network: MSDNet | IMTA) -> Iterator[tuple[str, str]]:
    """(our name, released name) of every tensor, in the released order."""
    _check_representable(network)
    for our_module, released_module in _module_names(network):
        for suffix in network.get_submodule(our_module).state_dict():
            yield f"{our_module}.{suffix}", f"{released_module}.{suffix}"


def _module_names(network: MSDNet | IMTA) -> Iterator[tuple[str, str]]:
    if isinstance(network, IMTA):
        for ours, theirs in _module_names(network.backbone):
            yield f"backbone.{ours}", f"net.{theirs}"
        for k in range(network.num_exits):
            yield f"classifiers.{k}", f"classifier.{k}"
        for k in range(network.num_exits - 1):
            yield f"links.{k}", f"isc_modules.{k}"
        return
    for s in range(network.num_scales):
        yield f"stem.scales.{s}", _stem_name(s, network.small_inputs)
    for k, block in enumerate(network.blocks):
        for i, stage in enumerate(block):
            ours = f"blocks.{k}.{i}"
            # The released first block begins with the stem, and scales are counted among the remaining ones.
            theirs = f"blocks.{k}.{i + 1 if k == 0 else i}"
            for r, s in enumerate(stage.scales):
                if isinstance(stage, Transition):
                    yield f"{ours}.reduce.{s}", f"{theirs}.m.{r}.net"
                    continue
                if str(s) in stage.down:
                    yield f"{ours}.down.{s}", f"{theirs}.layers.{r}.conv_down.net"
                yield f"{ours}.normal.{s}", f"{theirs}.layers.{r}.conv_normal.net"
    for k in range(network.num_exits):
        for i in range(2):
            yield f"exits.{k}.convolutions.{i}", f"classifier.{k}.m.{i}.net"
        yield f"exits.{k}.linear", f"classifier.{k}.linear"


def _stem_name(scale: int, small_inputs: bool) -> str:
    return f"blocks.0.0.layers.{scale}" + (".net" if small_inputs or scale > 0 else "")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
        raise ValueError
    return int(value)


def _factors(value: Any) -> tuple[int, ...]:
    factors = tuple(_integer(v) for v in (value.split("-") if isinstance(value, str) else value))
    if not factors:
        raise ValueError
    return factors


def _share(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError
    return float(value)


def _one_of(*allowed: str) -> Callable[[Any], str]:
    return lambda value: allowed[allowed.index(value)]


def _truth(value: Any) -> bool:
    return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]


def _data(value: Any) -> str:
    """``cifar10``, ``cifar100`` or ``imagenet`` from any usual spelling (ImageNet, CIFAR-10, cifar100+)."""
    return re.match(r"cifar100|cifar10(?!\d)|imagenet", re.sub(r"[-_]", "", value.lower())).group()


# flag -> (parser, what it takes); in the order in which disagreements are reported.
_PARSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "arch": (_one_of(*STAGE_1_ARCHS, STAGE_2_ARCH), f"{', '.join(STAGE_1_ARCHS)}, {STAGE_2_ARCH}"),
    "nBlocks": (_integer, "a positive integer"),
    "num_classes": (_integer, "a positive integer"),
    "data": (_data, "cifar10, cifar100, ImageNet"),
    "nScales": (_integer, "a positive integer"),
    "base": (_integer, "a positive integer"),
    "stepmode": (_one_of("even", "lin_grow"), "even, lin_grow"),
    "step": (_integer, "a positive integer"),
    "grFactor": (_factors, "positive integers such as 1-2-4"),
    "nChannels": (_integer, "a positive integer"),
    "growthRate": (_integer, "a positive integer"),
    "bottleneck": (_truth, "True, False"),
    "bnFactor": (_factors, "positive integers such as 1-2-4"),
    "prune": (_one_of("max", "min"), "max, min"),
    "reduction": (_share, "a number from 0 to 1"),
}
_WORDING = {
    "nBlocks": "{} exits",
    "num_classes": "{} classes",
    "nScales": "{} scales",
    "base": "{} layers in its first block",
    "nChannels": "{} channels in its first layer",
}


def _parse_flags(given: Flags) -> Flags:
    flags = {}
    for flag, value in given.items():
        if flag not in _PARSERS:
            raise ValueError(f"--{flag} says nothing about a released network; allowed: {', '.join(_PARSERS)}")
        if value is None:
            continue
        parse, allowed = _PARSERS[flag]
        try:
            flags[flag] = parse(value)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"--{flag} is {value!r}; allowed: {allowed}") from error
    return flags


def _agreeing(candidates: list[Flags], flags: Flags) -> list[Flags]:
    """The candidates with the values of ``flags``, or an error that says which flag disagrees."""
    for flag in _PARSERS:
        if flag not in flags or flag not in candidates[0]:
            continue
        agreeing = [c for c in candidates if c[flag] == flags[flag]]
        if not agreeing:
            raise _disagreement(flag, candidates[0][flag], flags[flag])
        candidates = agreeing
    return candidates


def _disagreement(flag: str, value: Any, given: Any) -> ValueError:
    def text(x: Any) -> str:
        return "-".join(map(str, x)) if isinstance(x, tuple) else str(x)

    return ValueError(f"the file has {_WORDING.get(flag, flag + ' {}').format(text(value))}, --{flag} says {text(given)}")


def _read(path: Path) -> Mapping:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # A damaged or foreign file can make any part of the unpickler fail.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise ValueError(
                f"{path}: besides tensors it holds {refused[1]}, which is not loaded since it could run code. If you trust its origin, "
                "save its 'state_dict' alone on the machine it comes from, or allow that class with torch.serialization.safe_globals"
            ) from error
        raise ValueError(f"{path}: it is no PyTorch checkpoint, or a damaged one ({type(error).__name__} while reading it)") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: it holds a {type(checkpoint).__name__}, not a checkpoint or state dict")
    return checkpoint


def _tensors_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """The tensors of a checkpoint or bare state dict, without any ``module.``."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping) or not any(isinstance(x, Tensor) for x in state.values()):
        raise ValueError("it holds no state dict of a network")
    tensors = {}
    for full_name, x in state.items():
        if not isinstance(full_name, str) or not isinstance(x, Tensor):
            raise ValueError(f"its state dict holds a {type(x).__name__} named {full_name!r}, where a tensor is expected")
        name = ".".join(part for part in full_name.split(".") if part != "module")
        if name in tensors:
            raise ValueError(f"{name} is there twice, with and without 'module.'")
        is_count = name.endswith("num_batches_tracked")
        if x.layout != torch.strided or x.is_meta or x.is_quantized or x.is_complex() or not (is_count or x.is_floating_point()):
            raise ValueError(f"{name} is a {x.dtype} tensor ({x.layout}, {x.device}), where plain floating point numbers are expected")
        # A tensor may repeat one number along a dimension of any claimed length.
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(f"{name} claims the shape {tuple(x.shape)} but stores fewer numbers")
        tensors[name] = x.detach()
    return tensors


def _rescales_gradients(file_arch: Any, given_arch: str | None, stage_2: bool, wanted: bool | None) -> bool:
    possible = (STAGE_2_ARCH,) if stage_2 else STAGE_1_ARCHS
    if given_arch not in (None, *possible):
        raise ValueError(f"the file has a network of stage {2 if stage_2 else 1}, --arch says {given_arch}")
    known_arch = file_arch if file_arch in possible else given_arch
    if given_arch not in (None, known_arch):
        raise _disagreement("arch", known_arch, given_arch)
    if wanted is not None:
        return bool(wanted)
    return stage_2 or known_arch == "msdnet_ge"


def _under_our_names(network: MSDNet | IMTA, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for our_name, released_name in _names(network):
        if released_name.endswith("num_batches_tracked"):
            # Files from before PyTorch 0.4.1 do not have it, and with a fixed momentum nothing depends on it.
            weights[our_name] = tensors.get(released_name, torch.tensor(0)).to(torch.int64, copy=True)
        else:
            weights[our_name] = tensors[released_name].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return weights


def _fitting_network(shapes: Shapes, flags: Flags, stage_2: bool, rescale: bool) -> MSDNet | IMTA:
    """A network on the meta device with exactly these tensors.

    Shapes leave a few options open, so plausible networks are built, the published conventions first, and compared tensor by tensor.
    """
    prefix = "net." if stage_2 else ""
    layout = _read_layout({name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)})
    fitting, problems = [], []
    for candidate in _candidates(layout, flags):
        if fitting and candidate["grFactor"] != fitting[0]["grFactor"]:
            break
        try:
            with torch.device("meta"):
                network: MSDNet | IMTA = _build(candidate, rescale)
                if stage_2:
                    network = IMTA(network, cut_isc_gradient=False, freeze_batchnorm=False)
            problem = _difference(network, shapes)
        except ValueError as error:
            problem = str(error)
        if problem is None:
            fitting.append({**candidate, "network": network})
        else:
            problems.append(problem)
    if not fitting:
        raise _not_released(problems[0])
    return _agreeing(fitting, flags)[0]["network"]


def _not_released(reason: str) -> ValueError:
    return ValueError(f"it is not a released network: {reason}")


def _build(candidate: Flags, rescale: bool) -> MSDNet:
    return MSDNet(
        **{name: candidate[flag] for flag, name in PUBLISHED_NAMES.items()},
        small_inputs=candidate["data"] != "imagenet",
        gradient_equilibrium=rescale,
        gradient_equilibrium_scales="coarsest",
    )


def _difference(network: MSDNet | IMTA, shapes: Shapes) -> str | None:
    """None if the network has tensors of exactly these names and shapes, otherwise what differs, in one line."""
    ours = network.state_dict()
    expected = {released_name: tuple(ours[our_name].shape) for our_name, released_name in _names(network)}
    differences = []
    for names, what in (
        ([n for n in expected if n not in shapes and not n.endswith("num_batches_tracked")], "missing"),
        ([n for n in shapes if n not in expected], "not known"),
    ):
        if names:
            differences.append(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}")
    wrong = [n for n in expected if n in shapes and shapes[n] != expected[n]]
    if wrong:
        first = wrong[0]
        differences.append(f"{first} has the shape {shapes[first]}, where {expected[first]} belongs ({len(wrong)} such tensors)")
    return "; ".join(differences) or None


_STAGE = re.compile(r"blocks\.(\d+)\.(\d+)\.(?:layers\.(\d+)\.conv_(normal|down)|m\.(\d+))\.net\.")


class _Layout(NamedTuple):
    """What the shapes of a stage-1 network say. Scales are counted over the whole network, the finest is 0."""

    num_classes: int
    small_inputs: bool
    bottleneck: bool
    stem: list[int]  # channels of every scale
    depths: list[int]  # layers of every block
    scale_counts: list[int]  # scales that every layer computes
    first_growth: dict[int, int]  # scale -> new channels of the first layer
    inner: list[tuple[int, int, int, int]]  # of every 1x1 convolution: scale of its input, channels in and out, out of the 3x3 after it
    transitions: list[tuple[int, int, int]]  # scale, channels in and out


def _read_layout(shapes: Shapes) -> _Layout:
    small_inputs = f"{_stem_name(0, True)}.0.weight" in shapes
    exits = {int(m[1]) for name in shapes if (m := re.match(r"classifier\.(\d+)\.linear\.weight$", name))}
    stem = []
    while f"{_stem_name(len(stem), small_inputs)}.0.weight" in shapes:
        stem.append(_conv_channels(shapes, f"{_stem_name(len(stem), small_inputs)}.0")[0])
    if not stem or not exits:
        raise _not_released(f"it has no {'classifier.*.linear (the exits)' if stem else 'blocks.0.0.layers.0 (the first layer)'}")

    # (block, stage in it) -> (index among the remaining scales, kind) of its convolutions
    stages: dict[tuple[int, int], set[tuple[int, str]]] = {}
    for match in filter(None, map(_STAGE.match, shapes)):
        k, i, layer_scale, kind, transition_scale = match.groups()
        stages.setdefault((int(k), int(i)), set()).add((int(layer_scale or transition_scale), kind or "transition"))
    blocks = {k for k, _ in stages}
    if exits != set(range(len(exits))) or blocks != exits:
        raise _not_released(f"it has exits {sorted(exits)} and blocks {sorted(blocks)}, where both should count from 0")

    bottleneck = any(re.search(r"\.conv_(normal|down)\.net\.3\.weight$", name) for name in shapes)
    layout = _Layout(next(iter(shapes["classifier.0.linear.weight"]), 0), small_inputs, bottleneck, stem, [0] * len(exits), [], {}, [], [])
    for (k, i), cells in sorted(stages.items()):
        count = 1 + max(r for r, _ in cells)
        if count > len(stem):
            raise _not_released(f"blocks.{k}.{i} has {count} scales, the first layer {len(stem)}")
        if any(kind != "transition" for _, kind in cells):
            layout.depths[k] += 1
            layout.scale_counts.append(count)
        for r, kind in sorted(cells):
            s = r + len(stem) - count
            if kind == "transition":
                out_channels, in_channels = _conv_channels(shapes, f"blocks.{k}.{i}.m.{r}.net.0")
                layout.transitions.append((s, in_channels, out_channels))
                continue
            name = f"blocks.{k}.{i}.layers.{r}.conv_{kind}.net"
            new_channels, _ = _conv_channels(shapes, f"{name}.{3 if bottleneck else 0}")
            if bottleneck:
                inner_channels, in_channels = _conv_channels(shapes, f"{name}.0")
                layout.inner.append((s - 1 if kind == "down" else s, in_channels, inner_channels, new_channels))
            if len(layout.scale_counts) == 1:
                layout.first_growth[s] = layout.first_growth.get(s, 0) + new_channels
    if 0 in layout.depths:
        raise _not_released(f"its blocks have {layout.depths} layers")
    return layout


def _conv_channels(shapes: Shapes, name: str) -> tuple[int, int]:
    """Channels out and in of a convolution."""
    shape = shapes.get(f"{name}.weight")
    if shape is None:
        raise _not_released(f"{name}.weight is missing")
    if len(shape) != 4 or 0 in shape:
        raise _not_released(f"{name}.weight has the shape {shape}, where a convolution's belongs")
    return shape[0], shape[1]


def _candidates(layout: _Layout, flags: Flags) -> list[Flags]:
    """Values of all published flags that may fit a layout and agree with the given ones, the likeliest first."""
    counts, num_scales = layout.scale_counts, len(layout.stem)
    fixed = {"num_classes": layout.num_classes, "nScales": num_scales, "bottleneck": layout.bottleneck}
    data_sets = {"cifar10": 10, "cifar100": 100} if layout.small_inputs else {"imagenet": layout.num_classes}
    if layout.num_classes in data_sets.values() and "num_classes" not in flags:
        data_sets = {name: num_classes for name, num_classes in data_sets.items() if num_classes == layout.num_classes}
    depths = [{**fixed, "data": name, **depth} for name in data_sets for depth in _depth_candidates(layout.depths, flags)]
    depth = _agreeing(depths, flags)[0]
    widths = _agreeing(_width_candidates(layout.stem, layout.first_growth), flags)
    prunes = [p for p in ("max", "min") if counts == [len(remaining_scales(n + 1, len(counts), num_scales, p)) for n in range(len(counts))]]
    if not prunes:
        raise _not_released(f"neither prune max nor min leaves its layers {counts} scales")
    candidates = []
    for width, prune in product(widths, prunes):
        factors = _bottleneck_factors(layout.inner, width["grFactor"], flags.get("bnFactor"))
        for reduction in _reductions(layout.transitions, width["grFactor"], flags.get("reduction")):
            candidates.append({**depth, **width, "prune": prune, "bnFactor": factors, "reduction": reduction})
    if not candidates:
        raise _not_released("no reduction gives the channels of all its transitions")
    return candidates


def _depth_candidates(depths: list[int], flags: Flags) -> list[Flags]:
    """What ``nBlocks``, ``base``, ``step`` and ``stepmode`` may be for blocks of so many layers."""
    if len(depths) == 1:
        steps = [(flags.get("stepmode", "even"), flags.get("step", 1))]
    else:
        steps = [("even", depths[1]), ("lin_grow", depths[1] - 1)]
    candidates = [
        {"nBlocks": len(depths), "base": depths[0], "stepmode": mode, "step": step}
        for mode, step in steps
        if step > 0 and block_depths(len(depths), depths[0], step, mode) == depths
    ]
    if not candidates:
        raise _not_released(f"blocks of {depths} layers follow neither stepmode even nor lin_grow")
    return candidates


def _width_candidates(stem: list[int], first_growth: dict[int, int]) -> list[Flags]:
    """What ``grFactor``, ``nChannels`` and ``growthRate`` may be: only their products show, so that a common factor is open."""
    common = math.gcd(*stem)
    lowest = [channels // common for channels in stem]
    s, new_channels = next(iter(first_growth.items()))
    growth, remainder = divmod(new_channels, lowest[s])
    if remainder:
        raise _not_released(f"{new_channels} new channels at scale {s} do not go with {stem} channels in the first layer")
    return [
        {"grFactor": tuple(m * f for f in lowest), "nChannels": common // m, "growthRate": growth // m}
        for m in range(1, math.gcd(common, growth) + 1)
        if common % m == 0 and growth % m == 0
    ]


def _bottleneck_factors(
    inner: list[tuple[int, int, int, int]], growth_factors: tuple[int, ...], given: tuple[int, ...] | None
) -> tuple[int, ...]:
    """``bnFactor``: as given if it fits, otherwise that of ``grFactor`` (as published) at every scale where it fits."""

    def fits(scale: int, factor: int) -> bool:
        return all(width == min(c_in, factor * c_out) for s, c_in, width, c_out in inner if s == scale)

    if given is not None and len(given) == len(growth_factors) and all(fits(s, f) for s, f in enumerate(given)):
        return given
    factors = []
    for s, growth_factor in enumerate(growth_factors):
        # A 1x1 convolution as wide as its input only says that the factor is at least so much.
        smallest = max((math.ceil(width / c_out) for scale, _, width, c_out in inner if scale == s), default=1)
        factors.append(growth_factor if fits(s, growth_factor) else smallest)
    return tuple(factors)


def _reductions(transitions: list[tuple[int, int, int]], growth_factors: tuple[int, ...], given: float | None) -> list[float]:
    """``reduction`` of these transitions, as given or 0.5 (as published) if it fits, otherwise the one with the fewest decimals."""
    guesses = [r for r in (given, 0.5) if r is not None]
    if not transitions:
        return list(dict.fromkeys([*guesses, 0.0]))
    if any(channels % growth_factors[s] for s, *widths in transitions for channels in widths):
        return []
    widths = {(c_in // growth_factors[s], c_out // growth_factors[s]) for s, c_in, c_out in transitions}
    lowest = max(c_out / c_in for c_in, c_out in widths)
    guesses += [math.ceil(lowest * 10**digits) / 10**digits for digits in range(17)]
    return [r for r in guesses if 0 < r <= 1 and all(math.floor(r * c_in) == c_out for c_in, c_out in widths)][:1]
