"""Check that the segments of a cut network compute what the whole network does.

Example:
    cuts = find_cuts(network, traces, profiles, exits=4)
    check_segments(network, traces, cuts.segments, cuts.classifier, image_size=224)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .errors import first_line
from .module_state import Snapshot
from .tracing import Segment, TracedRoot, Traces, probe_images, set_mode


def check_segments(
    network: nn.Module, traces: Traces, segments: list[Segment], classifier: str, image_size: int
) -> None:
    """Check on random images that the segments compute what the network does, in both modes.

    A trace records operations on tensors; what a forward method does beside them is lost. Gradients are
    compared too, and the weights are changed meanwhile: a trace may hold what was computed from them.

    Args:
        network: The network that was traced, not on the meta device. It is left as it is.
        traces: Its graphs.
        segments: Its segments, from the images to the input of the last linear layer.
        classifier: Path of the last linear layer.
        image_size: A size of images that it takes.

    Raises:
        ValueError: They compute something else, have other gradients, or change buffers in another way.
    """
    root = TracedRoot(network, traces.constants)
    linear = network.get_submodule(classifier)

    # Both return features and logits: a classifier of zeros hides what is before it.
    def run_network(x: Tensor, mode: str) -> Tensor:
        features: list[Tensor] = []
        hook = linear.register_forward_pre_hook(
            lambda layer, args, kwargs: features.append(args[0] if args else kwargs["input"]),
            prepend=True,  # before hooks of the network's own, which may change the input
            with_kwargs=True,
        )
        try:
            logits = network(x).flatten(1)
        finally:
            hook.remove()
        return torch.cat([features[-1], logits], dim=1)

    def run_segments(x: Tensor, mode: str) -> Tensor:
        for segment in segments:
            x = segment.function(mode)(root, x)
        return torch.cat([x, linear(x)], dim=1)

    with _changed_weights(network):
        expected = _results(network, run_network, image_size)
        found = _results(network, run_segments, image_size)
    gradients = [value.abs().max().item() for (what, _, _), value in expected.items() if what == "gradients"]
    # Those of a bias before batch normalisation are nothing but rounding.
    atol = {"gradients": 1e-4 * max(gradients, default=0.0)}
    for (what, mode, name), value in expected.items():
        ours, tolerance = found.get((what, mode, name)), atol.get(what, 1e-5)
        if ours is None or not torch.allclose(
            ours.double(), value.double(), rtol=1e-3, atol=tolerance, equal_nan=True
        ):
            what = f"{what} of {name!r}" if name else what
            raise ValueError(
                f"cut into segments, {type(network).__name__} gives other {what} in {mode} mode: its "
                "forward method does something that torch.fx does not record; usual causes: state in "
                "attributes or globals, or x += y where x is used again"
            )


@contextmanager
def _changed_weights(network: nn.Module) -> Iterator[None]:
    """Multiply each parameter and floating-point buffer by random numbers from 1 to 1.1 within the block."""
    tensors = [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]
    tensors = [x for x in tensors if not x.is_inference()]  # which may not be changed everywhere
    values = [x.detach().clone() for x in tensors]
    try:
        gpus = sorted({x.get_device() for x in tensors if x.is_cuda})
        with torch.no_grad(), torch.random.fork_rng(gpus):
            for x in tensors:
                x.mul_(1 + 0.1 * torch.rand_like(x))
        yield
    finally:
        with torch.no_grad():
            for x, value in zip(tensors, values, strict=True):
                x.copy_(value)


def _results(
    network: nn.Module, function: Callable[[Tensor, str], Tensor], image_size: int
) -> dict[tuple[str, str, str], Tensor]:
    """Run ``function`` in training mode and then in evaluation mode, and restore the network afterwards.

    Evaluation comes second: it uses state that training changed.

    Returns:
        By kind, mode and name: its ``outputs`` (the name is empty), the ``values`` of buffers after the pass,
        and in training mode the ``gradients`` of parameters.

    Raises:
        ValueError: It does not run.
    """
    images, before = probe_images(network, image_size), Snapshot(network)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    results = {}
    # Not seeded: that would change generators of other devices. Both calls begin with the same state.
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        try:
            for mode in ("training", "evaluation"):
                with set_mode(network, mode), torch.set_grad_enabled(mode == "training"):
                    outputs = function(torch.rand_like(images), mode)
                    results["outputs", mode, ""] = outputs.detach()
                    for name, gradient in _gradients(outputs, parameters).items():
                        results["gradients", mode, name] = gradient
                buffers = network.named_buffers()
                results |= {("values", mode, name): x.detach().clone() for name, x in buffers}
        except Exception as error:  # a network can raise any exception
            raise ValueError(
                f"{type(network).__name__} does not run in {mode} mode on images of {image_size} pixels: "
                f"{first_line(error):.150}"
            ) from error
        finally:
            before.restore()
    return results


def _gradients(outputs: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gradients of a function of ``outputs``, none if it has none or cannot be differentiated."""
    if not outputs.requires_grad:
        return {}
    try:
        gradients = torch.autograd.grad(
            outputs.square().sum(), [*parameters.values()], allow_unused=True, materialize_grads=True
        )
    except RuntimeError:  # such as after an operation in place on what they are computed from
        return {}
    return dict(zip(parameters, gradients, strict=True))
