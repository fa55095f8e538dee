"""Memory layout, running statistics and weights of any module, and copies without memory."""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized


def set_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Put all tensors with four dimensions into a memory layout, in place.

    ``nn.Module.to`` does the same, but refuses networks that also hold tensors with five dimensions.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch normalisation in ``module`` as they are within the block.

    All other buffers that the block changes in place are put back at its end.
    """
    others = _other_buffers(module)
    tracking = [layer for layer in module.modules() if getattr(layer, "track_running_stats", False)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in tracking]
    for layer in tracking:
        # A counter to be thrown away: some kinds of batch normalisation insist on one.
        counter = None if layer.num_batches_tracked is None else torch.zeros_like(layer.num_batches_tracked)
        layer.momentum, layer.num_batches_tracked = 0.0, counter
    try:
        yield
    finally:
        for layer, (momentum, num_batches_tracked) in zip(tracking, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, num_batches_tracked
        _put_back(others)


def checkpoint_contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a forward pass and of its recomputation, for ``torch.utils.checkpoint``.

    The recomputation begins with the buffers with which the forward pass began, and changes none for good.
    """
    at_the_start = _other_buffers(module)

    @contextmanager
    def recomputation() -> Iterator[None]:
        with frozen_statistics(module):
            _put_back(at_the_start)
            yield

    return nullcontext(), recomputation()


def _other_buffers(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers that are no running statistics of a layer, and their values."""
    layers = [layer for layer in module.modules() if not getattr(layer, "track_running_stats", False)]
    buffers = [x for layer in layers for x in layer.buffers(recurse=False) if not x.is_inference()]
    return [(x, x.clone()) for x in buffers if not is_expanded(x)]


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for x, value in buffers:
            # Always, and without a new version: ``F.batch_norm`` changes statistics without one.
            x.data.copy_(value)


def is_expanded(x: Tensor) -> bool:
    """Return True if several elements share memory, as after ``expand``: they cannot be changed in place."""
    if is_lazy(x) or x.layout != torch.strided:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def is_changed(module: nn.Module) -> bool:
    """Return True if hooks or parametrisations may make a module compute something else than its type does.

    ``nn.utils.weight_norm``, ``nn.utils.spectral_norm`` and ``nn.utils.prune`` are hooks.
    """
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    return any(hooks) or is_parametrized(module)


class Snapshot:
    """The attributes of a network's modules, and the values of the tensors among them.

    Example:
        before = Snapshot(network)
        network(images)
        before.restore()  # buffers, and what the forward method assigned

    Parameters are left out.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._attributes = {m: (dict(vars(m)), dict(m._buffers)) for m in network.modules()}
        self._values = {name: (x, x.clone(), x._version) for name, x in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path, module in self._network.named_modules():
            for name, value in (*module._buffers.items(), *vars(module).items()):
                # Tensors made in inference mode have no versions.
                if isinstance(value, Tensor) and not value.is_inference() and not is_expanded(value):
                    yield f"{path}.{name}".removeprefix("."), value

    def first_change(self) -> str | None:
        """Return the name of an attribute that was assigned or changed in place, None if there is none.

        Attributes that were None, such as a cache, or that are neither numbers, texts, tensors nor the
        proxies of a trace do not count.
        """
        for path, module in self._network.named_modules():
            attributes, buffers = self._attributes.get(module, ({}, {}))
            own = [name for name, x in buffers.items() if module._buffers.get(name) is not x]
            for name, value in vars(module).items():
                old = attributes.get(name, getattr(type(module), name, None))
                is_plain = isinstance(value, (int, float, str, Tensor, fx.Proxy))
                is_equal = isinstance(value, (int, float, str)) and type(value) is type(old) and value == old
                if value is not old and not is_equal and old is not None and is_plain:
                    own.append(name)
            if own:
                return f"{path}.{own[0]}".removeprefix(".")
        return next((name for name, (x, _, version) in self._values.items() if x._version != version), None)

    def restore(self) -> None:
        """Give the modules their attributes, and the tensors their values."""
        for module, (attributes, buffers) in self._attributes.items():
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value, _ in self._values.values():
                tensor.copy_(value)  # always: batch normalisation changes statistics without a new version


def tied_parameters(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie_parameters(module: nn.Module, groups: list[list[str]]) -> None:
    """Let each group of names be one parameter, that of its first name."""
    for first, *others in groups:
        for path, _, name in (other.rpartition(".") for other in others):
            setattr(module.get_submodule(path), name, module.get_parameter(first))


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], **options: bool) -> None:
    """Call ``load_state_dict`` with tensors of the module's present version.

    Files have no versions, and modules such as torchvision's MNASNet refuse tensors without.
    """
    state = OrderedDict(tensors)
    state._metadata = module.state_dict()._metadata
    module.load_state_dict(state, **options)


def has_finite_weights(module: nn.Module) -> bool:
    """Return whether all parameters and running statistics are finite numbers.

    Other buffers may be infinite, as masks of attention are, but not NaN.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    checks = []
    for name, x in module.state_dict().items():
        is_learned = name in parameters or name.endswith(("running_mean", "running_var"))
        checks.append((x.isfinite() if is_learned else ~x.isnan()).all())
    return bool(torch.stack(checks).all())  # one synchronisation with a GPU instead of one per tensor


def detached_copy(module: nn.Module) -> Any:
    """Return a deep copy of a module.

    Tensors that were computed from parameters, as by ``nn.utils.weight_norm``, are copied without their
    history: ``copy.deepcopy`` refuses them.
    """
    computed = {
        id(value): value.detach().clone()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(module, computed)


def meta_copy(module: nn.Module) -> Any:
    """Return a copy of a module on the meta device; no tensor is copied on the way."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for part in module.modules():
        for attribute in vars(part).values():
            if isinstance(attribute, Tensor):
                memo[id(attribute)] = torch.empty_like(attribute, device="meta", requires_grad=False)
    return copy.deepcopy(module, memo)
