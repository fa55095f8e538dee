"""Exits with Gradient Equilibrium on any network that ``torch.fx`` can trace.

Example:
    network = Backbone(torchvision.models.resnet18(), exits=["layer1", "layer2", "layer3"], num_classes=100)
    logits = network(torch.randn(8, 3, 224, 224))  # a list of 4 tensors (8, 100)

The network is cut at the outputs of the named modules (``models.cutting``). At every cut an exit reads the
one tensor that crosses it (``models.backbone_exits``): maps go through convolution, BatchNorm, ReLU, average
pooling and a linear layer; tokens through LayerNorm, their mean and a linear layer. The last exit is the
network's own last linear layer. ``build_backbone`` does so for networks of torchvision and timm by their
names.
"""

import copy
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from .backbone_exits import check_exit_options, make_exit
from .cutting import Cuts, find_cuts
from .equivalence import check_segments
from .errors import first_line
from .layers import add_boost
from .module_state import (
    checkpoint_contexts,
    frozen_statistics,
    has_finite_weights,
    is_expanded,
    load_tensors,
    meta_copy,
    set_memory_format,
)
from .network import CannotBuildError, ExitNetwork, Fuse, State, checked_num_exits, fold_sequences
from .third_party import (
    Constructor,
    check_backbone,
    construct,
    options_of_weights,
    split_name,
    weights_of,
)
from .tracing import (
    MODES,
    PREFIX,
    PROBE_BATCH,
    GraphProfile,
    Segment,
    probe_images,
    profile_graph,
    trace_both_modes,
    with_cloned_input,
)


