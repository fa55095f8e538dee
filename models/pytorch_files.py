"""PyTorch's own files of weights, from this and other programs: reading them runs no code.

Example:
    checkpoint = read_checkpoint(Path("model.pth.tar"))
    weights = next(checkpoint[name] for name in STATE_DICTS if name in checkpoint)
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

# Keys under which programs store the state dict, and prefixes that wrappers add to the names of its tensors.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "net", "state", "state_dict_ema", "model_ema")
WRAPPERS = ("module", "_orig_mod")


def read_checkpoint(path: Path) -> Mapping:
    """Load a dictionary of tensors and plain types, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another kind, or needs more than that. One line that names the file and
            the reason.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        # PyTorch does not compare the archive's checksums: flipped bits would become weights.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged!a:.80} does not match")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged or foreign file can make any part of the readers fail.
        refused = (
            re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        )
        if refused:
            raise ValueError(
                f"{path}: besides tensors it holds {refused[1]}, which is not loaded since it could run "
                "code. If you trust its origin, "
                "save its 'state_dict' alone on the machine it comes from, or allow that class with "
                "torch.serialization.safe_globals"
            ) from error
        reason = (
            str(error)
            if type(error) is ValueError and len(str(error)) < 120
            else f"{type(error).__name__} while reading it"
        )
        raise ValueError(f"{path}: it is damaged, or not a PyTorch checkpoint ({reason})") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: it holds a {type(checkpoint).__name__}, not a checkpoint or state dict")
    return checkpoint
