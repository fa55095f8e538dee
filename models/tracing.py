"""The graphs of a network, and the code of its segments, with ``torch.fx``.

A network is traced twice, in training and in evaluation mode, as a trace fixes the value of
``self.training``. Every module call is recorded with the node of its output, so that a cut can be named by
the path of a module. A segment is the code between two cuts. It is a plain function ``(root, x) -> y`` that
runs the modules of ``root.network``: the segments own no modules and no parameters.

Example:
    network = torchvision.models.resnet18().eval()
    traces = trace_both_modes(network)
    end = {mode: trace.outputs["layer1"] for mode, trace in traces.by_mode.items()}
    segment = make_segment(None, end, traces)  # from the images to the output of layer1
    run = segment.function("evaluation")
    y = run(TracedRoot(network), torch.randn(2, 3, 224, 224))  # (2, 64, 56, 56)
"""

import math
import operator
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .errors import first_line
from .locks import TRACING
from .module_state import Snapshot, meta_copy

PREFIX = "network."  # the traced network is the attribute ``network`` of the root
MODES = ("evaluation", "training")
PROBE_SIZES = (224, 64, 128, 256, 32, 28, 96, 160, 192, 240, 288, 299, 320, 384, 448, 512, 518)  # pixels
PROBE_BATCH = 2
DRAWS = "draws random numbers that a trace would fix; use nn.Dropout or torch.rand_like(x)"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Their subclasses are leaves too, such as timm's: what they add must not hide what they are.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
LAYERS = (*WEIGHTED, *NORMS)


