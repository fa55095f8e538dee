"""Predict with what ``export_onnx.py`` wrote.

This module needs numpy and onnxruntime only: copy it wherever the network goes.

Example:
    predictor = OnnxPredictor("network.onnx")    # or the directory of a file per block
    prediction = predictor.predict(images, predictor.choose(operations=20e6))    # images (N, 3, S, S) uint8
    [predictor.class_names[c] for c in prediction.classes]
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

FORMAT = "imta-msdnet onnx 4"
FIELDS = ("class_names", "fingerprint", "image_size", "operations", "points", "preprocessing", "weights")
TYPES = {"image_size": int, "preprocessing": dict} | dict.fromkeys(
    ("class_names", "operations", "points", "weights", "blocks"), list
)
BLOCK_FIELDS = {"format", "fingerprint"}
LIMITED_SPINNING = (1, 26)  # the first version of ONNX Runtime that limits how long threads spin
SPIN_MICROSECONDS = "30"


class Prediction(NamedTuple):
    """Predictions for N images.

    Attributes:
        classes: (N,) int64.
        confidence: (N,) float32, the probability of that class.
        exits: (N,) int64, the exit at which each image left, from 0.
        logits: (N, C) float32, whose softmax are the probabilities of all classes (``probs``).
    """

    classes: np.ndarray
    confidence: np.ndarray
    exits: np.ndarray
    logits: np.ndarray

    @property
    def probs(self) -> np.ndarray:
        """Probabilities (N, C) of all classes."""
        return _softmax(self.logits)


class OnnxPredictor:
    """A network that stops early, as one ONNX file or as a directory with one file per block.

    Args:
        path: The file or the directory.
        threads: Threads per operator; None leaves the number to ONNX Runtime.
        providers: ONNX Runtime's execution providers, such as ``["CUDAExecutionProvider"]``.

    Attributes:
        class_names: Names of the C classes.
        image_size: Height and width of the images, S.
        preprocessing: ``crop_share`` and ``interpolation`` of the resize; ``mean`` and ``std``, which the
            network applies itself.
        fingerprint: Fingerprint of the network, for files that belong to it.
        operations: Operations per image to each of the K exits.
        points: The policies, as dictionaries with thresholds, held-out accuracy and mean operations.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or was not written by this version of ``export_onnx.py``.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        # Not Path.expanduser, which raises RuntimeError where there is no such home.
        path = Path(os.path.expanduser(path))  # noqa: PTH111
        self.threads, self.providers = threads, list(providers)
        self._in_blocks = path.is_dir()
        if self._in_blocks:
            content = _read_json(path / "network.json")
            _check_fields(content, path / "network.json", (*FIELDS, "blocks"))
        else:
            self._session = self._open(path)
            content = self._session.get_modelmeta().custom_metadata_map
            _check_fields(content, path, FIELDS)
            texts = set(FIELDS) - {"fingerprint"}
            try:
                content = content | {name: json.loads(content[name]) for name in texts}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} is damaged: {error}") from None
        _check_types(content, path / "network.json" if self._in_blocks else path)
        self.class_names: list[str] = content["class_names"]
        self.image_size: int = content["image_size"]
        self.preprocessing: dict[str, Any] = content["preprocessing"]
        self.fingerprint: str = content["fingerprint"]
        self.operations: list[float] = content["operations"]
        self.points: list[dict[str, Any]] = content["points"]
        self.num_exits, self.num_classes = len(self.operations), len(self.class_names)
        self._weights = np.array(content["weights"], np.float32)  # (K, K)
        if self._in_blocks:
            if len(content["blocks"]) != self.num_exits:
                count = len(content["blocks"])
                raise ValueError(f"{path / 'network.json'} has {self.num_exits} exits, but {count} blocks")
            self._blocks = [self.load_block(path / block["file"]) for block in content["blocks"]]

    def load_block(self, path: Path) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """Load the file of a block; another runtime overrides this.

        Returns:
            A function from the state and ``previous_logits`` (``images`` for the first block) to ``logits``
            and the next state.
        """
        session = self._open(path)
        self.check_block(path, session.get_modelmeta().custom_metadata_map)
        inputs = [value.name for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        return lambda state: dict(
            zip(outputs, session.run(outputs, {name: state[name] for name in inputs}), strict=True)
        )

    def check_block(self, path: Path, metadata: dict[str, str]) -> None:
        """Raise ValueError unless a block has the network's format and fingerprint in its metadata."""
        expected = {"format": FORMAT, "fingerprint": self.fingerprint}
        if any(metadata.get(name) != expected[name] for name in BLOCK_FIELDS):
            raise ValueError(
                f"{path} is a block of another network or version than {path.parent / 'network.json'}"
            )

    def choose(self, operations: float | None = None) -> np.ndarray:
        """Return the thresholds (K,) of the policy that is most accurate on held-out images within a budget.

        Args:
            operations: Mean operations per image at most; None chooses the policy nearest to half of the
                network's, as predict.py does.

        Raises:
            ValueError: If every policy needs more, or there is none.
        """
        if not self.points:
            raise ValueError("this network was exported without policies: pass thresholds")
        if operations is None:
            half = self.operations[-1] / 2
            best = min(self.points, key=lambda point: (abs(point["operations"] - half), -point["val_acc1"]))
            return np.array(best["thresholds"], np.float32)
        points = [point for point in self.points if point["operations"] <= operations]
        if not points:
            minimum = min(point["operations"] for point in self.points)
            raise ValueError(
                f"no policy needs at most {operations:.4g} operations per image: "
                f"the cheapest of {len(self.points)} needs {minimum:.4g}"
            )
        best = max(points, key=lambda point: (point["val_acc1"], -point["operations"]))
        return np.array(best["thresholds"], np.float32)

    def predict(
        self, images: np.ndarray, thresholds: Sequence[float] | np.ndarray | None = None
    ) -> Prediction:
        """Classify images; each leaves at the first exit whose confidence reaches its threshold.

        Args:
            images: (N, 3, S, S) uint8, RGB as in image files.
            thresholds: (K,), compared with the largest softmax probability. If None, those of ``choose()``.

        Raises:
            ValueError: If the images have another type or size, the thresholds are not K numbers, or the
                network's output is not finite for an image.
        """
        images = np.asarray(images)
        size = self.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} {images.shape}; this network needs uint8 (N, 3, {size}, {size})"
            )
        thresholds = self.choose() if thresholds is None else np.asarray(thresholds, np.float32)
        if thresholds.shape != (self.num_exits,):
            raise ValueError(f"thresholds are {thresholds.shape}; this network has {self.num_exits} exits")
        if np.isnan(thresholds).any():
            raise ValueError(f"thresholds are {thresholds.tolist()}; not all of them are numbers")
        if self._in_blocks:
            prediction = self._predict_in_blocks(images, thresholds)
        else:
            inputs = {"images": images, "thresholds": thresholds}
            prediction = Prediction(*self._session.run(list(Prediction._fields), inputs))
        wrong = np.flatnonzero(~np.isfinite(prediction.confidence))
        if len(wrong):
            raise ValueError(
                f"the network's output is not finite for {len(wrong)} of {len(images)} images; "
                f"the first is at position {wrong[0]}, from 0"
            )
        return prediction

    def _predict_in_blocks(self, images: np.ndarray, thresholds: np.ndarray) -> Prediction:
        """Run one block after another, each for the images that have not left.

        A loop of its own, beside that of the single file, which ONNX Runtime runs, and those in PyTorch.
        """
        seen = np.zeros((len(images), self.num_exits, self.num_classes), np.float32)  # logits of every exit
        exits = np.zeros(len(images), np.int64)
        remaining = np.arange(len(images))  # indices
        state = {"images": images}
        for k, run in enumerate(self._blocks):
            if len(remaining) == 0:
                break
            state = run(state)
            logits = state.pop("logits")
            seen[remaining, k] = logits
            exits[remaining] = k
            # Not "<", so that NaN stays: ``adaptive_inference.confidence.reaches_threshold``, copied.
            stay = ~(_softmax(logits).max(axis=1) >= thresholds[k])
            remaining = remaining[stay]
            state = {key.removeprefix("next_"): x[stay] for key, x in state.items()}
            state["previous_logits"] = logits[stay]
        weights = self._weights[exits]
        seen[weights == 0] = 0  # also where they are infinite
        logits = np.einsum("nk,nkc->nc", weights, seen)
        probs = _softmax(logits)
        return Prediction(probs.argmax(axis=1), probs.max(axis=1), exits, logits)

    def _open(self, path: Path) -> onnxruntime.InferenceSession:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads or 0
        # Threads that spin while they wait make every call many times slower when another program uses a
        # core. Some microseconds of it do no harm, and are faster than sleeping on a quiet machine.
        can_limit = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= LIMITED_SPINNING
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(can_limit)))
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=self.providers)
        except Exception as error:  # the runtime's own types are not public in all its versions
            raise ValueError(f"cannot load the model {path}: {' '.join(str(error).split())[:200]}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return content if isinstance(content, dict) else {}


def _check_fields(content: dict[str, Any], path: Path, fields: Sequence[str]) -> None:
    """Raise ValueError if an export has another format, or lacks one of these fields."""
    if content.get("format") != FORMAT:
        written = ascii(content.get("format"))[:60]
        raise ValueError(
            f"{path} was not written by this version of export_onnx.py: "
            f"its format is {written}, not {FORMAT!r}"
        )
    missing = [name for name in fields if name not in content]
    if missing:
        hint = "; it is one block of a network: pass its directory" if content.keys() == BLOCK_FIELDS else ""
        raise ValueError(f"{path} lacks {', '.join(missing)}{hint}")


def _check_types(content: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a field of an export is of another type."""
    damaged = [name for name, kind in TYPES.items() if not isinstance(content.get(name, kind()), kind)]
    if "blocks" not in damaged and not all(map(_is_block, content.get("blocks", []))):
        damaged.append("blocks")
    if damaged or np.shape(content["weights"]) != (len(content["operations"]),) * 2:
        raise ValueError(f"{path} is damaged: see its {', '.join(damaged) or 'weights'}")


def _is_block(block: object) -> bool:
    """Return True if an entry of ``blocks`` names a file in the directory of the export."""
    file = block.get("file") if isinstance(block, dict) else None
    return isinstance(file, str) and Path(file).name == file


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities (n, C) of logits (n, C)."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