class Backbone(ExitNetwork):
    """A network with exits at the outputs of some of its modules, and its own end as the last exit.

    Args:
        network: Takes images (N, 3, H, W) and ends in an ``nn.Linear``. It becomes part of this one, and is
            not copied: a new last layer stays in it. Hooks of its layers run; of hooks of modules that
            hold others, only the operations of those registered before are kept.
        exits: Paths of modules, in the order in which the network runs them; or the number of all exits.
            Then the early ones are put at the network's own blocks such that operations are spread evenly.
        num_classes: None keeps the network's own. Another number replaces its last linear layer.
        boosted_exits: An exit adds half of the previous exit's logits to its own.
        gradient_equilibrium: Rescale gradients at the exits.
        layout: One of ``models.cutting.LAYOUTS``, or one per early exit, where shapes are ambiguous.
        image_size: Height and width in pixels of the images it will see: a number of exits is spread evenly
            for this size (224 if None and possible).
        exit_width: Channels of the convolution of exits on maps (128 as in MSDNet). If None, as many as the
            map has, but at least 128 and at most 512.
        exit_size: Exits first average maps of at least twice this many pixels a side to about this size. If
            None, they average none.
        frozen: Train only the exits, and the last linear layer if it is new.
        has_new_classifier: Whether the last linear layer is new, and not pretrained as the rest of the
            network is. If None, exactly if it is replaced for ``num_classes``.
        constructor: The constructor that built the network, by which a file can describe it; None for a
            custom network.

    Raises:
        ValueError: The network cannot be traced, has no last linear layer, cannot be cut there, or takes no
            images of ``image_size``; one line says which.
    """

    options_of_older_files: ClassVar = {
        "boosted_exits": False,
        "gradient_equilibrium": True,
        "exit_width": None,
        "exit_size": None,
        "has_new_classifier": None,
    }
    training_options: ClassVar = frozenset({"has_new_classifier"})

    def __init__(
        self,
        network: nn.Module,
        exits: Sequence[str] | int = 4,
        num_classes: int | None = None,
        *,
        boosted_exits: bool = False,
        gradient_equilibrium: bool = True,
        layout: str | Sequence[str] | None = None,
        image_size: int | None = None,
        exit_width: int | None = 128,
        exit_size: int | None = 14,
        frozen: bool = False,
        has_new_classifier: bool | None = None,
        constructor: Constructor | None = None,
    ):
        super().__init__()
        for name, value in network.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{type(network).__name__} has extra state, {name}, which is no tensor to save"
                )
            if is_expanded(value):  # PyTorch cannot load it again
                raise ValueError(
                    f"{name} of {type(network).__name__} has elements that share memory; register a copy, "
                    "such as x.contiguous()"
                )
        check_exit_options(exit_width=exit_width, exit_size=exit_size)
        image_size = None if image_size is None else operator.index(image_size)
        traces = trace_both_modes(network)
        profiles = profile_graph(network, traces, image_size)
        cuts = find_cuts(network, traces, profiles, exits, layout)
        constructor = constructor or Constructor(None, type(network).__name__, {})
        is_custom = constructor.library is None
        if is_custom and not any(x.is_meta for x in network.parameters()):
            check_segments(network, traces, cuts.segments, cuts.classifier, next(iter(profiles)))
        self.network = network
        for name, tensor in traces.constants.items():
            self.register_buffer(name, tensor, persistent=False)
        self._classifier, self._segments = cuts.classifier, cuts.segments
        self._with_2d_output = _targets_with_2d_output(profiles.values())
        self.num_exits = len(cuts.segments)
        own_classifier = network.get_submodule(cuts.classifier)
        # In this order: it decides which random numbers initialise which layer.
        is_replaced = self._replace_classifier(num_classes)
        self.has_new_classifier = is_replaced if has_new_classifier is None else has_new_classifier
        self._add_exits(cuts, exit_width, exit_size)
        self.boosted, self.gradient_equilibrium, self.frozen = boosted_exits, gradient_equilibrium, False
        self._accepted_sizes, self._takes_one_size = set(profiles), len(profiles) == 1
        self._clone_where_needed(next(iter(profiles)))
        self.config = {
            **constructor._asdict(),
            "exits": cuts.paths,
            "num_classes": self.num_classes,
            "boosted_exits": boosted_exits,
            "gradient_equilibrium": gradient_equilibrium,
            "layout": cuts.layouts,
            "image_size": image_size,
            "exit_width": exit_width,
            "exit_size": exit_size,
            "frozen": False,
            "has_new_classifier": self.has_new_classifier,
        }
        if image_size is not None:
            try:
                self.check_image_size(image_size)
            except ValueError:
                self._replace_module(cuts.classifier, own_classifier)  # the caller's network stays as it was
                raise
        if frozen:
            self.freeze_pretrained()

    def _replace_classifier(self, num_classes: int | None) -> bool:
        """Replace the last linear layer, unless it has ``num_classes`` outputs (any if None).

        Returns:
            Whether it was replaced.
        """
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        linear = self.network.get_submodule(self._classifier)
        self.num_classes = linear.out_features if num_classes is None else operator.index(num_classes)
        if self.num_classes == linear.out_features:
            return False
        kind = type(linear)
        # timm's own, which differs only when it is scripted, computes the same.
        is_of_timm = kind.__name__ == "Linear" and kind.__module__.startswith("timm.")
        if not (kind is nn.Linear or is_of_timm) or linear._forward_hooks or linear._forward_pre_hooks:
            raise ValueError(
                f"{self._classifier}, the last layer of {type(self.network).__name__}, is a "
                f"{kind.__name__} with a behaviour of its own, which a new layer would not have; "
                f"build the network with {num_classes} classes"
            )
        new = nn.Linear(linear.in_features, self.num_classes).to(linear.weight)
        self._replace_module(self._classifier, new)
        return True

    def _add_exits(self, cuts: Cuts, exit_width: int | None, exit_size: int | None) -> None:
        """Make the early exits, which read the tensors at the cuts."""
        linear = self.network.get_submodule(self._classifier)
        self.exits = nn.ModuleList(
            make_exit(shape, layout, self.num_classes, exit_width, exit_size)
            for shape, layout in zip(cuts.shapes, cuts.layouts, strict=True)
        ).to(linear.weight)
        early = (exit_module.feature_channels for exit_module in self.exits)
        self.feature_dims = (*early, linear.in_features)

    # Making networks

    @property
    def title(self) -> str:
        """Name of the network without exits."""
        return self.config["name"]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], network: nn.Module | None = None) -> "Backbone":
        """Build the network that ``config`` describes, with new weights, on the CPU.

        A network that is passed keeps its device and dtype.

        Args:
            config: Options, of which ``library`` is torchvision, timm, or None for a custom network. Those
                that an older file lacks are ``options_of_older_files``.
            network: The custom network, needed where ``library`` is None.

        Raises:
            CannotBuildError: The network or its library is missing, or a network was passed for one of a
                library.
            ValueError: The network is unknown, or cannot be cut as it was.
        """
        config = {**cls.options_of_older_files, **config}
        constructor = Constructor(*(config.pop(field) for field in Constructor._fields))
        if network is None and constructor.library is None:
            raise CannotBuildError(
                f"{str(constructor.name)!a:.60} is a custom network; pass it: load(path, network=...)"
            )
        if network is not None and constructor.library is not None:
            raise CannotBuildError(
                f"it is a network of {constructor.library!a:.60}; load it without network="
            )
        with torch.device("cpu"):  # not on the meta device: networks compute constants when they are made
            network = construct(*constructor) if network is None else network
            return cls(network, constructor=constructor, **config)

    def for_classes(self, num_classes: int, same_classes: bool = False) -> "Backbone":
        """Build a network like this one for other classes, with new weights, all trained.

        Its last linear layer counts as new unless the classes are the same, whose weights come with it.

        Raises:
            ValueError: It is a custom network.
        """
        if self.config["library"] is None:
            raise ValueError(
                f"{self.title} is a custom network, which cannot be built again: make a new Backbone"
            )
        new = {"num_classes": num_classes, "frozen": False, "has_new_classifier": not same_classes}
        return self.from_config({**self.config, **new})

    # Inference

    def start(self, images: Tensor) -> State:
        """Return the images: the first segment reads them."""
        return {"x": images}

    def advance(self, k: int, state: State) -> tuple[Tensor, State]:
        """Run segment ``k`` and the exit after it; the state is the tensor at the cut."""
        x = self._segments[k].function("evaluation")(self, state["x"])
        if k == self.num_exits - 1:
            return x, {}
        return self.exits[k].features(x), {"x": x}

    def classify_next(self, k: int, features: Tensor, previous_logits: Tensor | None) -> Tensor:
        """Compute the logits (N, num_classes) of exit ``k``; the last is the network's own linear layer."""
        is_last = k == self.num_exits - 1
        linear = self.network.get_submodule(self._classifier) if is_last else self.exits[k].linear
        logits = linear(features)
        return add_boost(logits, previous_logits) if self.boosted else logits

    # Training

    def features(self, images: Tensor, num_exits: int | None = None) -> list[Tensor]:
        """Return the features (N, feature_dims[k]) of the first ``num_exits`` exits (all if None)."""
        all_features, x = [], images
        for k in range(checked_num_exits(self, num_exits)):
            x = self._run_segment(k, x)
            remaining_exits = self.num_exits - k
            if remaining_exits == 1:
                all_features.append(x)
                break
            x = self.rescale(x, 1 / remaining_exits)
            all_features.append(self.exits[k].features(x))
            x = self.rescale(x, remaining_exits - 1)
        return all_features

    def _run_segment(self, k: int, x: Tensor) -> Tensor:
        mode = "training" if self.training and not self.frozen else "evaluation"
        run = self._segments[k].function(mode)
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return run(self, x)
        # The random state is kept: dropout has to draw the same masks again.
        context_fn = partial(checkpoint_contexts, _named_parts(self, self._segments[k].graphs[mode]))
        return checkpoint(run, self, x, use_reentrant=False, context_fn=context_fn)

    def freeze_pretrained(self) -> None:
        """Train only the exits, and a new last linear layer. The rest stays in evaluation mode."""
        self.frozen = self.config["frozen"] = True
        self.network.requires_grad_(False)
        if self.has_new_classifier:
            self.network.get_submodule(self._classifier).requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode as ``nn.Module.train`` does, but keep a frozen network in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    # Parameters and weights

    def classifier_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters of all linear classifiers."""
        for k, exit_module in enumerate(self.exits):
            for name, parameter in exit_module.linear.named_parameters():
                yield f"exits.{k}.linear.{name}", parameter
        for name, parameter in self.network.get_submodule(self._classifier).named_parameters():
            yield f"{PREFIX}{self._classifier}.{name}", parameter

    def pretrained_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that come from the network itself."""
        new = f"{self._classifier}." if self.has_new_classifier else None
        for name, parameter in self.network.named_parameters():
            if new is None or not name.startswith(new):
                yield parameter

    def load_pretrained(self, weights: dict[str, Tensor], source: str = "the given weights") -> None:
        """Load a state dict of the network without exits, the last linear layer only if all of it fits.

        If not, it counts as new, and is trained even where the rest is frozen.

        Raises:
            ValueError: The weights are those of another network, or not finite.
        """
        expected = self.network.state_dict()
        classifier = {name for name in expected if name.startswith(f"{self._classifier}.")}
        fits = all(name in weights and weights[name].shape == expected[name].shape for name in classifier)
        if not fits:
            weights = {name: x for name, x in weights.items() if name not in classifier}
        wrong = [
            name for name in weights if name not in expected or expected[name].shape != weights[name].shape
        ]
        missing = [
            name
            for name in expected
            if name not in weights and name not in classifier and not name.endswith("num_batches_tracked")
        ]
        if wrong or missing:
            difference = f"{wrong[0]} does not belong to it" if wrong else f"{missing[0]} is missing"
            more = len(wrong) + len(missing) - 1
            raise ValueError(
                f"{source}: these weights are not those of {self.config['name']}: {difference}"
                + (f", and {more} more" if more else "")
            )
        load_tensors(self.network, weights, strict=False)
        if not has_finite_weights(self.network):
            raise ValueError(f"{source}: not all weights are finite numbers")
        self.has_new_classifier = self.config["has_new_classifier"] = not fits
        if self.frozen:  # which parameters that means has changed with the classifier
            self.freeze_pretrained()

    # Image sizes

    def check_image_size(self, size: int) -> None:
        """Raise ValueError if the network cannot take images of ``size`` x ``size`` pixels."""
        if size in self._accepted_sizes:
            return
        runner = meta_copy(self).eval()
        reason = _failure(runner, size)
        if reason is None:
            self._accepted_sizes.add(size)
            return
        smallest = min(self._accepted_sizes)
        if self._takes_one_size:
            raise ValueError(f"this network takes images of {smallest} pixels only, not of {size}")
        if size > smallest:
            raise ValueError(f"this network does not take images of {size} pixels ({reason:.150})")
        needed = _smallest_size(runner, size, smallest)
        raise ValueError(f"images of {size} pixels are too small: this network needs at least {needed}")

    def can_run_channels_last(self) -> bool:
        """Return False for a network whose calls of ``view`` need maps in their default layout."""
        nodes = (node for segment in self._segments for node in segment.graphs["evaluation"].nodes)
        if not any(node.op == "call_method" and node.target in ("view", "view_as") for node in nodes):
            return True
        # Only a run on the device tells: on the meta device convolutions have outputs of another layout.
        runner = copy.deepcopy(self).eval()
        set_memory_format(runner, torch.channels_last)
        return _failure(runner, max(self._accepted_sizes), torch.channels_last) is None

    # Folding

    def fold_batch_norm(self, fuse: Fuse) -> None:
        """Fold every BatchNorm of the network and the exits into the layer before it, in place."""
        graphs = [segment.graphs["evaluation"] for segment in self._segments]
        calls = Counter(node.target for graph in graphs for node in graph.nodes if node.op == "call_module")
        # A layer whose weights are also read directly counts once more, and so is not folded.
        calls.update(
            node.target.rpartition(".")[0]
            for graph in graphs
            for node in graph.nodes
            if node.op == "get_attr"
        )
        self._segments = [Segment({"evaluation": self._folded(graph, calls, fuse)}) for graph in graphs]
        fold_sequences(self.exits, fuse)

    def _folded(self, graph: fx.Graph, calls: Counter[str], fuse: Fuse) -> fx.Graph:
        """Return the graph without the BatchNorms that ``fuse`` takes; ``calls`` counts those of modules."""
        new = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            source = node.args[0] if node.args else None
            if _is_pair(source, node, calls):
                is_2d = source.target in self._with_2d_output
                layer = fuse(self.get_submodule(source.target), self.get_submodule(node.target), is_2d)
                if layer is not None:
                    self._replace_module(source.target.removeprefix(PREFIX), layer)
                    self._replace_module(node.target.removeprefix(PREFIX), nn.Identity())
                    values[node] = values[source]
                    continue
            values[node] = new.node_copy(node, values.__getitem__)
        return new

    def _replace_module(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.network.get_submodule(parent), name, module)

    def _clone_where_needed(self, size: int) -> None:
        """Let segments that change their input in place copy it first: the previous exit needs it too."""
        changes_input = set()
        # Inference tensors have no versions, and the caller may be in inference mode.
        runner = meta_copy(self)
        with torch.inference_mode(False), torch.no_grad(), frozen_statistics(runner):
            for mode in MODES:
                runner.train(mode == "training")
                x = probe_images(runner, size)
                for k, segment in enumerate(self._segments):
                    version = x._version
                    y = segment.function(mode)(runner, x)
                    if x._version != version:
                        changes_input.add(k)
                    x = y
        for k in changes_input:
            self._segments[k] = with_cloned_input(self._segments[k])