class TracedRoot(nn.Module):
    """A module around a network, so that the other arguments of the network take their defaults.

    Args:
        network: The network.
        constants: Tensors that tracing made, by name.
    """

    def __init__(self, network: nn.Module, constants: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.network = network
        for name, tensor in (constants or {}).items():
            setattr(self, name, tensor)

    def forward(self, images: Tensor) -> Any:
        """Run the network."""
        return self.network(images)


@dataclass
class Trace:
    """A graph of a network in one mode.

    Attributes:
        graph: Graph whose only placeholder is the images.
        outputs: Node of the output of every module that was called once and returned one value, by path.
        repeated: Paths of modules that were called more than once.
        leaves: Paths of the modules that were not traced into.
        owners: Path of the innermost module in which a node was made.
        batch_sizes: Nodes that read the number of images from the images.
    """

    graph: fx.Graph
    outputs: dict[str, fx.Node]
    repeated: set[str]
    leaves: set[str]
    owners: dict[fx.Node, str]
    batch_sizes: set[fx.Node] = field(init=False)
    _positions: dict[fx.Node, int] = field(init=False)
    _last_uses: dict[fx.Node, int] = field(init=False)
    _from_images: set[fx.Node] = field(init=False)

    def __post_init__(self):
        self.batch_sizes = _batch_sizes(self.images)
        self._positions = {node: i for i, node in enumerate(self.graph.nodes)}
        self._last_uses, self._from_images = {}, {self.images}
        for node in self.graph.nodes:
            users = [user for user in node.users if user not in self.batch_sizes]
            self._last_uses[node] = max(map(self.position, users), default=-1)
            is_in_place = node.op == "call_method" and node.target.endswith("_")
            reads_images = not self._from_images.isdisjoint(node.all_input_nodes)
            if node not in self.batch_sizes and (reads_images or is_in_place):
                self._from_images.add(node)

    @property
    def images(self) -> fx.Node:
        """The placeholder of the graph."""
        return next(node for node in self.graph.nodes if node.op == "placeholder")

    def position(self, node: fx.Node) -> int:
        """Return the position of a node in the order of the graph."""
        return self._positions[node]

    def is_from_images(self, node: fx.Node) -> bool:
        """Return whether a value depends on the images, or on a change in place, which has to run once.

        Every segment computes all other values again.
        """
        return node in self._from_images

    def crossing(self, node: fx.Node) -> list[fx.Node]:
        """Return the values that depend on the images, are computed up to ``node`` and used after it."""
        cut = self._positions[node]
        return [
            other
            for other, position in self._positions.items()
            if position <= cut and self._last_uses[other] > cut and self.is_from_images(other)
        ]

    def name(self, node: fx.Node) -> str:
        """Return a name of a value that a person can find in the network."""
        if node.op == "placeholder":
            return "the images"
        if node.op == "call_module":
            return str(node.target).removeprefix(PREFIX)
        owner = self.owners.get(node, "")
        return f"{node.name} in {owner}" if owner else node.name


@dataclass
class Traces:
    """The graphs of a network in both modes, and the tensors that tracing made.

    Attributes:
        by_mode: Trace of every mode, ``evaluation`` and ``training``.
        constants: Tensors that the network made while it was traced, by name.
    """

    by_mode: dict[str, Trace]
    constants: dict[str, Tensor]

    @property
    def evaluation(self) -> Trace:
        """The trace of evaluation mode."""
        return self.by_mode["evaluation"]


def _batch_sizes(images: fx.Node) -> set[fx.Node]:
    """Return the nodes that read the number of images, and those of shapes that are read for nothing else."""
    calls = {user for user in images.users if user.target == "size"}
    sizes = {call for call in calls if call.args[1:] == (0,) or call.kwargs.get("dim") == 0}
    shapes = {call for call in calls if not call.args[1:] and not call.kwargs}
    shapes |= {user for user in images.users if user.target is getattr and user.args[1] == "shape"}
    for shape in shapes:
        sizes |= {user for user in shape.users if user.target is operator.getitem and user.args[1] == 0}
    return sizes | {shape for shape in shapes if sizes.issuperset(shape.users)}


def trace_both_modes(network: nn.Module) -> Traces:
    """Trace a network in both modes; its modules keep their modes and attributes.

    Raises:
        ValueError: ``torch.fx`` cannot trace it.
    """
    name = type(network).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ValueError(f"torch.fx cannot trace {name}: it is, or holds, a TorchScript module")
    root = TracedRoot(network)
    by_mode = {}
    for mode in MODES:
        for _ in range(num_attempts()):
            random_states = _random_states()
            by_mode[mode] = _trace(root, mode)
            if _random_states() == random_states:
                break
        else:
            raise ValueError(f"the forward method of {name} {DRAWS}")
    constants = {
        name: value
        for name, value in (*vars(root).items(), *root.named_buffers(recurse=False))
        if name.startswith("_tensor_constant")
    }
    if any(value.requires_grad for value in constants.values()):
        raise ValueError(
            f"the forward method of {name} computes with parameters in a way that a trace does not record, "
            "such as a loop over parameters(); read them as attributes"
        )
    return Traces(by_mode, constants)


def num_attempts() -> int:
    """Return how often to try what fails if random numbers are drawn meanwhile: other threads may do that."""
    return 3 if threading.active_count() > 1 else 1


def _trace(root: TracedRoot, mode: str) -> Trace:
    """Trace the network of ``root`` in one mode; for errors see ``trace_both_modes``."""
    network, name = root.network, type(root.network).__name__
    with set_mode(network, mode):
        before = Snapshot(network)
        try:
            with TRACING, _RefusesToDraw():
                trace = _Tracer().run(root)
        except _DrawsError:
            raise ValueError(f"the forward method of {name} {DRAWS}") from None
        except Exception as error:  # any code of the network can fail on a proxy
            raise ValueError(f"torch.fx cannot trace {name}: {first_line(error):.200}") from error
        finally:
            changed = before.first_change()
            before.restore()
    if changed is not None:
        raise ValueError(
            f"the forward method of {name} changes {changed}, which a trace does not record; let it be a "
            "buffer and change it in place, such as self.count.add_(1)"
        )
    return trace


class _Tracer(fx.Tracer):
    """A tracer whose leaves are the modules of torch.nn, of torchvision.ops and of timm's own list."""

    # Buffers are read when the network runs: loading weights and training change them.
    proxy_buffer_attributes = True

    def __init__(self):
        modules, functions = _timm_leaves()
        operations = sys.modules.get("torchvision.ops")
        super().__init__(
            autowrap_modules=(math,) if operations is None else (math, operations),
            autowrap_functions=functions,
        )
        self._leaf_types = modules
        self._open: list[str] = []

    def run(self, root: TracedRoot) -> Trace:
        self._outputs: dict[str, fx.Node] = {}
        self._repeated: set[str] = set()
        self._leaves: set[str] = set()
        self._owners: dict[fx.Node, str] = {}
        self._autocast_depth, self._thread = _autocast_depth(), threading.get_ident()
        # Whatever the caller's mode is: the forward method may switch gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            graph = self.trace(root)
        return Trace(graph, self._outputs, self._repeated, self._leaves, self._owners)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, CONTAINERS):
            return False
        if isinstance(m, LAYERS):
            return True
        is_operation = type(m).__module__.startswith("torchvision.ops.") and not list(m.children())
        return is_operation or type(m) in self._leaf_types or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m).removeprefix(PREFIX)
        self._open.append(path)
        if self.is_leaf_module(m, path):
            self._leaves.add(path)
        result = super().call_module(m, forward, args, kwargs)
        self._open.pop()
        if path in self._outputs:
            self._repeated.add(path)
        if isinstance(result, fx.Proxy):
            self._outputs[path] = result.node
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise ValueError(
                "its forward method switches gradients off, which a trace does not record; use "
                "requires_grad_(False) or, to update a buffer, self.mean.add_(x.detach())"
            )
        if _autocast_depth() != self._autocast_depth:
            raise ValueError(
                "its forward method uses torch.autocast, which a trace does not record; use it "
                "around the whole network only"
            )
        node = super().create_node(*args, **kwargs)
        if self._open:
            self._owners[node] = self._open[-1]
        return node


