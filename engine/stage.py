"""The interface of a stage: what the two training programs build, train and check.

Their flags, defaults and presets differ too: see ``args`` and ``presets``. docs/extending.md: add a loss.
"""

from abc import ABC, abstractmethod
from argparse import Namespace
from typing import TYPE_CHECKING

from torch import nn

from args import StageSpec
from engine.checkpoint import LoadedNetwork, load_saved
from models import Description, ExitNetwork
from models.description import DataInfo

if TYPE_CHECKING:
    from settings.command_line import CommandLine


class Stage(ABC):
    """A kind of training: initial network, trained parameters and loss.

    Attributes:
        spec: Its name, flags and place among the stages, an entry of ``args.STAGES``.
        origin_title: Title of the curves of the network it starts from, None not to draw them.
        frozen_changed_message: Message of the error if something changed that must not.
        next_command: Command that uses the finished run; the run's directory is appended.
    """

    spec: StageSpec
    origin_title: str | None = None
    frozen_changed_message = "weights that were frozen changed during the training"
    next_command: str

    @property
    def name(self) -> str:
        """``GE`` or ``IMTA``."""
        return self.spec.name

    def find_origin(self, command: "CommandLine") -> LoadedNetwork | None:
        """Load the network to start from, None to start from scratch.

        Raises:
            UserError, OSError: The file is missing, unreadable, or holds another network than the flags name.
        """
        if command.pretrained_run is None:
            return None
        origin = load_saved(command.pretrained_run)
        command.refuse_other_network(origin.path, origin.network)
        return origin

    @abstractmethod
    def make_network(self, settings: Namespace, data: DataInfo, origin: LoadedNetwork | None) -> ExitNetwork:
        """Build the network to train."""

    @abstractmethod
    def make_objective(self, network: ExitNetwork, settings: Namespace) -> nn.Module:
        """Build the module (images, targets) -> (losses (N,), logits (N, K, C)) that trains ``network``.

        It keeps the network as its attribute ``network``, and trains no parameters but those of the network,
        as nothing else is saved; ``engine.trainer`` refuses others.

        Raises:
            UserError: The settings are impossible; ``--overwrite`` has not deleted the old run yet.
        """

    @abstractmethod
    def title(self, network: ExitNetwork, settings: Namespace) -> str:
        """Return the title of a run's curves."""

    def frozen_digest(self, network: ExitNetwork) -> str | None:
        """Return a digest of what must not change, None if everything may."""
        return None

    def check_result(self, network: ExitNetwork, description: Description) -> None:
        """Check that training changed nothing that must not change.

        Args:
            network: The trained network.
            description: Description with the digest from before the training.

        Raises:
            RuntimeError: Something changed, which is a bug.
        """
        if self.frozen_digest(network) != description.frozen_digest:
            raise RuntimeError(self.frozen_changed_message)

    def compile_speedup_share(self, settings: Namespace) -> float:
        """Return the share of a whole training's operations that compiling makes faster on a CPU."""
        return 1.0
