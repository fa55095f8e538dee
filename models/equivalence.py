"""Check that the segments of a cut network compute what the whole network does.

Example:
    cuts = find_cuts(network, traces, profiles, exits=4)
    check_segments(network, traces, cuts.segments, cuts.classifier, image_size=224)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import first_line
from .module_state import Snapshot
from .tracing import Segment, TracedRoot, Traces, probe_images, set_mode


def check_segments(
    network: nn.Module, traces: Traces, segments: list[Segment], classifier: str, image_size: int
) -> None:
    """Check on random images that the segments compute what the network does, in both modes.

    A trace records operations on tensors; what a forward method does beside them is lost.

    Args:
        network: The network that was traced, not on the meta device. It is left as it is.
        traces: Its graphs.
        segments: Its segments, from the images to the input of the last linear layer.
        classifier: Path of the last linear layer.
        image_size: A size of images that it takes.

    Raises:
        ValueError: They compute something else, or change buffers in another way.
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

    expected = _outputs_and_buffers(network, run_network, image_size)
    found = _outputs_and_buffers(network, run_segments, image_size)
    for (mode, name), value in expected.items():
        if not torch.allclose(
            found[mode, name].double(), value.double(), rtol=1e-3, atol=1e-5, equal_nan=True
        ):
            what = "outputs" if name == "" else f"values of the buffer {name!r}"
            raise ValueError(
                f"cut into segments, {type(network).__name__} gives other {what} in {mode} mode: its "
                "forward method does something that torch.fx does not record; usual causes: state in "
                "attributes or globals, or x += y where x is used again"
            )


@torch.no_grad()
def _outputs_and_buffers(
    network: nn.Module, function: Callable[[Tensor, str], Tensor], image_size: int
) -> dict[tuple[str, str], Tensor]:
    """Run ``function`` in training mode and then in evaluation mode, and restore the network afterwards.

    Evaluation comes second: it uses state that training changed.

    Returns:
        By mode and name, the buffers after the pass, and its outputs under the name "".

    Raises:
        ValueError: It does not run.
    """
    images, before = probe_images(network, image_size), Snapshot(network)
    values = {}
    # Not seeded: that would change generators of other devices. Both calls begin with the same state.
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        try:
            for mode in ("training", "evaluation"):
                with set_mode(network, mode):
                    values[mode, ""] = function(torch.rand_like(images), mode)
                values |= {(mode, name): buffer.clone() for name, buffer in network.named_buffers()}
        except Exception as error:  # a network can raise any exception
            raise ValueError(
                f"{type(network).__name__} does not run in {mode} mode on images of {image_size} pixels: "
                f"{first_line(error):.150}"
            ) from error
        finally:
            before.restore()
    return values
