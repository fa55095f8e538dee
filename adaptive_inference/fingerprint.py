"""Identity of a network, for the files that belong to it: fingerprint of the weights, dtype, description."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from models import ExitNetwork


def network_fingerprint(network: ExitNetwork) -> str:
    """Return a digest of a network's configuration and weights: thresholds suit these weights only.

    A folded network, in PyTorch or in ONNX, keeps the fingerprint of the network it was made from.
    """
    if network.fingerprint is not None:
        return network.fingerprint
    config = json.dumps(_identifying_options(network), sort_keys=True)
    digest = hashlib.sha256(f"{describe(network)} {config}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _identifying_options(network: ExitNetwork) -> dict[str, Any]:
    """Return the options of a network and of its backbone that differ from the default.

    ``training_options`` are left out. Older options that decide only what is trained are not: they are part
    of the fingerprints that policy files hold.
    """
    defaults = network.options_of_older_files
    options = {
        name: value
        for name, value in network.config.items()
        if name not in network.training_options and (name not in defaults or value != defaults[name])
    }
    if network.stage_1 is not network:
        options["backbone"] = _identifying_options(network.stage_1)
    return options


def dtype_of(network: nn.Module) -> str:
    """Return the name of a network's dtype, such as ``float32``; it decides how logits are rounded."""
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def describe(network: ExitNetwork) -> str:
    """Return a network in a few words, for messages."""
    return f"{network.kind} with {network.num_exits} exits and {network.num_classes} classes"
