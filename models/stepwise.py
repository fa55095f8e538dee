"""Exit-by-exit evaluation, for custom loops; ``ExitNetwork.early_exit`` is the shortest such loop.

Example:
    steps = Stepwise(network, images)
    first = steps.next_logits()    # (N, C), exit 1
    steps.keep(uncertain)          # a boolean mask or indices: the images that remain
    second = steps.next_logits()   # (n, C), exit 2, of those images only

Each exit costs only what it reads (MSDNet paper, section 5, "lazy evaluation").
"""

from torch import Tensor

from .network import ExitNetwork, State, check_evaluation_mode


class Stepwise:
    """One pass over the exits of a network for a batch that may shrink between exits.

    Args:
        network: In evaluation mode.
        images: (N, 3, H, W).

    Raises:
        ValueError: The network is in training mode.
    """

    def __init__(self, network: ExitNetwork, images: Tensor):
        check_evaluation_mode(network)
        self.network, self.exits_done = network, 0
        self._state: State = network.start(images)
        self._logits: Tensor | None = None

    def next_logits(self) -> Tensor:
        """Compute the logits (n, C) of the next exit for the images that are left.

        Raises:
            IndexError: All exits are done.
        """
        k = self.exits_done
        if k == self.network.num_exits:
            raise IndexError(f"all {k} exits are done")
        features, self._state = self.network.advance(k, self._state)
        self._logits = self.network.classify_next(k, features, self._logits)
        self.exits_done += 1
        return self._logits

    def keep(self, images: Tensor) -> None:
        """Keep only these of the remaining images: a boolean mask (n,) or indices.

        Indices are better on a GPU: a mask makes the host wait for the number of images, once per tensor.
        """
        self._state = {key: x[images] for key, x in self._state.items()}
        if self._logits is not None:
            self._logits = self._logits[images]