def _autocast_depth() -> int:
    """Return how many blocks of ``torch.autocast`` are open, also of those that switch it off."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth


def _timm_leaves() -> tuple[frozenset[type], tuple[Callable[..., Any], ...]]:
    timm_models = sys.modules.get("timm.models")  # not loaded: the network has no part of timm
    if timm_models is None:
        return frozenset(), ()
    return frozenset(timm_models.get_notrace_modules()), tuple(timm_models.get_notrace_functions())


@contextmanager
def set_mode(network: nn.Module, mode: str) -> Iterator[None]:
    """Set the mode of all modules, one of ``MODES``; afterwards each has its own again."""
    flags = {module: module.training for module in network.modules()}
    network.train(mode == "training")
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


class _DrawsError(Exception):
    """A forward method draws random numbers while it is traced."""


class _RefusesToDraw(TorchDispatchMode):
    """Lets no operation that is not recorded draw random numbers that change from pass to pass."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True imports PyTorch's compiler, which keeps methods of ``nn.Module``, while torch.fx replaces them.
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_random = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        if is_random and not _is_freshly_seeded((kwargs or {}).get("generator")):
            raise _DrawsError
        return function(*args, **(kwargs or {}))


def _is_freshly_seeded(generator: torch.Generator | None) -> bool:
    """Return True if a generator gives the same numbers in every pass, as one that a forward method seeds."""
    if generator is None:
        return False
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    return torch.equal(generator.get_state(), fresh.get_state())


def _random_states() -> list[Any]:
    """Return the states of the generators of Python and NumPy, which all threads share."""
    states: list[Any] = [random.getstate()]
    numpy = sys.modules.get("numpy")  # not loaded: the network does not use it
    if numpy is not None:
        _, key, position, *_ = numpy.random.get_state()
        states += [key.tolist(), position]
    return states