def _named_parts(root: nn.Module, graph: fx.Graph) -> nn.Module:
    """Return a module that holds the modules and buffers of ``root`` that the nodes of a graph name."""
    parts = nn.Module()
    for number, node in enumerate(graph.nodes):
        if node.op == "call_module":
            parts.register_module(str(number), root.get_submodule(node.target))
        elif node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            buffers = dict(root.get_submodule(path).named_buffers(recurse=False))
            parts.register_buffer(str(number), buffers.get(name))
    return parts


def _failure(
    runner: Backbone, size: int, memory_format: torch.memory_format = torch.contiguous_format
) -> str | None:
    """Return why a network cannot run on images of a size, None if it can."""
    images = probe_images(runner, size).contiguous(memory_format=memory_format)
    try:
        with torch.no_grad():
            runner(images)
            first = runner.advance(0, runner.start(images))[1]["x"]
    except Exception as error:  # on images of a wrong size a network can raise any exception
        return first_line(error)
    is_single = first.dim() == 4 and first.numel() == PROBE_BATCH * runner.exits[0].channels
    return "the first exit reads a map of one pixel" if is_single else None


def _smallest_size(runner: Backbone, too_small: int, works: int) -> int:
    """Return the smallest image size between these two on which a network on the meta device can run."""
    while works - too_small > 1:
        middle = (too_small + works) // 2
        if _failure(runner, middle) is None:
            works = middle
        else:
            too_small = middle
    return works


