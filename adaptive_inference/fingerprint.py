"""Identity of a network, for the files that belong to it: fingerprint of the weights, dtype, description."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from models.options import NETWORK_FIELDS


def network_fingerprint(network: nn.Module) -> str:
    """Return a digest of a network's configuration and weights: thresholds suit these weights only.

    A folded network, in PyTorch or in ONNX, keeps the fingerprint of the network it was made from.
    """
    if network.fingerprint is not None:
        return network.fingerprint
    config = json.dumps(_without_defaults(network.config), sort_keys=True)
    digest = hashlib.sha256(f"{describe(network)} {config}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Drop options at their default, so that an option added later changes no fingerprint.

    The ``type`` of a backbone goes, too: early files of format 3 do not store it.
    """
    defaults = {name: described.default for name, described in NETWORK_FIELDS.items()}
    nested = {
        name: _without_defaults(value) if isinstance(value, dict) else value for name, value in config.items()
    }
    defaults["type"] = nested.get("type")
    return {name: value for name, value in nested.items() if name not in defaults or value != defaults[name]}


def dtype_of(network: nn.Module) -> str:
    """Return the name of a network's dtype, such as ``float32``; it decides how logits are rounded."""
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def describe(network: nn.Module) -> str:
    """Return a network in a few words, for messages."""
    return f"{network.kind} with {network.num_exits} exits and {network.num_classes} classes"
