"""Where a network is cut: the places of its exits, and the segments between them.

Example:
    network = torchvision.models.resnet18()
    traces = trace_both_modes(network)
    cuts = find_cuts(network, traces, profile_graph(network, traces, 224), exits=4)
    cuts.paths, cuts.layouts     # ["layer1.0", "layer2", "layer3"], ["NCHW", "NCHW", "NCHW"]
"""

import difflib
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

from torch import fx, nn

from .tracing import (
    CONTAINERS,
    LAYERS,
    NORMS,
    PREFIX,
    PROBE_BATCH,
    WEIGHTED,
    GraphProfile,
    Segment,
    Trace,
    Traces,
    make_segment,
)

LAYOUTS = ("NCHW", "NHWC", "NLC", "NCL", "NC")
# Layouts by the number of dimensions and the dimension of the channels.
LAYOUT_BY_CHANNELS = {(3, 1): "NCL", (3, 2): "NLC", (4, 1): "NCHW", (4, 3): "NHWC"}
_UNCHANGING = (nn.Identity, nn.Flatten)  # may follow the last linear layer


class Cuts(NamedTuple):
    """The places where a network is cut, and the code between them.

    Attributes:
        classifier: Path of the last linear layer, which is the classifier of the last exit.
        paths: Paths of the modules whose outputs the early exits read.
        shapes: Shapes of these outputs, for ``PROBE_BATCH`` images.
        layouts: Layouts of these outputs, of ``LAYOUTS``.
        segments: Segments from the images to the input of the last linear layer, one per exit.
    """

    classifier: str
    paths: list[str]
    shapes: list[tuple[int, ...]]
    layouts: list[str]
    segments: list[Segment]


def find_cuts(
    network: nn.Module,
    traces: Traces,
    profiles: dict[int, GraphProfile],
    exits: Sequence[str] | int,
    layout: str | Sequence[str] | None = None,
) -> Cuts:
    """Find where to cut a network for exits.

    Args:
        network: Network that ends in an ``nn.Linear``.
        traces: Graphs of the network.
        profiles: Its profiles by image size; the first one is of the size that matters.
        exits: Paths of modules, or the number of all exits, as for ``Backbone``.
        layout: One of ``LAYOUTS``, or one per early exit. If None, that of the shapes.

    Raises:
        ValueError: The network has no last linear layer, or cannot be cut there; one line says which.
    """
    first_profile = next(iter(profiles.values()))
    _check_not_tiny(network, traces.evaluation, profiles)
    classifier, ends = _last_linear(network, traces, first_profile)
    if isinstance(exits, Integral):
        paths = _even_paths(network, traces, profiles, exits, has_layout=layout is not None)
    elif isinstance(exits, str) or not all(isinstance(path, str) for path in exits):
        raise ValueError(
            f"exits is {exits!r}; give paths of modules, such as ['layer1', 'layer2'], or a number of exits"
        )
    else:
        paths = _checked_paths(network, traces, list(exits), ends)
    layouts = _layouts(traces, profiles, paths, layout)
    shapes = [first_profile.shapes[traces.evaluation.outputs[path]] for path in paths]
    for path, shape, given in zip(paths, shapes, layouts, strict=True):
        if len(shape) != len(given) or shape[0] != PROBE_BATCH:
            raise ValueError(
                f"layout {given!r} does not fit the output of {path!r}, which has the shape {shape}"
            )
    return Cuts(classifier, paths, shapes, layouts, _segments(traces, paths, ends))


def _check_not_tiny(network: nn.Module, trace: Trace, profiles: dict[int, GraphProfile]) -> None:
    """Raise ValueError if the network's first block makes one pixel of images, but not of larger ones."""
    (size, profile), *others = profiles.items()
    blocks = {trace.outputs[path]: path for path in _block_paths(network, trace, {}, 0)}
    first = next((node for node in trace.graph.nodes if node in blocks and _is_map(profile, node)), None)
    if first is None or not _is_one_pixel(profile, first):
        return
    if any(larger > size and not _is_one_pixel(other, first) for larger, other in others):
        raise ValueError(
            f"images of {size} pixels are too small: {blocks[first]}, the first block of "
            f"{type(network).__name__}, makes one pixel of them"
        )