def _targets_with_2d_output(profiles: Iterable[GraphProfile]) -> set[str]:
    """Return the modules, as targets of nodes, whose output is (N, C) for every image size."""
    dimensions: dict[str, set[int]] = {}
    for profile in profiles:
        for node, shape in profile.shapes.items():
            if node.op == "call_module":
                dimensions.setdefault(node.target, set()).add(len(shape))
    return {target for target, numbers in dimensions.items() if numbers == {2}}


def _is_pair(source: Any, node: fx.Node, calls: Counter[str]) -> bool:
    """Return whether ``node`` alone reads ``source``, and both are modules that run once."""
    return (
        isinstance(source, fx.Node)
        and node.op == source.op == "call_module"
        and len(source.users) == 1
        and calls[node.target] == calls[source.target] == 1
    )


def build_backbone(
    arch: str,
    exits: Sequence[str] | int = 4,
    num_classes: int | None = None,
    *,
    pretrained: str | os.PathLike | None = None,
    image_size: int | None = None,
    options: dict[str, Any] | None = None,
    **backbone_arguments: Any,
) -> Backbone:
    """Build a network of torchvision (``NAME``) or timm (``timm/NAME``) with exits.

    Args:
        arch: Name of the network.
        exits: Paths of modules, or the number of exits, as for ``Backbone``.
        num_classes: None keeps the network's own, mostly the 1,000 of ImageNet.
        pretrained: "DEFAULT" or another name of torchvision's weights, which are downloaded; a file of
            weights; None for none.
        image_size: Size of the images it will see; operations are spread evenly for this size.
        options: Options of the network's constructor, plain types.
        backbone_arguments: Further arguments of ``Backbone``.

    Raises:
        ValueError: An unknown name, a network that cannot be cut, or weights of another network.
        OSError: The weights cannot be read or downloaded.
    """
    check_backbone(arch, pretrained)
    options = {**options_of_weights(arch, pretrained), **(options or {})}
    constructor = Constructor(*split_name(arch), options)
    backbone = Backbone(
        construct(*constructor),
        exits,
        num_classes,
        image_size=image_size,
        constructor=constructor,
        **backbone_arguments,
    )
    if pretrained is not None:
        backbone.load_pretrained(weights_of(constructor, pretrained), str(pretrained))
    return backbone