class Segment:
    """The code between two cuts: ``function(mode)(root, x)``.

    These are plain functions of the root: an ``fx.GraphModule`` would register the network's modules again,
    under second names in the state dict. torchvision's ``create_feature_extractor`` makes one, from the
    images on only.

    The graphs are not changed after this, so copies of a network share their segments.

    Args:
        graphs: Graph of every mode, of ``MODES``; a folded network has none for training.
    """

    def __init__(self, graphs: Mapping[str, fx.Graph]):
        self.graphs = graphs
        self._functions = {mode: _compiled(graph) for mode, graph in graphs.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Segment":
        return self

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError("a Backbone cannot be pickled: save its state_dict()")

    def function(self, mode: str) -> Callable[[nn.Module, Tensor], Tensor]:
        """Return the code of a mode.

        Raises:
            RuntimeError: A folded network has no training mode.
        """
        if mode not in self._functions:
            raise RuntimeError("a folded network cannot be trained")
        return self._functions[mode]


def make_segment(start: str | None, end: dict[str, fx.Node], traces: Traces) -> Segment:
    """Return the segment between two cuts.

    Args:
        start: Path of the module whose output it takes. If None, the images.
        end: Node of its result in every mode.
        traces: Both traces of the network.
    """
    graphs = {}
    for mode, trace in traces.by_mode.items():
        first = trace.images if start is None else trace.outputs[start]
        graphs[mode] = _between(trace, first, end[mode])
    return Segment(graphs)


def with_cloned_input(segment: Segment) -> Segment:
    """Return a segment that copies its input first, for one that begins with an in-place operation."""
    graphs = {}
    for mode, graph in segment.graphs.items():
        new = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            values[node] = new.node_copy(node, values.__getitem__)
            if node.op == "placeholder":
                values[node] = new.call_method("clone", (values[node],))
        graphs[mode] = new
    return Segment(graphs)


def _between(trace: Trace, first: fx.Node, last: fx.Node) -> fx.Graph:
    """Return the graph that computes ``last`` from ``first``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    values = {first: x}

    def value(node: fx.Node) -> fx.Node:
        # What depends on no image may have been computed long before: every segment computes its own.
        if node not in values and node in trace.batch_sizes:
            values[node] = graph.call_method("size", (x, 0))
        elif node not in values and not trace.is_from_images(node):
            values[node] = graph.node_copy(node, value)
        return values[node]

    begin, end = trace.position(first), trace.position(last)
    for node in trace.graph.nodes:
        is_local = node.op in ("get_attr", "output") or node in trace.batch_sizes
        if begin < trace.position(node) <= end and not is_local:
            values[node] = graph.node_copy(node, value)
    graph.output(value(last))
    return graph


def _compiled(graph: fx.Graph) -> Callable[[nn.Module, Tensor], Tensor]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<segment of a network>", "exec"), namespace)
    return namespace["forward"]


@dataclass
class GraphProfile:
    """Shape and multiply-adds of every node of a graph, for images of one size.

    Attributes:
        shapes: Shape of every node that is one tensor, for a batch of ``PROBE_BATCH`` images.
        operations_up_to: Multiply-adds per image of all nodes up to and including a node.
        operations_of: Multiply-adds per image of the node alone.
    """

    shapes: dict[fx.Node, tuple[int, ...]]
    operations_up_to: dict[fx.Node, int]
    operations_of: dict[fx.Node, int]


class _Profiler(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph, counter: FlopCounterMode):
        super().__init__(root, graph=graph)
        self.counter = counter
        self.profile = GraphProfile({}, {}, {})

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        after = self.counter.get_total_flops()
        self.profile.operations_up_to[n] = after // (2 * PROBE_BATCH)
        self.profile.operations_of[n] = (after - before) // (2 * PROBE_BATCH)
        if isinstance(value, Tensor):
            self.profile.shapes[n] = tuple(value.shape)
        return value


def profile_graph(network: nn.Module, traces: Traces, image_size: int | None) -> dict[int, GraphProfile]:
    """Run the evaluation graph on the meta device, and profile it for two image sizes, or the only one.

    Args:
        network: The traced network.
        traces: Graphs of the network.
        image_size: A size to try first.

    Raises:
        ValueError: The network runs with none of the usual sizes.
    """
    # Without gradients: the counter hooks into them, and cannot where modules read views of parameters.
    constants = {name: tensor.to("meta") for name, tensor in traces.constants.items()}
    root = TracedRoot(meta_copy(network).eval().requires_grad_(False), constants)
    profiles, reason = {}, ""
    for size in dict.fromkeys((*([] if image_size is None else [image_size]), *PROBE_SIZES)):
        images = probe_images(root, size)
        counter = FlopCounterMode(display=False)
        profiler = _Profiler(root, traces.evaluation.graph, counter)
        try:
            with TRACING, torch.no_grad(), counter:
                profiler.run(images)
        except Exception as error:  # on images of a wrong size a network can raise any exception
            reason = reason or first_line(error)
            continue
        profiles[size] = profiler.profile
        if len(profiles) == 2:
            break
    if not profiles:
        raise ValueError(
            f"{type(network).__name__} does not run on colour images of any usual size ({reason:.150})"
            + ("; say image_size=" if image_size is None else "")
        )
    return profiles


def probe_images(network: nn.Module, size: int) -> Tensor:
    """Return images of zeros (PROBE_BATCH, 3, size, size), of the dtype and on the device of a network."""
    weights = next((x for x in network.parameters() if x.is_floating_point()), torch.empty(0))
    return torch.zeros(PROBE_BATCH, 3, size, size, device=weights.device, dtype=weights.dtype)