def _is_map(profile: GraphProfile, node: fx.Node) -> bool:
    return len(profile.shapes.get(node, ())) == 4


def _is_one_pixel(profile: GraphProfile, node: fx.Node) -> bool:
    shape = profile.shapes[node]
    return math.prod(shape[1:]) == max(shape[1:])


def _last_linear(network: nn.Module, traces: Traces, profile: GraphProfile) -> tuple[str, dict[str, fx.Node]]:
    """Return the path of the network's last linear layer, and the node of its input in both modes."""
    name = type(network).__name__
    last_nodes = {}
    for mode, trace in traces.by_mode.items():
        node = next(node for node in reversed(trace.graph.nodes) if node.op == "output").args[0]
        while _is_unchanging(network, node):
            (node,) = node.all_input_nodes
        if not _is_linear(network, node):
            output = trace.name(node) if isinstance(node, fx.Node) else "several values"
            raise ValueError(
                f"{name} does not end in an nn.Linear, which the last exit needs: "
                f"its output in {mode} mode is {output}"
            )
        last_nodes[mode] = node
    paths = {node.target.removeprefix(PREFIX) for node in last_nodes.values()}
    if len(paths) > 1:
        raise ValueError(f"{name} ends in other linear layers in training: {' and '.join(sorted(paths))}")
    (path,) = paths
    shape = profile.shapes[last_nodes["evaluation"]]
    if len(shape) != 2:
        raise ValueError(
            f"{name} ends in {path}, whose output is {shape} for {PROBE_BATCH} images, not (N, C)"
        )
    ends = {}
    for mode, node in last_nodes.items():
        (ends[mode],) = node.all_input_nodes
    return path, ends


def _module_of(network: nn.Module, node: Any) -> nn.Module | None:
    is_call = isinstance(node, fx.Node) and node.op == "call_module" and node.target.startswith(PREFIX)
    return network.get_submodule(node.target.removeprefix(PREFIX)) if is_call else None


def _is_unchanging(network: nn.Module, node: Any) -> bool:
    return isinstance(_module_of(network, node), _UNCHANGING)


def _is_linear(network: nn.Module, node: Any) -> bool:
    return isinstance(_module_of(network, node), nn.Linear)


def _refusal(traces: Traces, path: str, ends: dict[str, fx.Node] | None = None) -> str | None:
    """Return why no exit can be at the output of a module, None if one can."""
    for mode, trace in traces.by_mode.items():
        if path in trace.repeated:
            return "the network runs it more than once"
        leaf = next((leaf for leaf in trace.leaves if path.startswith(f"{leaf}.")), None)
        if leaf is not None:
            return _not_traced(leaf)
        if path not in trace.outputs:
            return "the network does not run it, or its output is not one tensor"
        node = trace.outputs[path]
        crossing = [other for other in trace.crossing(node) if other is not node]
        if crossing:
            names = ", ".join(map(trace.name, [node, *crossing]))
            return f"{len(crossing) + 1} values cross a cut there ({names}), and only one may"
        if ends and trace.position(node) >= trace.position(ends[mode]):
            return "nothing but the last linear layer comes after it"
    return None


def _not_traced(leaf: str) -> str:
    return f"torch.fx does not look into {leaf!r}; call its layers one by one in the forward method"


def _checked_paths(
    network: nn.Module, traces: Traces, paths: list[str], ends: dict[str, fx.Node]
) -> list[str]:
    """Return ``paths`` if exits can be there, else raise ValueError."""
    if not paths:
        raise ValueError("exits is empty: name at least one module, or give a number of exits")
    known = {name for name, _ in network.named_modules() if name}
    for path in paths:
        if path not in known:
            raise ValueError(_unknown_exit(network, traces, path, ends))
        reason = _refusal(traces, path, ends)
        if reason:
            raise ValueError(f"no exit can be at {path!r}: {reason}")
    by_position: dict[int, str] = {}
    for path in paths:
        position = traces.evaluation.position(traces.evaluation.outputs[path])
        if position in by_position:
            raise ValueError(f"the exits {by_position[position]!r} and {path!r} are the same place")
        by_position[position] = path
    in_order = [by_position[position] for position in sorted(by_position)]
    if in_order != paths:
        raise ValueError(f"exits must be in the network's order: {', '.join(in_order)}")
    return paths


