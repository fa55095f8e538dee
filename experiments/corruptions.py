"""Corruptions of images that are common in the field, each at five strengths.

Example:
    corrupted = CORRUPTIONS["jpeg"].apply(images, 75)     # uint8 (N, 3, H, W) -> the same

Every corruption is deterministic: the noise has a fixed seed. ``experiments.drift`` measures what they cost
each exit of a network; for ``imta_cifar100`` the result is in ``results/corruptions/``.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from experiments.markdown import markdown_table


@dataclass(frozen=True)
class Corruption:
    """A way to damage images.

    Attributes:
        title: The quantity that the strengths are values of, for tables.
        strengths: Strengths from weak to strong.
        apply: Function: images uint8 (N, 3, H, W), strength -> damaged images, uint8 (N, 3, H, W).
    """

    title: str
    strengths: tuple[float, ...]
    apply: Callable[[Tensor, float], Tensor]


def gaussian_noise(images: Tensor, sigma: float) -> Tensor:
    """Add independent Gaussian noise of standard deviation ``sigma`` (of 255) to every value."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return _to_bytes(images + sigma * noise)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian of standard deviation ``sigma`` pixels."""
    size = 2 * round(4 * sigma) + 1
    return _to_bytes(functional.gaussian_blur(images.float(), [size, size], [sigma, sigma]))


def brightness(images: Tensor, factor: float) -> Tensor:
    """Multiply every value by ``factor``."""
    return _to_bytes(images * factor)


def jpeg(images: Tensor, quality: float) -> Tensor:
    """Store every image as a JPEG of this quality, and read it back."""
    decoded = []
    for image in images.permute(0, 2, 3, 1).numpy():
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=int(quality))
        decoded.append(np.array(Image.open(stream)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()


def _to_bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


CORRUPTIONS = {
    "noise": Corruption("Gaussian noise, sigma", (1.5, 3.0, 6.0, 10.0, 15.0), gaussian_noise),
    "blur": Corruption("Gaussian blur, sigma in pixels", (0.4, 0.5, 0.6, 0.8, 1.0), gaussian_blur),
    "brightness": Corruption("brightness, factor", (0.9, 0.8, 0.6, 0.45, 0.3), brightness),
    "jpeg": Corruption("JPEG, quality", (95, 90, 75, 50, 30), jpeg),
}


def rows_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Return a table in Markdown of these columns (name in the rows -> title)."""
    cells = [
        [f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        for row in rows
    ]
    return markdown_table(list(columns.values()), cells)


def accuracy_table(name: str) -> str | None:
    """Return the stored table of what corruptions cost a shipped network, None if there is none."""
    path = Path(__file__).resolve().parents[1] / "results" / "corruptions" / f"{name}.csv"
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    titles = {column: column.replace("_", " ") for column in rows[0]}
    return rows_table(rows, titles | {"policy": "policy nearest to half"})
