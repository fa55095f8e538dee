"""Whether a network that was cut computes what it does as a whole.

Example:
    cuts = find_cuts(network, traces, profiles, exits=4)
    check_segments(network, traces, cuts.segments, cuts.classifier, image_size=224)
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .module_state import Snapshot
from .tracing import MODES, Segment, TracedRoot, Traces, first_line, probe_images, set_mode


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
    root = TracedRoot(network)
    for name, tensor in traces.constants.items():
        setattr(root, name, tensor)
    linear = network.get_submodule(classifier)

    def run_segments(x: Tensor, training: bool) -> Tensor:
        for segment in segments:
            x = segment.function(training)(root, x)
        return linear(x)

    for mode in MODES:
        training = mode == "training"
        with set_mode(network, training):
            expected = _outputs_and_buffers(network, network, image_size)
            found = _outputs_and_buffers(network, partial(run_segments, training=training), image_size)
        for name, value in expected.items():
            if not torch.allclose(found[name].double(), value.double(), rtol=1e-3, atol=1e-5, equal_nan=True):
                what = "outputs" if name == "" else f"values of the buffer {name!r}"
                raise ValueError(
                    f"cut into segments, {type(network).__name__} gives other {what} in {mode} mode: its "
                    "forward method does something that torch.fx does not record"
                )


@torch.no_grad()
def _outputs_and_buffers(
    network: nn.Module, function: Callable[[Tensor], Tensor], image_size: int
) -> dict[str, Tensor]:
    """Return what ``function`` computes, as "", and the network's buffers after it; then restore all state.

    Raises:
        ValueError: It does not run.
    """
    images, before = probe_images(network, image_size), Snapshot(network)
    # Not seeded: that would change generators of other devices. Both calls begin with the same state.
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        try:
            outputs = function(torch.rand_like(images)).flatten(1)
            return {"": outputs, **{name: buffer.clone() for name, buffer in network.named_buffers()}}
        except Exception as error:  # a network can raise any exception
            mode = "training" if network.training else "evaluation"
            raise ValueError(
                f"{type(network).__name__} does not run in {mode} mode on images of {image_size} pixels: "
                f"{first_line(error):.150}"
            ) from error
        finally:
            before.restore()