def _unknown_exit(network: nn.Module, traces: Traces, path: str, ends: dict[str, fx.Node]) -> str:
    blocks = _block_paths(network, traces.evaluation, {}, 0)
    places = [name for name in traces.evaluation.outputs if _refusal(traces, name, ends) is None]
    near = difflib.get_close_matches(path, places, 3) or [block for block in blocks if block in places]
    listed = ", ".join(near[:20]) + (", ..." if len(near) > 20 else "")
    return f"there is no module {path!r} in {type(network).__name__}; exits can be at: {listed}"


def _even_paths(
    network: nn.Module, traces: Traces, profiles: dict[int, GraphProfile], count: int, has_layout: bool
) -> list[str]:
    """Return the paths of ``count`` - 1 early exits that spread the operations evenly.

    Unless the layout is given (``has_layout``), they are where the shapes tell it.
    """
    trace, profile = traces.evaluation, next(iter(profiles.values()))
    total = max(profile.operations_up_to.values())
    if count < 2:
        raise ValueError(
            f"exits is {count}; at least 2 are needed, of which the last is the network's own end"
        )
    candidates: dict[fx.Node, str] = {}
    blocks = _block_paths(network, trace, profile.operations_of, total // count)
    # A plain chain of layers has no blocks: there, exits can be after activations and pooling.
    refusal = ""
    for path in [*blocks, *(_layer_outputs(network, trace) if len(blocks) < count else [])]:
        node = trace.outputs[path]
        reason = _refusal(traces, path)
        if reason and not refusal:
            refusal = f"none can be at {path!r}: {reason}"
        shape = profile.shapes.get(node, ())
        is_readable = (
            len(shape) in (3, 4)
            and shape[0] == PROBE_BATCH
            and (has_layout or _layout_at(node, profiles) is not None)
        )
        if reason is None and is_readable and not _comes_before_norm(network, node):
            candidates.setdefault(node, path)
    # An exit that comes with the last operations saves nothing.
    nodes = [node for node in trace.graph.nodes if node in candidates]
    nodes = [node for node in nodes if 0 < profile.operations_up_to[node] < (1 - 0.5 / count) * total]
    if len(nodes) < count - 1:
        largest = max(profile.operations_of, key=profile.operations_of.__getitem__)
        module = _module_of(network, largest)
        if module is not None and list(module.children()) and profile.operations_of[largest] > total / 2:
            refusal = _not_traced(trace.name(largest))
        raise ValueError(
            f"exits is {count}; {type(network).__name__} has places for {len(nodes) + 1} at most: "
            f"{', '.join(candidates[node] for node in nodes) or 'its end'}"
            + (f"; {refusal}" if refusal else "")
        )
    shares = [profile.operations_up_to[node] / total for node in nodes]
    return [candidates[nodes[i]] for i in _evenly_spread(shares, count - 1)]


def _comes_before_norm(network: nn.Module, node: fx.Node) -> bool:
    """Return whether only normalisation layers read the output of this layer: they belong together."""
    is_layer = isinstance(_module_of(network, node), WEIGHTED) and bool(node.users)
    return is_layer and all(isinstance(_module_of(network, user), NORMS) for user in node.users)


def _block_paths(
    network: nn.Module, trace: Trace, operations_of: dict[fx.Node, int], limit: int
) -> list[str]:
    """Return the paths of the network's own blocks, outermost first.

    Containers are always opened, other modules only if they hold more than ``limit`` operations.
    """
    paths: list[str] = []

    def operations_in(path: str) -> int:
        return sum(
            count
            for node, count in operations_of.items()
            if f"{trace.owners.get(node, '')}.".startswith(f"{path}.")
        )

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path in trace.leaves and not list(child.children()):  # a layer, not a block
                continue
            if path in trace.outputs and any(isinstance(layer, WEIGHTED) for layer in child.modules()):
                paths.append(path)
            if path not in trace.leaves and (isinstance(child, CONTAINERS) or operations_in(path) > limit):
                visit(child, f"{path}.")

    visit(network, "")
    return paths


def _layer_outputs(network: nn.Module, trace: Trace) -> list[str]:
    """Return the paths of the layers without weights, such as activations, in the order of the network."""
    layers = [path for path in trace.outputs if path in trace.leaves and path not in trace.repeated]
    return [path for path in layers if not isinstance(network.get_submodule(path), LAYERS)]


def _evenly_spread(shares: list[float], count: int) -> list[int]:
    """Return the indices of ``count`` increasing ``shares``, each near its multiple of 1 / (count + 1)."""
    chosen: list[int] = []
    for j in range(1, count + 1):
        allowed = range(chosen[-1] + 1 if chosen else 0, len(shares) - (count - j))
        chosen.append(min(allowed, key=lambda i, goal=j / (count + 1): abs(shares[i] - goal)))
    return chosen


def _layouts(
    traces: Traces, profiles: dict[int, GraphProfile], paths: list[str], given: str | Sequence[str] | None
) -> list[str]:
    """Return the layout that every early exit reads: the one that is ``given``, else that of the shapes."""
    if given is not None:
        layouts = [given] * len(paths) if isinstance(given, str) else list(given)
        if len(layouts) != len(paths) or any(layout not in LAYOUTS for layout in layouts):
            raise ValueError(
                f"layout is {given!r}; allowed: {', '.join(LAYOUTS)}, one for all {len(paths)} early exits "
                "or one for each"
            )
        return layouts
    layouts = []
    for path in paths:
        node = traces.evaluation.outputs[path]
        try:
            layouts.append(_find_layout(_shapes_at(node, profiles)))
        except ValueError as error:
            raise ValueError(f"no exit can be at {path!r}: {error}") from None
    return layouts


def _shapes_at(node: fx.Node, profiles: dict[int, GraphProfile]) -> list[tuple[int, ...]]:
    return [profile.shapes.get(node, ()) or (0,) for profile in profiles.values()]


def _layout_at(node: fx.Node, profiles: dict[int, GraphProfile]) -> str | None:
    """Return the layout of a tensor, None if its shapes do not tell."""
    try:
        return _find_layout(_shapes_at(node, profiles))
    except ValueError:
        return None


def _find_layout(shapes: list[tuple[int, ...]]) -> str:
    """Return where the channels are in a tensor: "NCHW", "NHWC", "NLC" (tokens), "NCL" or "NC".

    Args:
        shapes: Shapes of one tensor for images of one or two sizes. The channels are the dimension that does
            not change.

    Raises:
        ValueError: The shapes do not tell.
    """
    shape = shapes[0]
    if shape[0] != PROBE_BATCH or not 2 <= len(shape) <= 4:
        raise ValueError(
            f"it has the shape {shape} for {PROBE_BATCH} images, and no exit can read that: exits read maps "
            "(N, C, H, W) or (N, H, W, C) and tokens (N, L, C)"
        )
    if len(shape) == 2:
        return "NC"
    fixed = [d for d in range(1, len(shape)) if all(other[d] == shape[d] for other in shapes)]
    if len(shapes) == 1 or (len(fixed) != 1 and len(shape) == 4):
        fixed = _guessed_channels(shape)
    if len(fixed) != 1:
        raise ValueError(
            f"its channels cannot be told from the shapes {' and '.join(map(str, shapes))}: pass layout="
        )
    layout = LAYOUT_BY_CHANNELS.get((len(shape), fixed[0]))
    if layout is None:
        raise ValueError(
            f"its channels are in the middle of the shapes {' and '.join(map(str, shapes))}: pass layout="
        )
    return layout


def _guessed_channels(shape: tuple[int, ...]) -> list[int]:
    """Return the dimension of the channels for one image size: after tokens, or beside a square."""
    if len(shape) == 3:
        return [2]
    return [d for d, (a, b) in {1: (2, 3), 3: (1, 2)}.items() if shape[a] == shape[b] != shape[d]]


def _segments(traces: Traces, paths: list[str], ends: dict[str, fx.Node]) -> list[Segment]:
    """Return the segments from the images over all ``paths`` to the input of the last linear layer."""
    segments = []
    for k in range(len(paths) + 1):
        start = paths[k - 1] if k else None
        end = ends
        if k < len(paths):
            end = {mode: trace.outputs[paths[k]] for mode, trace in traces.by_mode.items()}
        segments.append(make_segment(start, end, traces))
    return segments
