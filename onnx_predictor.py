"""Predict with a file that ``export_onnx.py`` wrote. Needs numpy and onnxruntime alone: copy this module wherever the file goes.

predictor = OnnxPredictor("network.onnx")
prediction = predictor.predict(images, predictor.choose(operations=20e6))    # images (N, 3, S, S) uint8
[predictor.class_names[c] for c in prediction.classes]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

FORMAT = "imta-msdnet onnx 3"


class Prediction(NamedTuple):
    """Answers to N images: ``classes`` (N,) int64; ``confidence`` (N,), the probability of that class; ``exits`` (N,) int64, from 0;
    ``logits`` (N, C), whose softmax are the probabilities of all classes."""

    classes: np.ndarray
    confidence: np.ndarray
    exits: np.ndarray
    logits: np.ndarray


class OnnxPredictor:
    """A network that stops early, with ``class_names``, ``image_size``, ``operations`` to each exit, and the policies' ``points``.

    Args:
        path: of the file.
        threads: of one operation; None leaves it to ONNX Runtime.
        providers: where it runs, in ONNX Runtime's words, such as ``["CUDAExecutionProvider"]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or ``export_onnx.py`` of this version did not write it.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
            metadata = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # the runtime's own types are not public in all its versions
            raise ValueError(f"cannot load the model {path}: {' '.join(str(error).split())[:200]}") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no file of this version of export_onnx.py: its format is {ascii(metadata.get('format'))[:60]}"
            )
        names = ("class_names", "image_size", "operations", "points")
        self.class_names, self.image_size, self.operations, self.points = (
            json.loads(metadata[name]) for name in names
        )
        self.num_exits, self.num_classes = len(self.operations), len(self.class_names)

    def choose(self, operations: float | None = None) -> np.ndarray:
        """Thresholds (K,) of the policy most accurate on held-out images, of those whose mean is at most ``operations`` an image.

        Args:
            operations: None: the policy that is nearest to half of the network's, as predict.py chooses.

        Raises:
            ValueError: every policy spends more, or the file has none.
        """
        points = [point for point in self.points if operations is None or point["operations"] <= operations]
        if not points:
            raise ValueError(
                f"none of this file's {len(self.points)} policies spends at most {operations} operations"
            )
        if operations is None:
            best = min(
                points,
                key=lambda point: (abs(point["operations"] - self.operations[-1] / 2), -point["val_acc1"]),
            )
        else:
            best = max(points, key=lambda point: (point["val_acc1"], -point["operations"]))
        return np.array(best["thresholds"], np.float32)

    def predict(
        self, images: np.ndarray, thresholds: Sequence[float] | np.ndarray | None = None
    ) -> Prediction:
        """Answer images (N, 3, S, S) uint8, RGB as in files; each leaves at the first exit whose confidence reaches its threshold.

        Args:
            thresholds: (K,), compared with the largest softmax probability; None: those of ``choose()``.

        Raises:
            ValueError: images of another type or size, or another number of thresholds.
        """
        size = self.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} {images.shape}; this network wants uint8 (N, 3, {size}, {size})"
            )
        thresholds = self.choose() if thresholds is None else np.asarray(thresholds, np.float32)
        if thresholds.shape != (self.num_exits,):
            raise ValueError(f"thresholds are {thresholds.shape}; this network has {self.num_exits} exits")
        return Prediction(
            *self.session.run(list(Prediction._fields), {"images": images, "thresholds": thresholds})
        )
