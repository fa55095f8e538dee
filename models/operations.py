"""Operations and parameters up to every exit, counted as the published plots count them.

- A convolution, linear layer or matrix product costs its multiply-adds. A linear layer costs one addition per
  bias too, a convolution none.
- An activation costs one operation per element, whichever it is: ReLU, ReLU6, Hardswish, GELU, SiLU, sigmoid.
- A pooling layer, or a mean, costs one operation per value that it reads, as often as it reads it.
- An addition costs one operation per element of the sum: residual connections, and the logits that boosted
  exits add.

Everything else is free: batch normalisation, as it can be folded into the convolution before it; and, for
want of a published rule, other normalisation, softmax and multiplication element by element.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .locks import TRACING
from .module_state import meta_copy
from .network import ExitNetwork, Stepwise

aten = torch.ops.aten


class Cost(NamedTuple):
    """Cumulative cost to each exit, shallowest first."""

    operations: list[int]
    parameters: list[int]


def count_operations(network: ExitNetwork, image_size: int, lazy: bool = False) -> list[int]:
    """Count the operations for one image of ``image_size`` x ``image_size`` pixels up to every exit.

    Args:
        network: Any network with exits. Only what runs is counted: in a stage-2 network the ISC links and the
            new classifiers, and not the stage-1 classifiers.
        image_size: Height and width in pixels.
        lazy: Count what ``Stepwise`` computes, instead of whole blocks (the published way).

    Raises:
        ValueError: The network does not take images of this size.
    """
    return measure_cost(network, image_size, lazy).operations


def measure_cost(
    network: ExitNetwork, image_size: int, lazy: bool = False, multiply_adds_only: bool = False
) -> Cost:
    """Count operations like ``count_operations``, and the parameters used up to every exit.

    Args:
        network: Any network with exits.
        image_size: Height and width in pixels.
        lazy: Count what ``Stepwise`` computes, instead of whole blocks.
        multiply_adds_only: Leave out biases, activations, pooling and additions.

    Raises:
        ValueError: The network does not take images of this size.
    """
    network.check_image_size(image_size)
    cost = Cost([], [])
    # In inference mode, PyTorch hands a convolution to the counter before it has become one of the calls that
    # are counted.
    with TRACING, torch.inference_mode(False), torch.no_grad():
        # Shapes alone are needed: on the meta device nothing is computed.
        network = meta_copy(network).eval()
        counter = _Counter(set(network.parameters()), {} if multiply_adds_only else SMALL_OPERATIONS)
        dtype = next(network.parameters()).dtype
        images = torch.zeros(1, 3, image_size, image_size, device="meta", dtype=dtype)
        for _ in _lazily(network, images, counter) if lazy else _by_whole_blocks(network, images, counter):
            cost.operations.append(counter.operations)
            cost.parameters.append(sum(parameter.numel() for parameter in counter.used))
    return cost


def _lazily(network: ExitNetwork, images: Tensor, counter: "_Counter") -> Iterator[None]:
    with counter:
        steps = Stepwise(network, images)
    for _ in range(network.num_exits):
        with counter:
            steps.next_logits()
        yield


def _by_whole_blocks(network: ExitNetwork, images: Tensor, counter: "_Counter") -> Iterator[None]:
    for k in range(network.num_exits):
        counter.reset()
        network.eval()  # some networks of timm then drop what they computed from parameters
        with counter:
            network(images, k + 1)
        yield


def _pooling_window(_x: Tensor, kernel_size: list[int], *_: Any, out: Tensor) -> int:
    return out.numel() * kernel_size[0] * kernel_size[-1]


ACTIVATIONS = (
    *("relu", "leaky_relu", "elu", "hardtanh", "hardswish", "hardsigmoid"),  # nn.ReLU6 is a hardtanh
    *("gelu", "silu", "mish", "sigmoid", "tanh", "celu", "threshold"),
)
OTHER_ACTIVATIONS = ("_prelu_kernel", "softplus", "rrelu_with_noise")  # without an operator in place
# Operations besides multiply-adds, by arguments and output of a call. All calls that are neither here nor in
# PyTorch's list of multiply-adds are free.
SMALL_OPERATIONS: dict[Any, Callable[..., int]] = {
    aten.addmm: lambda _bias, *_, out: out.numel(),
    aten.add: lambda *_, out: out.numel(),
    aten.add_: lambda *_, out: out.numel(),
    aten.max_pool2d_with_indices: lambda *args, out: _pooling_window(*args, out=out[0]),
    aten.avg_pool2d: _pooling_window,
    aten.mean: lambda x, *_, out: x.numel(),
    aten._adaptive_avg_pool2d: lambda x, *_, out: x.numel(),
    aten.adaptive_max_pool2d: lambda x, *_, out: x.numel(),
    aten.log_sigmoid_forward: lambda x, *_, out: x.numel(),
    **{getattr(aten, name): lambda *_, out: out.numel() for name in OTHER_ACTIVATIONS},
    **{getattr(aten, name): lambda *_, out: out.numel() for name in ACTIVATIONS},
    **{getattr(aten, f"{name}_"): lambda *_, out: out.numel() for name in ACTIVATIONS},  # in place
}


class _Counter(TorchDispatchMode):
    """A mode that adds up the operations of all calls in it, and collects the parameters they read."""

    def __init__(self, parameters: set[Tensor], small_operations: dict[Any, Callable[..., int]]):
        super().__init__()
        self.parameters, self.small_operations = parameters, small_operations
        self.reset()

    def reset(self) -> None:
        self.operations, self.used = 0, set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, operator = kwargs or {}, function.overloadpacket
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self.used.update(x for x in tensors if x in self.parameters)
        if operator is aten.native_batch_norm:
            return _shapes_of_batch_norm(args[0])
        out = function(*args, **kwargs)
        if operator in flop_registry:  # counts two per multiply-add
            self.operations += flop_registry[operator](*args, **kwargs, out_val=out) // 2
        if operator in self.small_operations:
            self.operations += self.small_operations[operator](*args, out=out)
        return out


def _shapes_of_batch_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what BatchNorm does on the meta device; calling it there takes longer than everything else."""
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
