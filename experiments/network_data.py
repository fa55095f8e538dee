"""The images of a network, as its own evaluation reads them.

Example:
    data = load_own_data(load_saved(path), data_root=None, evalmode="anytime")
"""

from pathlib import Path

import torch

from args import STAGES
from dataloader import Data, load_data
from engine.checkpoint import LoadedNetwork
from settings.command_line import CommandLine, recipe_of


def load_own_data(loaded: LoadedNetwork, data_root: Path | None, evalmode: str) -> Data:
    """Read the data set that a network was trained on, with its held-out images, onto the CPU.

    Args:
        loaded: The network.
        data_root: Folder of the images. If None, that of the network's recipe.
        evalmode: ``anytime`` for the test images alone, ``dynamic`` for the held-out ones too.

    Raises:
        UserError: The images are not there, or are others.
    """
    typed = {"evalmode": evalmode} | ({} if data_root is None else {"data_root": data_root})
    command = CommandLine(STAGES[loaded.description.stage], typed, [])
    settings = command.settings(recipe=recipe_of(loaded.network))
    return load_data(settings, torch.device("cpu"), None, loaded.data, loaded.split)
