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
from .locks import TRACING
from .module_state import Snapshot, is_expanded
from .tracing import Segment, TracedRoot, Traces, num_attempts, probe_images, set_mode

# By kind, mode and name: ``outputs`` (the name is empty), ``values`` of buffers, ``gradients`` of parameters.
Results = dict[tuple[str, str, str], Tensor]


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

    for _ in range(num_attempts()):
        with TRACING, _changed_weights(network):
            expected = _results(network, run_network, image_size)
            found = _results(network, run_segments, image_size)
        difference = _first_difference(expected, found)
        if difference is None:
            return
    raise ValueError(
        f"cut into segments, {type(network).__name__} gives other {difference} mode: its "
        "forward method does something that torch.fx does not record; usual causes: state in "
        "attributes or globals, or x += y where x is used again"
    )


def _first_difference(expected: Results, found: Results) -> str | None:
    """Return what differs and in which mode, as ``outputs in training``; None if nothing does."""
    gradients = [value.abs().max().item() for (what, _, _), value in expected.items() if what == "gradients"]
    # Those of a bias before batch normalisation are nothing but rounding.
    atol = {"gradients": 1e-4 * max(gradients, default=0.0)}
    for (what, mode, name), value in expected.items():
        ours, tolerance = found.get((what, mode, name)), atol.get(what, 1e-5)
        if ours is None or not torch.allclose(
            ours.cpu().double(), value.cpu().double(), rtol=1e-3, atol=tolerance, equal_nan=True
        ):
            return f"{what} of {name!r} in {mode}" if name else f"{what} in {mode}"
    return None


@contextmanager
def _changed_weights(network: nn.Module) -> Iterator[None]:
    """Multiply each parameter and floating-point buffer by random numbers from 1 to 1.1 within the block."""
    tensors = [x for x in (*network.parameters(), *network.buffers()) if x.is_floating_point()]
    # Neither can be changed in place everywhere.
    tensors = [x for x in tensors if not x.is_inference() and not is_expanded(x)]
    values, generator = [x.detach().clone() for x in tensors], torch.Generator("cpu").manual_seed(0)
    try:
        with torch.no_grad():
            for x in tensors:
                x.mul_(1 + 0.1 * torch.rand(x.shape, generator=generator, device="cpu").to(x))
        yield
    finally:
        with torch.no_grad():
            for x, value in zip(tensors, values, strict=True):
                x.copy_(value)


@contextmanager
def _kept_generators(device: torch.device) -> Iterator[None]:
    """Put the random generators of the CPU and of ``device`` back at the end of the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type in ("cpu", "cuda", "meta"):
            yield
            return
        backend = torch.get_device_module(device)
        state = backend.get_rng_state()
        try:
            yield
        finally:
            backend.set_rng_state(state)


def _results(network: nn.Module, function: Callable[[Tensor, str], Tensor], image_size: int) -> Results:
    """Run ``function`` in training mode and then in evaluation mode, and restore the network afterwards.

    Evaluation comes second: it uses state that training changed.

    Returns:
        By kind, mode and name: its ``outputs`` (the name is empty), the ``values`` of buffers after the pass,
        and in training mode the ``gradients`` of parameters.

    Raises:
        ValueError: It does not run.
    """
    images, before = probe_images(network, image_size), Snapshot(network)
    generator = torch.Generator("cpu").manual_seed(0)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    results = {}
    # Dropout draws from the usual generators, which begin both calls in the same state. They are not seeded:
    # that would change the generators of other devices too.
    with _kept_generators(images.device):
        try:
            for mode in ("training", "evaluation"):
                with set_mode(network, mode), torch.set_grad_enabled(mode == "training"):
                    x = torch.rand(images.shape, generator=generator, device="cpu").to(images)
                    outputs = function(x, mode)
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
